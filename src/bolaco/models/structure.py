"""What a decoder is: its blocks and the linear matrices inside them, found by inspection and one small table.

Orientation is settled here, once: a site's weight is always ``[out, in]``, whatever the module stores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.errors import UnsupportedModelError

# Name of a linear module inside a decoder block -> the matrices it holds, top to bottom.
LAYOUT: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
    "self_attn.out_proj": ("o",),
    "self_attn.qkv_proj": ("q", "k", "v"),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.gate_up_proj": ("gate", "up"),
    "mlp.down_proj": ("down",),
    "fc1": ("up",),
    "fc2": ("down",),
    "attn.c_attn": ("q", "k", "v"),
    "attn.c_proj": ("o",),
    "mlp.c_fc": ("up",),
    "mlp.c_proj": ("down",),
}
# Matrix type -> the input it shares with others.
INPUT_OF = {
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "o": "o",
    "gate": "mlp",
    "up": "mlp",
    "down": "down",
}
TYPES = tuple(INPUT_OF)
# Matrices on one input that can be stacked and factored as one (arXiv 2402.16319).
STACKS = {"qk": ("q", "k"), "gate_up": ("gate", "up")}


@dataclass(frozen=True)
class Site:
    """One compressible matrix.

    Attributes:
        name: unique name in the causal model; parts of a fused module end in ``.q``, ``.gate``, ...
        module: name of the module, relative to the base model (the one without the language-model head).
        layer: index of the decoder block.
        type: one of ``q k v o gate up down``.
        part: the type again where the module is fused, else None.
        rows: first and last-plus-one output row inside the module.
        out_features, in_features: shape of the matrix.
        bias: whether the original has a bias.
    """

    name: str
    module: str
    layer: int
    type: str
    part: str | None
    rows: tuple[int, int]
    out_features: int
    in_features: int
    bias: bool

    @property
    def input_group(self) -> str:
        """Key of the input this site shares with others of its block."""
        return INPUT_OF[self.type]

    @property
    def size(self) -> int:
        """Parameters of the dense matrix, bias not counted."""
        return self.out_features * self.in_features

    @property
    def members(self) -> tuple[Site, ...]:
        """The matrices of the model that it consists of: itself."""
        return (self,)


@dataclass(frozen=True)
class Stack(Site):
    """Matrices on one input, stacked along their outputs and compressed as one, ``[sum of out, in]``.

    ``module``, ``part`` and ``rows`` mean nothing here; ``type`` is a key of :data:`STACKS`.
    """

    stacked: tuple[Site, ...]

    @property
    def input_group(self) -> str:
        """Key of the input its matrices share."""
        return self.stacked[0].input_group

    @property
    def members(self) -> tuple[Site, ...]:
        """The matrices, top to bottom."""
        return self.stacked


def weight_of(module: nn.Module) -> Tensor:
    """The module's weight as ``[out, in]`` (a view; GPT-2's Conv1D stores the transpose)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


