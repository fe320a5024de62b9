"""What only a forward pass shows: which matrices are called, which share an input, and how blocks can be run.

A few tokens are enough. What a matrix is called with is compared as a tensor, not by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.errors import UnsupportedModelError
from bolaco.models.labels import INPUT_OF, TYPES
from bolaco.models.structure import Kept, Site, Structure, trunk, vocabulary
from bolaco.models.walk import agrees, check_walk

# Sequences and positions that are looked at, at most.
_SEQUENCES, _LENGTH = 3, 48


def observed(model: PreTrainedModel, structure: Structure, tokens: Tensor | None = None) -> Structure:
    """The structure with what a forward pass over a few tokens shows.

    Matrices that are not called, or that are not what their module computes, become part of what stays dense; inputs
    that are shared get one group; and ``walk`` says whether blocks can be run on their own, which is tried.

    Args:
        model: with its weights, in evaluation mode; fused experts are taken apart.
        structure: what :func:`bolaco.models.find.inspect_structure` found.
        tokens: ``[sequences, length]`` of the text; any tokens if there is none.

    Raises:
        UnsupportedModelError: the forward pass fails, or no matrix is left.
    """
    if tokens is None or not tokens.numel():
        size = vocabulary(model)
        tokens = (torch.arange(_SEQUENCES * 16) * 7 % size).view(_SEQUENCES, 16)
    tokens = tokens[:_SEQUENCES, :_LENGTH]
    calls = _Calls(model, structure)
    try:
        calls.run(tokens)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        what = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"{type(model).__name__} ({model.config.model_type}) cannot be run on token ids alone: {what}"
        ) from error
    found = _with_groups(structure, calls)
    if not found.sites:
        raise UnsupportedModelError(
            f"{type(model).__name__} ({model.config.model_type}): none of its matrices is called in a forward pass"
        )
    active = tuple(_active(found, layer, calls, tokens.numel()) for layer in range(found.num_layers))
    return replace(found, walk=check_walk(model, found, tokens), active=active)


def _active(structure: Structure, layer: int, calls: _Calls, tokens: int) -> float:
    """The share of a block's experts that a token is sent to; 1 without experts."""
    experts = [site for site in structure.of_layer(layer) if site.expert is not None]
    if not experts:
        return 1.0
    kind = experts[0].type
    same = [site for site in experts if site.type == kind]
    return sum(calls.rows.get(site.module, 0) for site in same) / (tokens * len(same))


