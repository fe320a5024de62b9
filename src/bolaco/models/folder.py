"""A model's folder before anything in it is read: sizes that no model has, and weights that are somewhere else."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

from bolaco.errors import BolacoError, CheckpointError
from bolaco.models.find import meta_model
from bolaco.work.files import read_json

# Configurations make lists as long as these.
_COUNTS = re.compile(r"(layers?|experts|blocks?|depth)$")
_MOST = 10_000
_LARGEST = 2**48  # some say how many tokens they were trained on
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("*.safetensors", "*.bin")
# A parameter takes half a byte at least; and room for what tiny models have beside their weights.
_PARAMETERS_A_BYTE, _SLACK = 4, 2**20


def check_config(folder: Path) -> None:
    """Stops at numbers in ``config.json`` for which no memory would be enough.

    Raises:
        CheckpointError: with the name of the field; or the file is no JSON object.
    """
    file = folder / "config.json"
    if file.is_file():
        _check_sizes(_object(file), f"{file}: ")


def _check_sizes(values: dict[str, Any], where: str) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and name != "lowrank":
            _check_sizes(value, f"{where}{name}.")
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        most = _MOST if _COUNTS.search(name) else _LARGEST if isinstance(value, int) else None
        if most is not None and abs(value) > most:
            raise CheckpointError(f"{where}{name}: no model has {str(value)[:40]}")


def check_index(folder: Path) -> None:
    """Stops at an index of weights that leads out of the folder, or to what is no file.

    Raises:
        CheckpointError: with the index, the tensor and where it should be.
    """
    for file in (folder / name for name in _INDEXES):
        if not file.is_file():
            continue
        found = _object(file).get("weight_map")
        if not isinstance(found, dict):
            raise CheckpointError(f"{file}: damaged (weight_map is no object)")
        places: dict[str, str] = {}
        for tensor, name in found.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{file}: damaged (weight_map.{tensor}: {name!r:.80} is no name of a file)")
            places.setdefault(name, tensor)
        for name, tensor in places.items():
            path = PurePath(name)
            if path.is_absolute() or ".." in path.parts or "\0" in name or len(name) > 255:
                raise CheckpointError(f"{file}: {tensor} is said to be in {name!r:.80}, which is not in this folder")
            if path.suffix not in (".safetensors", ".bin") or not (folder / path).is_file():
                raise CheckpointError(f"{file}: {tensor} is said to be in {name!r:.80}, which is no file of weights")


def check_parameters(config: Any, folder: Path) -> None:
    """Stops if the model of a configuration is far larger than the weights beside it: what they lack is made first.

    Raises:
        CheckpointError: with both numbers.
    """
    files = {file for pattern in _WEIGHTS for file in folder.glob(pattern) if file.is_file()}
    if not files or getattr(config, "quantization_config", None) is not None:
        return
    try:
        parameters = sum(p.numel() for p in meta_model(config).parameters())
    except BolacoError:
        return  # loading says more
    size = sum(file.stat().st_size for file in files)
    if parameters > _PARAMETERS_A_BYTE * size + _SLACK:
        raise CheckpointError(
            f"{folder / 'config.json'}: makes a model of {parameters:,} parameters, its files have {size:,} bytes"
        )


def _object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is none.
    """
    values = read_json(file)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: damaged (a {type(values).__name__}, not an object)")
    return values
