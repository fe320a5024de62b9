"""One decoder block in compressed form: a copy of the original whose matrices are thin pairs.

This is the form in which matrices are fitted and trained; a :class:`bolaco.storage.storage.Storage` packs them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bolaco.factorize.solver import Factors
from bolaco.layers import FactoredLinear, FollowerLinear, LeadLinear, LowRankLinear, SplitLinear, put_module
from bolaco.models.structure import Site, Structure
from bolaco.models.subject import Subject
from bolaco.storage.budget import Ranks


def compressed_block(subject: Subject, layer: int, factors: Mapping[str, Factors], ranks: Ranks) -> nn.Module:
    """A copy of block ``layer`` at these ranks, on the CPU or the model's device as the original is.

    Tensors that do not change are shared with the subject's model; modules that stay dense are kept as they are.
    """
    structure = subject.structure
    original = structure.block_modules(subject.model)[layer]
    block = copy.deepcopy(original, {id(p): p for p in (*original.parameters(), *original.buffers())})
    layers: dict[str, nn.Module] = {}
    for site in structure.of_layer(layer):
        rank = ranks.get(site.name)
        if rank is not None:
            layers |= _factored(site, factors[site.name], rank, subject.bias(site))
    for sites in structure.modules(layer).values():
        if any(site.name in layers for site in sites):
            parts = {
                site.name: layers.get(site.name) or linear(subject.weight(site), subject.bias(site)) for site in sites
            }
            _put_parts(structure, block, sites, parts)
    return block


def trainable_copy(subject: Subject, layer: int, block: nn.Module) -> nn.Module:
    """``block`` with nothing shared, every dense matrix a Linear, and fused ones in parts: ready to be changed."""
    structure = subject.structure
    for sites in structure.modules(layer).values():
        module = block.get_submodule(structure.name_in_block(sites[0]))
        if not isinstance(module, FactoredLinear | SplitLinear):
            parts = {site.name: linear(subject.weight(site), subject.bias(site)) for site in sites}
            _put_parts(structure, block, sites, parts)
    return copy.deepcopy(block).to(subject.model.device)


def restored_block(subject: Subject, layer: int, state: Mapping[str, Tensor]) -> nn.Module:
    """The block whose :meth:`state_dict` this is; its matrices are factored or Linears.

    Raises:
        RuntimeError, KeyError: the state is of another block.
    """
    structure = subject.structure
    block = copy.deepcopy(structure.block_modules(subject.model)[layer])
    layers: dict[str, nn.Module] = {}
    for site in structure.of_layer(layer):
        places = {member: place_in_block(structure, member) for member in site.members}
        first = next(iter(places.values()))
        if f"{first}.reduce.weight" not in state:
            layers |= {m.name: linear(state[f"{at}.weight"], state.get(f"{at}.bias")) for m, at in places.items()}
            continue
        pairs = {m: (state[f"{at}.expand.weight"], state.get(f"{at}.expand.bias")) for m, at in places.items()}
        layers |= _on_one_input(state[f"{first}.reduce.weight"], pairs)
    for sites in structure.modules(layer).values():
        _put_parts(structure, block, sites, layers)
    block.load_state_dict(dict(state))
    return block.to(subject.model.device)


def place_in_block(structure: Structure, site: Site) -> str:
    """Name inside its block of the layer that stands for one matrix in a compressed block."""
    name = structure.name_in_block(site)
    return name if site.part is None else f"{name}.parts.{site.part}"


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
    pairs = dict(zip(site.members, zip(expands, biases, strict=True), strict=True))
    return _on_one_input(factors.reduce[:rank], pairs)


def _on_one_input(reduce: Tensor, pairs: Mapping[Site, tuple[Tensor, Tensor | None]]) -> dict[str, nn.Module]:
    """Factored layers with one input factor, from the output factor and the bias of each; the first one owns it."""
    (site, (expand, bias)), *others = pairs.items()
    lead = low_rank_linear(expand, reduce, bias, LeadLinear if others else LowRankLinear)
    lead_name = site.module if site.part is None else f"{site.module}.parts.{site.part}"
    layers: dict[str, nn.Module] = {site.name: lead}
    for member, (expand, bias) in others:
        with torch.device("meta"):
            follower = FollowerLinear(reduce.shape[1], len(expand), len(reduce), bias is not None, lead_name)
        follower.expand.weight = _parameter(expand, reduce)
        if bias is not None:
            follower.expand.bias = _parameter(bias, reduce)
        follower.follow(lead)
        layers[member.name] = follower
    return layers


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(like.device, like.dtype).contiguous(), requires_grad=False)


def _put_parts(structure: Structure, block: nn.Module, sites: list[Site], layers: Mapping[str, nn.Module]) -> None:
    """Puts the layers of one module's matrices, by site name, in its place."""
    parts = {site.type: layers[site.name] for site in sites}
    whole = layers[sites[0].name] if sites[0].part is None else SplitLinear(parts)
    put_module(block, structure.name_in_block(sites[0]), whole)
