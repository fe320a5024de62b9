"""Adapters that are kept in files of their own beside a model's weights, and put on when it is loaded."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.errors import CheckpointError, MissingPackageError
from bolaco.layers import put_module
from bolaco.layers.tensor_train import TensorTrain, TrainAdapter, shape_of
from bolaco.models.quiet import quiet
from bolaco.settings import parsed_json

# Folder of a LoRA adapter as PEFT writes it; files of tensor-train adapters.
PEFT_FOLDER = "adapter"
TRAIN_JSON, TRAIN_TENSORS = "adapter_tt.json", "adapter_tt.safetensors"
# File of a delta, which :mod:`bolaco.delta` writes; the base is in the JSON beside it.
DELTA_TENSORS, _DELTA_JSON = "delta.safetensors", "bolaco.json"

# Of an adapter; more is damage, and would be made.
LARGEST_RANK = 2**16

Attach = Callable[[PreTrainedModel, Path], None]


def import_peft() -> Any:
    """PEFT.

    Raises:
        MissingPackageError: it cannot be imported.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError(
            f"mode lora and its adapters need PEFT, which cannot be imported ({error}); pip install 'bolaco[tune]'"
        ) from error
    return peft


def attach_peft(model: PreTrainedModel, folder: Path) -> None:
    """Puts the LoRA adapters of a folder on its model, if there are some.

    Raises:
        MissingPackageError: PEFT is not there.
        CheckpointError: the adapter is damaged, or of another model.
    """
    kept = folder / PEFT_FOLDER
    if not kept.is_dir():
        return
    import_peft()
    try:
        settings = parsed_json((kept / "adapter_config.json").read_text(encoding="utf-8"))
        patterns = settings.get("rank_pattern") or {}
        for rank in (settings.get("r"), *patterns.values()):
            if not isinstance(rank, int) or not 0 < rank <= LARGEST_RANK:
                raise ValueError(f"adapter_config.json: a rank of {str(rank)[:40]}")
        with quiet():
            model.load_adapter(str(kept))
    except Exception as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{kept}: damaged, or of another model ({why[:300]})") from error
    model.eval().requires_grad_(False)


def save_trains(folder: Path, adapters: Mapping[str, TrainAdapter], base: str | None) -> None:
    """Writes tensor-train adapters, by the names of their matrices.

    ``base`` names the model they are for, where it does not lie in the same folder.
    """
    tensors: dict[str, Tensor] = {}
    matrices: dict[str, Any] = {}
    for name, adapter in adapters.items():
        train = adapter.train_of_cores
        matrices[name] = {"in": train.inputs, "out": train.outputs, "rank": train.rank, "alpha": adapter.alpha}
        for t, core in enumerate(train.cores):
            tensors[f"{name}.{t}"] = core.detach().cpu().contiguous()
    save_file(tensors, folder / TRAIN_TENSORS, metadata={"format": "pt"})
    described = {"format": 1} | ({} if base is None else {"base": base}) | {"matrices": matrices}
    (folder / TRAIN_JSON).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def is_delta(folder: str | Path) -> bool:
    """Whether a folder holds a delta."""
    return (Path(folder).expanduser() / DELTA_TENSORS).is_file()


def base_of(folder: Path) -> str | None:
    """The model that the adapter or delta in a folder is for, if the folder holds one and no model.

    Raises:
        CheckpointError: it does not say.
    """
    file = base_file(folder)
    if file is None or (folder / "config.json").is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        base = None
    if not isinstance(base, str) or not base:
        raise CheckpointError(f'{file}: damaged, or without the model it is for; name that in its field "base"')
    return base


def base_file(folder: Path) -> Path | None:
    """The file that says which model the adapter or delta in a folder is for; None where there is neither."""
    if (folder / DELTA_TENSORS).is_file():
        return folder / _DELTA_JSON
    return folder / TRAIN_JSON if (folder / TRAIN_JSON).is_file() else None


def attach_trains(model: PreTrainedModel, folder: Path) -> None:
    """Puts the tensor-train adapters of a folder on its model, if there are some.

    Raises:
        CheckpointError: the files are damaged, or of another model.
    """
    file = folder / TRAIN_JSON
    if not file.is_file():
        return
    try:
        matrices = parsed_json(file.read_text(encoding="utf-8"))["matrices"]
        tensors = load_file(folder / TRAIN_TENSORS)
        for name, entry in matrices.items():
            layer = model.get_submodule(name)
            # Before anything of that size is made: it is multiplied with, and its cores are in the other file.
            product = [math.prod(map(int, sizes)) for sizes in (entry["in"], entry["out"])]
            if product != [*shape_of(layer)]:
                raise ValueError(f"{name}: the adapter is for {product[0]} to {product[1]}, the matrix is not")
            if tensors[f"{name}.0"].shape[-1] != entry["rank"]:
                raise ValueError(f"{name}: rank {entry['rank']}, its first core says {tensors[f'{name}.0'].shape[-1]}")
            train = TensorTrain(tuple(entry["in"]), tuple(entry["out"]), entry["rank"])
            train.load_state_dict({f"cores.{t}": tensors[f"{name}.{t}"] for t in range(len(train.cores))})
            alpha = float(entry["alpha"])
            made = TrainAdapter(layer, train.to(model.device, model.dtype), alpha).requires_grad_(False)
            put_module(model, name, made.eval())
    except Exception as error:  # files can hold anything
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{file}: damaged, or of another model ({why[:300]})") from error


def _attach_delta(model: PreTrainedModel, folder: Path) -> None:
    """Adds a delta to its base. The room of deltas is far above this one: it is found by its name, as methods are."""
    attach: Attach = importlib.import_module("bolaco.delta.folder").attach
    attach(model, folder)


# What lies in a model's folder -> what puts it on.
_ADAPTERS: dict[str, Attach] = {
    TRAIN_JSON: attach_trains,
    f"{PEFT_FOLDER}/adapter_config.json": attach_peft,
    DELTA_TENSORS: _attach_delta,
}


def kept_adapters(folder: Path) -> dict[str, Attach]:
    """Adapters kept in a folder: the file that shows it, and what puts it on."""
    return {file: attach for file, attach in _ADAPTERS.items() if (folder / file).is_file()}
