"""One decoder block in compressed form: a copy of the original whose matrices are thin pairs."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.allocate.budget import Ranks
from bolaco.factorize.solver import Factors
from bolaco.layers import FollowerLinear, LeadLinear, LowRankLinear, SplitLinear
from bolaco.models.structure import Site, Structure


def compressed_block(
    model: PreTrainedModel,
    structure: Structure,
    layer: int,
    factors: Mapping[str, Factors],
    ranks: Ranks,
) -> nn.Module:
    """A copy of block ``layer`` at these ranks, on the CPU or the model's device as the original is.

    Tensors that do not change are shared with ``model``; modules that stay dense are kept as they are.
    """
    original = structure.block_list(model)[layer]
    block = copy.deepcopy(original, {id(p): p for p in (*original.parameters(), *original.buffers())})
    layers: dict[str, nn.Module] = {}
    for site in structure.of_layer(layer):
        rank = ranks.get(site.name)
        if rank is not None:
            layers |= _factored(site, factors[site.name], rank, structure.bias(model, site))
    for sites in structure.modules(layer).values():
        name = structure.name_in_block(sites[0])
        if any(site.name in layers for site in sites):
            parts = {
                site.type: layers[site.name]
                if site.name in layers
                else linear(structure.weight(model, site), structure.bias(model, site))
                for site in sites
            }
            _put(block, name, next(iter(parts.values())) if sites[0].part is None else SplitLinear(parts))
    return block


def trainable_copy(model: PreTrainedModel, structure: Structure, layer: int, block: nn.Module) -> nn.Module:
    """``block`` with nothing shared, every dense matrix a Linear, and fused ones in parts: ready to be changed."""
    for sites in structure.modules(layer).values():
        name = structure.name_in_block(sites[0])
        module = block.get_submodule(name)
        if isinstance(module, LowRankLinear | FollowerLinear | SplitLinear):
            continue
        parts: dict[str, nn.Module] = {
            site.type: linear(structure.weight(model, site), structure.bias(model, site)) for site in sites
        }
        _put(block, name, next(iter(parts.values())) if sites[0].part is None else SplitLinear(parts))
    return copy.deepcopy(block).to(model.device)


def restored_block(model: PreTrainedModel, structure: Structure, layer: int, state: Mapping[str, Tensor]) -> nn.Module:
    """The block whose :meth:`state_dict` this is; its matrices are factored or Linears.

    Raises:
        RuntimeError, KeyError: the state is of another block.
    """
    block = copy.deepcopy(structure.block_list(model)[layer])
    layers: dict[str, nn.Module] = {}
    for site in structure.of_layer(layer):
        places = {member.name: place_in_block(structure, member) for member in site.members}
        first = next(iter(places.values()))
        if f"{first}.reduce.weight" not in state:
            layers |= {n: linear(state[f"{at}.weight"], state.get(f"{at}.bias")) for n, at in places.items()}
            continue
        pairs = {n: (state[f"{at}.expand.weight"], state.get(f"{at}.expand.bias")) for n, at in places.items()}
        layers |= _on_one_input(state[f"{first}.reduce.weight"], pairs)
    for sites in structure.modules(layer).values():
        name = structure.name_in_block(sites[0])
        parts = {site.type: layers[site.name] for site in sites}
        _put(block, name, next(iter(parts.values())) if sites[0].part is None else SplitLinear(parts))
    block.load_state_dict(dict(state))
    return block.to(model.device)


def place_in_block(structure: Structure, site: Site) -> str:
    """Name inside its block of the layer that stands for one matrix in a compressed block."""
    name = structure.name_in_block(site)
    return name if site.part is None else f"{name}.parts.{site.part}"


def place(structure: Structure, block: nn.Module, site: Site, layer: nn.Module) -> None:
    """Puts ``layer`` where ``site`` is in ``block``."""
    name = structure.name_in_block(site)
    if site.part is None:
        _put(block, name, layer)
        return
    split = block.get_submodule(name)
    assert isinstance(split, SplitLinear)
    split.parts[site.part] = layer


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear of these tensors."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = _parameter(weight, weight)
    if bias is not None:
        made.bias = _parameter(bias, weight)
    return made


def low_rank_linear(
    expand: Tensor, reduce: Tensor, bias: Tensor | None, kind: type[LowRankLinear] = LowRankLinear
) -> LowRankLinear:
    """A LowRankLinear of these factors, ``[out, rank]`` and ``[rank, in]``."""
    with torch.device("meta"):
        made = kind(reduce.shape[1], expand.shape[0], len(reduce), bias is not None)
    made.reduce.weight = _parameter(reduce, reduce)
    made.expand.weight = _parameter(expand, reduce)
    if bias is not None:
        made.expand.bias = _parameter(bias, reduce)
    return made


def _factored(site: Site, factors: Factors, rank: int, bias: Tensor | None) -> dict[str, nn.Module]:
    """A layer for each of the site's matrices, by name; ``bias`` is the original's."""
    bias = factors.bias(rank, None if bias is None else bias.cpu())
    rows = [member.out_features for member in site.members]
    expands = factors.expand_t[:rank].T.split(rows)
    biases = [None] * len(rows) if bias is None else bias.split(rows)
    names = [member.name for member in site.members]
    pairs = dict(zip(names, zip(expands, biases, strict=True), strict=True))
    return _on_one_input(factors.reduce[:rank], pairs)


def _on_one_input(reduce: Tensor, pairs: Mapping[str, tuple[Tensor, Tensor | None]]) -> dict[str, nn.Module]:
    """Factored layers with one input factor, from the output factor and the bias of each; the first one owns it."""
    (name, (expand, bias)), *others = pairs.items()
    lead = low_rank_linear(expand, reduce, bias, LeadLinear if others else LowRankLinear)
    layers: dict[str, nn.Module] = {name: lead}
    for name, (expand, bias) in others:
        with torch.device("meta"):
            follower = FollowerLinear(reduce.shape[1], len(expand), len(reduce), bias is not None)
        follower.expand.weight = _parameter(expand, reduce)
        if bias is not None:
            follower.expand.bias = _parameter(bias, reduce)
        follower.follow(lead)
        layers[name] = follower
    return layers


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(like.device, like.dtype).contiguous(), requires_grad=False)


def _put(block: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(block.get_submodule(parent), attribute, layer)
