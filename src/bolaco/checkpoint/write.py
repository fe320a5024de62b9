"""Writing a compressed model as a normal Hugging Face folder."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco import layers
from bolaco.allocate.budget import Ranks
from bolaco.checkpoint.registry import PREFIX, config_class, model_classes
from bolaco.errors import NonFiniteError, OutputExistsError, UnsupportedModelError
from bolaco.factorize.store import FactorStore
from bolaco.models.structure import Site, Structure

MODELLING_FILE = "modeling_lowrank"

_TAIL = '''

class {config}({dense_config}):
    """Configuration of a {model_type} model with factored projections."""

    model_type = "{prefix}{model_type}"
    base_model_tp_plan = None


class {base}(LowRankMixin, {dense_base}):
    """{dense_base} with factored projections."""

    config_class = {config}


class {causal}(LowRankMixin, {dense_causal}):
    """{dense_causal} with factored projections."""

    config_class = {config}
'''


def modelling_code(model_type: str) -> str:
    """Source of the modelling file of a checkpoint: the layers, and the three classes of one model type."""
    base, causal = model_classes(model_type)
    dense_base, dense_causal = base.__mro__[2], causal.__mro__[2]
    config = config_class(model_type)
    dense_config = config.__mro__[1]
    source = inspect.getsource(layers)
    imports = "".join(
        f"from {cls.__module__} import {cls.__name__}\n" for cls in (dense_config, dense_base, dense_causal)
    )
    head, anchor, rest = source.partition("from transformers.pytorch_utils import Conv1D\n")
    return (
        head
        + imports
        + anchor
        + rest.rstrip()
        + "\n"
        + _TAIL.format(
            config=config.__name__,
            dense_config=dense_config.__name__,
            base=base.__name__,
            dense_base=dense_base.__name__,
            causal=causal.__name__,
            dense_causal=dense_causal.__name__,
            model_type=model_type,
            prefix=PREFIX,
        )
    )


def refuse_compressed(config: Any) -> None:
    """Raises UnsupportedModelError if this is the configuration of a compressed model already."""
    if config.model_type.startswith(PREFIX):
        raise UnsupportedModelError(
            f"the model is compressed already ({config.model_type}); compress the original, "
            "or make it dense with `bolaco export --dense`"
        )


def _entry(site: Site, rank: int | None, bias: bool) -> dict[str, Any]:
    return {"out": site.out_features, "rank": rank, "bias": bias}


def compressed_state(
    model: PreTrainedModel, structure: Structure, store: FactorStore, ranks: Ranks
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The ``matrices`` entry of the configuration and the state dict of the compressed model.

    ``model`` is left as it is; tensors that do not change are shared with it.

    Raises:
        NonFiniteError: a factor with NaN or infinity.
    """
    state = dict(model.state_dict())
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    matrices: dict[str, Any] = {}
    for layer in range(structure.num_layers):
        sites = structure.of_layer(layer)
        if all(ranks.get(site.name) is None for site in sites):
            continue
        factors = store.load(layer)
        by_module: dict[str, list[Site]] = {}
        for site in sites:
            by_module.setdefault(site.module, []).append(site)
        for module, members in by_module.items():
            if all(ranks.get(site.name) is None for site in members):
                continue
            key = prefix + module
            state.pop(f"{key}.weight")
            state.pop(f"{key}.bias", None)
            entries = {}
            for site in members:
                where = key if site.part is None else f"{key}.parts.{site.part}"
                rank = ranks.get(site.name)
                bias = structure.bias(model, site)
                if rank is None:
                    state[f"{where}.weight"] = structure.weight(model, site).contiguous()
                    name = f"{where}.bias"
                else:
                    item = factors[site.name]
                    bias = item.bias(rank, None if bias is None else bias.cpu())
                    state[f"{where}.reduce.weight"] = item.reduce[:rank].contiguous()
                    state[f"{where}.expand.weight"] = item.expand_t[:rank].T.contiguous()
                    for part in ("reduce", "expand"):
                        if not torch.isfinite(state[f"{where}.{part}.weight"]).all():
                            raise NonFiniteError(f"{site.name}: its rank-{rank} factors hold NaN or infinity")
                    name = f"{where}.expand.bias"
                if bias is not None:
                    state[name] = bias.contiguous()
                entries[site.part] = _entry(site, rank, bias is not None)
            matrices[module] = entries.get(None, {"parts": entries})
    return matrices, state


def write_model(folder: Path, model: PreTrainedModel, matrices: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Writes configuration, weights, generation settings and modelling code into an existing folder."""
    model_type = model.config.model_type
    base, causal = model_classes(model_type)
    config_cls = config_class(model_type)
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    values.update(
        model_type=PREFIX + model_type,
        architectures=[causal.__name__],
        auto_map={
            "AutoConfig": f"{MODELLING_FILE}.{config_cls.__name__}",
            "AutoModel": f"{MODELLING_FILE}.{base.__name__}",
            "AutoModelForCausalLM": f"{MODELLING_FILE}.{causal.__name__}",
        },
        lowrank={"format": 1, "matrices": matrices},
    )
    config = config_cls.from_dict(values)
    config.dtype = model.dtype
    # Without memory: the skeleton only tells save_pretrained names, ties and shards.
    with torch.device("meta"):
        skeleton = causal(config)
    skeleton.to(model.dtype)
    skeleton.generation_config = model.generation_config
    skeleton.save_pretrained(folder, state_dict=state)
    (folder / f"{MODELLING_FILE}.py").write_text(modelling_code(model_type), encoding="utf-8")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when the block succeeds and vanishes when it fails.

    Raises:
        OutputExistsError: ``out`` exists.
    """
    refuse_existing(out)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        refuse_existing(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Raises OutputExistsError if ``out`` is there already."""
    if out.exists():
        raise OutputExistsError(f"{out}: exists already and is not overwritten; choose another name or remove it first")
