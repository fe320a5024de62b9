"""Finding the decoder of a model and its matrices by looking, on models without weights (meta device) too."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.errors import UnsupportedModelError, no_memory
from bolaco.layers import EachExpert, FactoredLinear
from bolaco.models.experts import unfused
from bolaco.models.labels import TYPES, own_type, types_of
from bolaco.models.structure import Kept, Site, Structure, prefix_of, weight_of

# Lists of blocks in these parts of a model do not run on text.
_OTHER_SENSES = re.compile(r"(^|[._])(vision|visual|image|img|audio|speech|embed)([._]|$)")
_EXPERT = re.compile(r"(^|\.)\w*experts?\w*\.(\d+)(\.|$)")
# A matrix with fewer rows or columns gains nothing from a rank that is a multiple of anything.
_SMALL = 8


def inspect_structure(model: PreTrainedModel) -> Structure:
    """Finds the decoder blocks and their matrices.

    Works on models on the meta device too: only names and shapes are read. Fused experts count as a matrix each, under
    the names they have in :func:`bolaco.models.experts.unfused`.

    Raises:
        UnsupportedModelError: no list of decoder blocks, or nothing in it that can be factored.
    """
    kind = model.config.model_type
    what = f"{type(model.base_model).__name__} (model type {kind})"
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{what}: an encoder-decoder; only text decoders are supported")
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            raise UnsupportedModelError(f"{name}: a {type(module).__name__}; the model is compressed already")
    working = unfused(model)
    blocks = list(_blocks(working))
    if not blocks:
        raise UnsupportedModelError(f"{what}: no list of decoder blocks with linear matrices found")
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    tied = _tied(working)
    sites: list[Site] = []
    kept: dict[tuple[str, str], int] = {}
    for layer, (where, block) in enumerate(blocks):
        found = _InBlock(config, block, where, prefix_of(model), layer, tied)
        sites += found.sites
        for name, size, reason in found.kept:
            kept[name, reason] = kept.get((name, reason), 0) + size
    if not sites:
        raise UnsupportedModelError(f"{what}: its blocks ({blocks[0][0]}, ...) hold no matrix that can be factored")
    size = sum(p.numel() for _, block in blocks for p in block.parameters())
    rest = tuple(Kept(name, count, reason) for (name, reason), count in kept.items())
    return Structure(tuple(where for where, _ in blocks), tuple(sites), rest, size)


def meta_model(config: Any) -> PreTrainedModel:
    """The model of a configuration without weights: names and shapes only, in no memory.

    Raises:
        UnsupportedModelError: transformers has no causal language model of this type, or cannot make one of it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    # What classes do with values that they do not expect.
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError) as error:
        if no_memory(error):
            raise
        why = " ".join(str(error).split()).partition(" Model type should be")[0][:200]
        raise UnsupportedModelError(f"no causal language model of type {config.model_type}: {why}") from error
    return skeleton