class _Calls:
    """Records the calls of all candidate matrices in a forward pass."""

    def __init__(self, model: PreTrainedModel, structure: Structure) -> None:
        self.model, self.structure = model, structure
        # By module: what it was called with, as the number of an input, in order.
        self.inputs: dict[str, list[int]] = defaultdict(list)
        self.order: dict[str, int] = {}
        # By module: the vectors that it was called with, without those that are zero.
        self.rows: dict[str, int] = {}
        self.wrong: set[str] = set()
        self.read: set[str] = set()
        self._alive: list[Tensor] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def run(self, tokens: Tensor) -> None:
        base = self.model.base_model
        names = dict.fromkeys(site.module for site in self.structure.sites)
        modules = {name: base.get_submodule(name) for name in names}
        handles = [module.register_forward_hook(self._hook(name)) for name, module in modules.items()]
        try:
            with torch.no_grad(), _watched(modules) as self.read:
                trunk(self.model)(input_ids=tokens.to(self.model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self._alive.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                self.wrong.add(name)
                return
            x = args[0]
            self.rows[name] = self.rows.get(name, 0) + int(x.reshape(-1, x.shape[-1]).any(dim=-1).sum())
            # Tensors are kept alive, so that one place in memory is one tensor.
            self._alive.append(x)
            key = (x.data_ptr(), x.numel(), x.shape[-1], x.stride(-1), x._version if not x.is_inference() else 0)
            self.inputs[name].append(self._known.setdefault(key, len(self._known)))
            self.order.setdefault(name, len(self.order))
            bias = getattr(module, "bias", None)
            weight = module._parameters["weight"]
            assert weight is not None
            plain = weight.T if isinstance(module, Conv1D) else weight
            expected = F.linear(x, plain.to(x.dtype), None if bias is None else bias.to(x.dtype))
            if expected.shape != output.shape or not agrees(output, expected):
                self.wrong.add(name)

        return hook


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Finds out while it lasts which modules' weights are read from outside; gives the names of those.

    A fused kernel, or code that rescales weights, needs the weight itself, which a factored layer does not have.
    """
    read: set[str] = set()
    classes = {name: type(module) for name, module in modules.items()}
    inside: list[nn.Module] = []

    def watching(name: str, cls: type[nn.Module]) -> type[nn.Module]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            inside.append(self)
            try:
                return cls.forward(self, *args, **kwargs)
            finally:
                inside.pop()

        def getattr_(self: nn.Module, key: str) -> Any:
            if key == "weight" and self not in inside:
                read.add(name)
            return cls.__getattr__(self, key)

        return type(cls.__name__, (cls,), {"forward": forward, "__getattr__": getattr_})

    for name, module in modules.items():
        module.__class__ = watching(name, classes[name])
    try:
        yield read
    finally:
        for name, module in modules.items():
            module.__class__ = classes[name]


def _with_groups(structure: Structure, calls: _Calls) -> Structure:
    """Sites that are called, in the order in which their inputs come, with their groups."""
    # Experts are called as their router pleases: what one of a block's shows holds for all of that type.
    alive = {site.tie for site in structure.sites if site.tie and site.module in calls.inputs}
    used: list[Site] = []
    kept: dict[tuple[str, str], int] = {}
    for site in structure.sites:
        reason = "not a plain product" if site.module in calls.wrong else ""
        if site.module in calls.read:
            reason = "weight read by its parent"
        if not reason and site.module not in calls.inputs and site.tie not in alive:
            reason = "not called"
        if reason:
            key = (structure.name_in_block(site), reason)
            kept[key] = kept.get(key, 0) + site.size
        else:
            used.append(site)
    groups = _groups(used, calls)
    sites = [replace(site, group=groups[site.name]) for site in used]
    first: dict[tuple[int, str], int] = {}
    for site in used:
        place = (site.layer, groups[site.name])
        call = calls.order.get(site.module, len(calls.order))
        first[place] = min(first.get(place, call), call)
    rank = {kind: index for index, kind in enumerate(TYPES)}
    sites.sort(
        key=lambda s: (s.layer, first[s.layer, s.group], rank.get(s.type, len(rank)), calls.order.get(s.module, 0))
    )
    more = tuple(Kept(name, size, reason) for (name, reason), size in kept.items())
    return replace(structure, sites=tuple(sites), kept=structure.kept + more)


def _groups(sites: list[Site], calls: _Calls) -> dict[str, str]:
    """The input group of every site, by name: those with the same inputs have one key."""
    members: dict[tuple[Any, ...], list[Site]] = defaultdict(list)
    for site in sites:
        inputs = calls.inputs.get(site.module)
        seen = tuple(inputs) if inputs else (site.input_group, site.expert)
        members[site.layer, site.in_features, *seen].append(site)
    groups: dict[str, str] = {}
    for together in members.values():
        own = {site.input_group for site in together}
        # Where the types say the same, their word for it.
        key = own.pop() if len(own) == 1 else next((s.input_group for s in together if s.type in INPUT_OF), min(own))
        groups |= {site.name: key for site in together}
    taken: dict[tuple[int, str], tuple[Any, ...]] = {}
    for place, together in members.items():
        key = groups[together[0].name]
        if taken.setdefault((together[0].layer, key), place) != place:
            # Types that usually share an input, and do not here.
            groups |= {site.name: f"{key} of {together[0].type}" for site in together}
    return groups
