"""Writing a compressed model as a normal Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.allocate.budget import Ranks
from bolaco.checkpoint.modelling import auto_map
from bolaco.checkpoint.registry import PREFIX, config_class, model_classes
from bolaco.errors import NonFiniteError, OutputExistsError, UnsupportedModelError
from bolaco.factorize.pivot import pivot
from bolaco.factorize.solver import Factors
from bolaco.factorize.store import FactorStore
from bolaco.models.load import quiet
from bolaco.models.structure import Site, Structure


def refuse_compressed(config: Any) -> None:
    """Raises UnsupportedModelError if this is the configuration of a compressed model already."""
    if config.model_type.startswith(PREFIX):
        raise UnsupportedModelError(
            f"the model is compressed already ({config.model_type}); compress the original, "
            "or make it dense with `bolaco export --dense`"
        )


def _factored(
    site: Site, factors: Factors, rank: int, bias: Tensor | None, storage: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and configuration entry of one factored layer."""
    bias = factors.bias(rank, bias)
    expand, reduce = factors.expand_t[:rank].T, factors.reduce[:rank]
    if not (torch.isfinite(expand).all() and torch.isfinite(reduce).all()):
        raise NonFiniteError(f"{site.name}: its rank-{rank} factors hold NaN or infinity")
    entry: dict[str, Any] = {"out": site.out_features, "rank": rank, "bias": bias is not None}
    if storage == "pivoted":
        form = pivot(expand, reduce)
        return form.state(bias), entry | {"side": form.side}
    return {"reduce.weight": reduce, "expand.weight": expand} | ({} if bias is None else {"expand.bias": bias}), entry


def compressed_state(
    model: PreTrainedModel, structure: Structure, store: FactorStore, ranks: Ranks, storage: str = "two-factor"
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
            entries: list[dict[str, Any]] = []
            for site in members:
                where = key if site.part is None else f"{key}.parts.{site.part}"
                rank = ranks.get(site.name)
                bias = structure.bias(model, site)
                if rank is None:
                    tensors = {"weight": structure.weight(model, site)} | ({} if bias is None else {"bias": bias})
                    entry: dict[str, Any] = {"out": site.out_features, "rank": None, "bias": bias is not None}
                else:
                    bias = None if bias is None else bias.cpu()
                    tensors, entry = _factored(site, factors[site.name], rank, bias, storage)
                state.update({f"{where}.{name}": tensor.contiguous() for name, tensor in tensors.items()})
                entries.append(entry if site.part is None else {"name": site.part} | entry)
            matrices[module] = entries[0] if members[0].part is None else {"parts": entries}
    return matrices, state


def write_model(folder: Path, model: PreTrainedModel, matrices: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Writes configuration, weights, generation settings and modelling code into an existing folder."""
    model_type = model.config.model_type
    causal, config_cls = model_classes(model_type)[1], config_class(model_type)
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    values.update(
        model_type=PREFIX + model_type,
        auto_map=auto_map(model_type),
        lowrank={"format": 1, "matrices": matrices},
    )
    config = config_cls.from_dict(values)
    # Without memory: the skeleton only tells save_pretrained names, ties and shards.
    with torch.device("meta"):
        skeleton = causal(config)
    skeleton.to(model.dtype)
    skeleton.generation_config = model.generation_config
    with quiet():
        skeleton.save_pretrained(folder, state_dict=state)


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