def _decoder(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The part of the base model that reads text, and its name in that."""
    base = model.base_model
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):
        decoder = None
    for name, module in base.named_modules():
        if module is decoder and isinstance(module, PreTrainedModel):
            return name, module
    return "", base


def _blocks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Decoder blocks, with their names in the base model: elements of the outermost lists that hold matrices."""
    where, decoder = _decoder(model)
    inner: tuple[str, ...] = ()
    for name, module in decoder.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or name.startswith(inner or ("\0",)):
            continue
        inner += (name + ".",)
        if _OTHER_SENSES.search(name):
            continue
        # The outermost list of matrices themselves is no list of blocks.
        if any(not _is_linear(block) and any(map(_is_linear, block.modules())) for block in module):
            place = ".".join(part for part in (where, name) if part)
            yield from ((f"{place}.{index}", block) for index, block in enumerate(module))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


class _InBlock:
    """Matrices of one block, and what stays dense with the reason."""

    def __init__(self, config: Any, block: nn.Module, where: str, prefix: str, layer: int, tied: set[int]) -> None:
        self.config, self.block, self.where, self.prefix, self.layer = config, block, where, prefix, layer
        self.sites: list[Site] = []
        self.kept: list[tuple[str, int, str]] = []
        self.experts = _experts_in(block)
        taken: set[str] = set()
        seen: set[int] = set()
        self.tied = tied
        for name, module in block.named_modules():
            if not _is_linear(module):
                continue
            reason = self._reason(name, module)
            if reason:
                self.kept.append((own_type(name), weight_of(module).numel(), reason))
            else:
                self._add(name, module, taken)
            seen.add(id(module.weight))
        for name, parameter in block.named_parameters():
            if parameter.ndim >= 2 and id(parameter) not in seen:
                self.kept.append((own_type(name), parameter.numel(), _kind_of(block, name)))
        self.sites.sort(key=lambda site: TYPES.index(site.type) if site.type in TYPES else len(TYPES))

    def _reason(self, name: str, module: nn.Module) -> str:
        """Why a linear module stays dense; empty if it does not."""
        out_features, in_features = weight_of(module).shape
        if self.experts and "expert" not in name and out_features in self.experts:
            return "router"
        if name.rpartition(".")[2] in ("router", "classifier"):
            return "router"
        if id(module.weight) in self.tied:
            return "used in several places"
        known = all(kind in TYPES for kind in types_of(name))
        return "small" if min(out_features, in_features) <= _SMALL and not known else ""

    def _add(self, name: str, module: nn.Module, taken: set[str]) -> None:
        types = types_of(name)
        out_features, in_features = weight_of(module).shape
        rows = _rows(self.config, types, out_features)
        expert = _expert_of(self.block, name)
        # Of two matrices with one name the second has its own: types are unique in a block, but for experts.
        if rows is None or (expert is None and taken & set(types)):
            types, rows = (own_type(name),), [out_features]
        taken |= set(types)
        start = 0
        for kind, count in zip(types, rows, strict=True):
            part = kind if len(types) > 1 else None
            self.sites.append(
                Site(
                    name=f"{self.prefix}{self.where}.{name}" + (f".{part}" if part else ""),
                    module=f"{self.where}.{name}",
                    layer=self.layer,
                    type=kind,
                    part=part,
                    rows=(start, start + count),
                    out_features=count,
                    in_features=in_features,
                    bias=module.bias is not None,
                    expert=expert,
                )
            )
            start += count


def _tied(model: nn.Module) -> set[int]:
    """Identities of the weights that are those of several modules."""
    # A module that is itself in several places counts as often.
    counts = Counter(
        id(module._parameters["weight"])
        for _, module in model.named_modules(remove_duplicate=False)
        if module._parameters.get("weight") is not None
    )
    return {weight for weight, count in counts.items() if count > 1}


def _experts_in(block: nn.Module) -> set[int]:
    """Numbers of experts that there are in a block."""
    lists = [
        module
        for name, module in block.named_modules()
        if isinstance(module, EachExpert) or (isinstance(module, nn.ModuleList) and "expert" in name)
    ]
    return {len(module) for module in lists}


def _expert_of(block: nn.Module, name: str) -> int | None:
    """The number of the expert that a module of a block belongs to."""
    parent, _, last = name.rpartition(".")
    if parent and isinstance(block.get_submodule(parent), EachExpert):
        return int(last)
    found = _EXPERT.search(name)
    return int(found[2]) if found else None


def _kind_of(block: nn.Module, name: str) -> str:
    """What a parameter that is no linear matrix is, in a word."""
    owner = block.get_submodule(name.rpartition(".")[0]) if "." in name else block
    if isinstance(owner, nn.Conv1d | nn.Conv2d):
        return "convolution"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if "router" in name or "gate.weight" in name:
        return "router"
    return "no linear module"


def _rows(config: Any, types: tuple[str, ...], out_features: int) -> list[int] | None:
    """Rows of each part of a possibly fused projection; None if they do not add up to it."""
    if len(types) == 1:
        return [out_features]
    if types == ("gate", "up"):
        return [out_features // 2] * 2 if out_features % 2 == 0 else None
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or not isinstance(getattr(config, "hidden_size", None), int):
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    return rows if sum(rows) == out_features else None