@dataclass(frozen=True)
class Structure:
    """The decoder of one model: where its blocks are, and every compressible matrix, in order of execution."""

    blocks: str
    num_layers: int
    sites: tuple[Site, ...]

    def of_layer(self, layer: int) -> list[Site]:
        """Sites of one decoder block."""
        return [site for site in self.sites if site.layer == layer]

    def modules(self, layer: int) -> dict[str, list[Site]]:
        """The model's matrices of one decoder block by the name of their module; a fused module holds several."""
        found: dict[str, list[Site]] = {}
        for site in self.of_layer(layer):
            for member in site.members:
                found.setdefault(member.module, []).append(member)
        return found

    def block_list(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder blocks of ``model``."""
        blocks = model.base_model.get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def name_in_block(self, site: Site) -> str:
        """Name of the site's module inside its decoder block."""
        return site.module.removeprefix(f"{self.blocks}.{site.layer}.")


def parameter_limit(keep: float, total: int) -> int:
    """The parameters that a keep ratio allows of ``total``, through the decimal the user wrote: 0.8 of 10 is 8."""
    return math.floor(Fraction(str(keep)) * total)


def prefix_of(model: PreTrainedModel) -> str:
    """What the names of the base model's parts begin with in the causal model: ``model.`` in most families."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def stacked(structure: Structure, dense_types: Iterable[str] = ()) -> Structure:
    """The same decoder with the groups of :data:`STACKS` as one site each, where all of a group may be factored."""
    dense = set(dense_types)
    sites: list[Site] = []
    for layer in range(structure.num_layers):
        of_type = {site.type: site for site in structure.of_layer(layer)}
        stacks: dict[str, Stack] = {}
        for kind, types in STACKS.items():
            if of_type.keys() >= set(types) and not dense & set(types):
                stack = _stack(kind, tuple(of_type[t] for t in types))
                stacks |= dict.fromkeys(types, stack)
        sites += dict.fromkeys(stacks.get(site.type, site) for site in structure.of_layer(layer))
    return Structure(structure.blocks, structure.num_layers, tuple(sites))


def _stack(kind: str, members: tuple[Site, ...]) -> Stack:
    first, out = members[0], sum(site.out_features for site in members)
    endings = "+".join(site.name.rpartition(".")[2] for site in members[1:])
    return Stack(
        name=f"{first.name}+{endings}",
        module=first.module,
        layer=first.layer,
        type=kind,
        part=first.part,
        rows=(0, out),
        out_features=out,
        in_features=first.in_features,
        bias=any(site.bias for site in members),
        stacked=members,
    )


def inspect_structure(model: PreTrainedModel) -> Structure:
    """Finds the decoder blocks and their matrices.

    Works on models on the meta device too: only names and shapes are read.

    Raises:
        UnsupportedModelError: no or several stacks of decoder blocks, a mixture of experts, or a matrix inside a
            block that the table does not know; the message names the module.
    """
    base = model.base_model
    stacks = list(_decoder_stacks(base))
    kind = model.config.model_type
    if not stacks:
        raise UnsupportedModelError(
            f"{type(base).__name__} (model type {kind}): no list of decoder blocks with known projection names found"
        )
    if len(stacks) > 1:
        raise UnsupportedModelError(
            f"{type(base).__name__} (model type {kind}): several block lists ({', '.join(n for n, _ in stacks)}); "
            "only decoder-only text models are supported"
        )
    blocks, stack = stacks[0]
    prefix = prefix_of(model)
    sites: list[Site] = []
    for layer, block in enumerate(stack):
        sites += _sites_of_block(model.config, block, f"{blocks}.{layer}", prefix, layer)
    return Structure(blocks, len(stack), tuple(sites))


def _decoder_stacks(base: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    inner: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or name.startswith(inner or ("\0",)):
            continue
        names = {child for child, _ in module[0].named_modules()}
        if any(child.startswith(("self_attn", "attn")) for child in names):
            inner += (name + ".",)
            yield name, module


def _sites_of_block(config: Any, block: nn.Module, where: str, prefix: str, layer: int) -> list[Site]:
    known = {name: module for name, module in block.named_modules() if name in LAYOUT}
    for name, _ in block.named_modules():
        if "expert" in name:
            raise UnsupportedModelError(f"{prefix}{where}.{name}: mixtures of experts are not supported yet")
    for name, parameter in block.named_parameters():
        owner = name.rpartition(".")[0]
        if parameter.ndim >= 2 and owner not in known:
            raise UnsupportedModelError(
                f"{prefix}{where}.{owner or name}: unknown matrix of shape {tuple(parameter.shape)} in a "
                "decoder block; add its name to the table in models/structure.py if it is a plain projection"
            )
    sites = []
    for name, module in known.items():
        if not isinstance(module, nn.Linear | Conv1D):
            raise UnsupportedModelError(f"{prefix}{where}.{name}: a {type(module).__name__}, not a Linear or Conv1D")
        types = LAYOUT[name]
        out_features, in_features = weight_of(module).shape
        start = 0
        for kind, rows in zip(types, _rows(config, module, types, out_features), strict=True):
            part = kind if len(types) > 1 else None
            sites.append(
                Site(
                    name=f"{prefix}{where}.{name}" + (f".{part}" if part else ""),
                    module=f"{where}.{name}",
                    layer=layer,
                    type=kind,
                    part=part,
                    rows=(start, start + rows),
                    out_features=rows,
                    in_features=in_features,
                    bias=module.bias is not None,
                )
            )
            start += rows
        if start != out_features:
            raise UnsupportedModelError(
                f"{prefix}{where}.{name}: {out_features} rows, but its parts {types} make {start}; unknown fused layout"
            )
    return sorted(sites, key=lambda site: TYPES.index(site.type))


def _rows(config: Any, module: nn.Module, types: tuple[str, ...], out_features: int) -> list[int]:
    """Rows of each part of a possibly fused projection."""
    if len(types) == 1:
        return [out_features]
    if types == ("gate", "up"):
        return [out_features // 2] * 2
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]


def meta_model(config: Any) -> PreTrainedModel:
    """The model of a configuration without weights: names and shapes only, in no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return skeleton
