"""Writing a compressed model as a normal Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.checkpoint.modelling import auto_map
from bolaco.checkpoint.registry import PREFIX, config_class, model_classes
from bolaco.errors import NonFiniteError, OutputExistsError, RecipeError, UnsupportedModelError
from bolaco.factorize.pivot import pivot
from bolaco.layers import FollowerLinear, LeadLinear, LowRankLinear, SplitLinear
from bolaco.models.load import quiet
from bolaco.models.structure import Site, Structure


def refuse_compressed(config: Any) -> None:
    """Raises UnsupportedModelError if this is the configuration of a compressed model already."""
    if config.model_type.startswith(PREFIX):
        raise UnsupportedModelError(
            f"the model is compressed already ({config.model_type}); compress the original, "
            "or make it dense with `bolaco export --dense`"
        )


@dataclass
class CompressedState:
    """What a checkpoint is made of.

    Attributes:
        matrices: the ``matrices`` entry of the configuration.
        tensors: the state dict.
        growth: largest coefficient of each pivoted matrix, by site name; rounding errors grow by about this factor.
    """

    matrices: dict[str, Any]
    tensors: dict[str, Tensor]
    growth: dict[str, float] = field(default_factory=dict)


def compressed_state(
    model: PreTrainedModel,
    structure: Structure,
    blocks: Iterable[nn.Module],
    storage: str = "two-factor",
) -> CompressedState:
    """Configuration entry and state dict of the model whose decoder blocks are ``blocks``, in order.

    ``model`` is left as it is; tensors that do not change are shared with it.

    Raises:
        NonFiniteError: a tensor of a changed matrix with NaN or infinity.
    """
    result = CompressedState({}, dict(model.state_dict()))
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    leads: dict[nn.Module, str] = {}
    for layer, block in enumerate(blocks):
        inside = f"{structure.blocks}.{layer}."
        for key in [key for key in result.tensors if key.startswith(prefix + inside)]:
            del result.tensors[key]
        tensors = dict(block.state_dict())
        for sites in structure.modules(layer).values():
            name = structure.name_in_block(sites[0])
            module = block.get_submodule(name)
            if not isinstance(module, SplitLinear):
                entry = _entry(sites[0], name, module, tensors, storage, result.growth) | _sharing(
                    module, inside + name, leads
                )
                original = model.base_model.get_submodule(sites[0].module)
                if (
                    entry["rank"] is not None
                    or (entry["bias"] and original.bias is None)
                    or _converted(module, original)
                ):
                    result.matrices[inside + name] = entry
                continue
            parts = []
            for site in sites:
                where = f"{name}.parts.{site.part}"
                inner = module.parts[str(site.part)]
                part = _entry(site, where, inner, tensors, storage, result.growth)
                parts.append({"name": site.part} | part | _sharing(inner, inside + where, leads))
            result.matrices[inside + name] = {"parts": parts}
        result.tensors.update({prefix + inside + key: value.contiguous() for key, value in tensors.items()})
    return result


def _converted(module: nn.Module, original: nn.Module) -> bool:
    """Whether a Conv1D (GPT-2) has become a Linear."""
    return isinstance(original, Conv1D) and not isinstance(module, Conv1D)


def _sharing(module: nn.Module, name: str, leads: dict[nn.Module, str]) -> dict[str, Any]:
    """What an entry says of a shared input factor; ``leads`` collects the names of those who own one."""
    if isinstance(module, LeadLinear):
        leads[module] = name
        return {"lead": True}
    return {"shares": leads[module.lead]} if isinstance(module, FollowerLinear) else {}


def _entry(
    site: Site, where: str, module: nn.Module, tensors: dict[str, Tensor], storage: str, growth: dict[str, float]
) -> dict[str, Any]:
    """Configuration entry of one matrix; its tensors are brought into the form in which they are stored."""
    own = [tensors[key] for key in tensors if key.startswith(f"{where}.")]
    if not all(torch.isfinite(tensor).all() for tensor in own):
        raise NonFiniteError(f"{site.name}: its compressed form holds NaN or infinity")
    if not isinstance(module, LowRankLinear | FollowerLinear):
        return {"out": site.out_features, "rank": None, "bias": module.bias is not None}
    bias = module.expand.bias
    entry: dict[str, Any] = {"out": site.out_features, "rank": module.rank, "bias": bias is not None}
    if storage != "pivoted" or isinstance(module, FollowerLinear):
        return entry
    form = pivot(module.expand.weight.detach().cpu(), module.reduce.weight.detach().cpu())
    for key in [key for key in tensors if key.startswith(f"{where}.")]:
        del tensors[key]
    state = form.state(None if bias is None else bias.detach().cpu())
    tensors.update({f"{where}.{key}": value for key, value in state.items()})
    growth[site.name] = form.growth
    return entry | {"side": form.side}


def write_model(folder: Path, model: PreTrainedModel, state: CompressedState) -> None:
    """Writes configuration, weights, generation settings and modelling code into an existing folder."""
    config, causal = _lowrank(model, state.matrices)
    # Without memory: the skeleton only tells save_pretrained names, ties and shards.
    with torch.device("meta"):
        skeleton = causal(config)
    skeleton.to(model.dtype)
    skeleton.generation_config = model.generation_config
    with quiet():
        skeleton.save_pretrained(folder, state_dict=state.tensors)


def lowrank_model(model: PreTrainedModel, matrices: dict[str, Any]) -> PreTrainedModel:
    """``model``, whose modules are those that ``matrices`` describes already, as a model of the compressed type.

    It shares all tensors, and is there to be saved: what a checkpoint does not hold is on the meta device.
    """
    config, causal = _lowrank(model, matrices)
    with torch.device("meta"):
        made: PreTrainedModel = causal(config)
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    made.generation_config = model.generation_config
    return made


def _lowrank(model: PreTrainedModel, matrices: dict[str, Any]) -> tuple[Any, Any]:
    """Configuration and class of the compressed model made of ``model``."""
    model_type = model.config.model_type
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    values.update(
        model_type=PREFIX + model_type,
        auto_map=auto_map(model_type),
        lowrank={"format": 1, "matrices": matrices},
    )
    return config_class(model_type).from_dict(values), model_classes(model_type)[1]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when the block succeeds and vanishes when it fails.

    Its files are as readable as it is: safetensors writes for the owner alone, whatever the umask says.

    Raises:
        OutputExistsError: ``out`` exists.
    """
    refuse_existing(out)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        readable = partial.stat().st_mode & 0o666
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(readable)
        refuse_existing(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Raises OutputExistsError if ``out`` is there already."""
    if out.exists():
        raise OutputExistsError(f"{out}: exists already and is not overwritten; choose another name or remove it first")


def refuse_nested(out: Path, work: Path) -> None:
    """The work folder is removed at the end, and the output must not exist before: neither may hold the other."""
    a, b = out.resolve(), work.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise RecipeError(f"{out} and {work}: the output and the work folder must not be one inside the other")
