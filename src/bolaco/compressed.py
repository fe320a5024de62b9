"""One decoder block in compressed form: a copy of the original whose matrices are thin pairs."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.allocate.budget import Ranks
from bolaco.factorize.solver import Factors
from bolaco.layers import LowRankLinear, SplitLinear
from bolaco.models.structure import Site, Structure


def modules_of(structure: Structure, layer: int) -> dict[str, list[Site]]:
    """Sites of a block by the name of their module inside it."""
    found: dict[str, list[Site]] = {}
    for site in structure.of_layer(layer):
        found.setdefault(structure.name_in_block(site), []).append(site)
    return found


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
    for name, sites in modules_of(structure, layer).items():
        if any(ranks.get(site.name) is not None for site in sites):
            parts = {site.type: _layer(model, structure, site, factors, ranks.get(site.name)) for site in sites}
            _put(block, name, next(iter(parts.values())) if sites[0].part is None else SplitLinear(parts))
    return block


def trainable_copy(model: PreTrainedModel, structure: Structure, layer: int, block: nn.Module) -> nn.Module:
    """``block`` with nothing shared, every dense matrix a Linear, and fused ones in parts: ready to be changed."""
    for name, sites in modules_of(structure, layer).items():
        module = block.get_submodule(name)
        if isinstance(module, LowRankLinear | SplitLinear):
            continue
        parts: dict[str, nn.Module] = {
            site.type: linear(structure.weight(model, site), structure.bias(model, site)) for site in sites
        }
        _put(block, name, next(iter(parts.values())) if sites[0].part is None else SplitLinear(parts))
    return copy.deepcopy(block).to(model.device)


def restored_block(model: PreTrainedModel, structure: Structure, layer: int, state: Mapping[str, Tensor]) -> nn.Module:
    """The block whose :meth:`state_dict` this is; its matrices are LowRankLinears and Linears.

    Raises:
        RuntimeError, KeyError: the state is of another block.
    """
    block = copy.deepcopy(structure.block_list(model)[layer])
    for name, sites in modules_of(structure, layer).items():
        parts: dict[str, nn.Module] = {}
        for site in sites:
            where = name if site.part is None else f"{name}.parts.{site.part}"
            if f"{where}.weight" in state:
                parts[site.type] = linear(state[f"{where}.weight"], state.get(f"{where}.bias"))
            else:
                pair = state[f"{where}.expand.weight"], state[f"{where}.reduce.weight"]
                parts[site.type] = low_rank_linear(*pair, state.get(f"{where}.expand.bias"))
        _put(block, name, next(iter(parts.values())) if sites[0].part is None else SplitLinear(parts))
    block.load_state_dict(dict(state))
    return block.to(model.device)


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


def low_rank_linear(expand: Tensor, reduce: Tensor, bias: Tensor | None) -> LowRankLinear:
    """A LowRankLinear of these factors, ``[out, rank]`` and ``[rank, in]``."""
    with torch.device("meta"):
        made = LowRankLinear(reduce.shape[1], expand.shape[0], len(reduce), bias is not None)
    made.reduce.weight = _parameter(reduce, reduce)
    made.expand.weight = _parameter(expand, reduce)
    if bias is not None:
        made.expand.bias = _parameter(bias, reduce)
    return made


def _layer(
    model: PreTrainedModel, structure: Structure, site: Site, factors: Mapping[str, Factors], rank: int | None
) -> nn.Module:
    bias = structure.bias(model, site)
    if rank is None:
        return linear(structure.weight(model, site), bias)
    item = factors[site.name]
    bias = item.bias(rank, None if bias is None else bias.cpu())
    return low_rank_linear(item.expand_t[:rank].T, item.reduce[:rank], bias)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(like.device, like.dtype).contiguous(), requires_grad=False)


def _put(block: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(block.get_submodule(parent), attribute, layer)
