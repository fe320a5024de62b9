"""Mixtures of experts whose matrices are layers: the tokens of each expert side by side, as the router sent them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bolaco.layers.base import (
    LARGEST,
    Entry,
    build_layer,
    builds,
    grouped_linear,
    inner_in,
    named_parts,
    parts_in,
    size_in,
)

MOST_EXPERTS = 2**16


class EachExpert(nn.ModuleList):
    """One layer for each expert; called with tokens sorted by expert, and how many each one has."""

    kind = "each-expert"

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Maps ``[sum of sizes, in]`` to ``[sum of sizes, out]``; an expert without tokens is not called."""
        runs = [layer(run) for layer, run in zip(self, x.split(sizes), strict=True) if len(run)]
        if runs:
            return torch.cat(runs)
        # Zero tokens through any of them: for the shape of the result.
        none: Tensor = self[0](x)
        return none

    def entry(self) -> Entry:
        """Its entry in the configuration."""
        parts = [_entry_of(layer) for layer in self]
        return {"kind": self.kind, "in": _in_features(self[0]), "parts": parts}


class GroupedExperts(nn.Module):
    """The layers of all experts in one: every tensor has one more dimension, the expert's number.

    Its parameters and buffers are those of ``layer``, stacked. Layers that have a method ``grouped`` compute all
    experts at once; the others are called one expert after the other.
    """

    kind = "grouped-experts"

    def __init__(self, layer: nn.Module, experts: int) -> None:
        super().__init__()
        self.layer, self.experts = layer, experts
        self._one = _entry_of(layer)
        for module in layer.modules():
            for name, value in [*module.named_parameters(recurse=False)]:
                setattr(module, name, nn.Parameter(value.new_empty(experts, *value.shape), requires_grad=False))
            for name, buffer in [*module.named_buffers(recurse=False)]:
                setattr(module, name, buffer.detach().expand(experts, *buffer.shape).clone())

    @classmethod
    def of(cls, layers: list[nn.Module]) -> "GroupedExperts":
        """From the layers of the experts, which are alike in everything but their numbers."""
        made = cls(copy.deepcopy(layers[0]), len(layers))
        states = [layer.state_dict() for layer in layers]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        made.layer.load_state_dict(stacked, assign=True)
        return made.requires_grad_(False)

    def expert(self, index: int) -> nn.Module:
        """The layer of one expert, by itself."""
        with torch.device("meta"):
            alone = build_layer(_in_features(self.layer), self._one)
        alone.load_state_dict({k: v[index] for k, v in self.layer.state_dict().items()}, assign=True)
        return alone.requires_grad_(False)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Maps ``[sum of sizes, in]`` to ``[sum of sizes, out]``."""
        if isinstance(self.layer, nn.Linear):
            return grouped_linear(x, sizes, self.layer.weight, self.layer.bias)
        if hasattr(self.layer, "grouped"):
            mapped: Tensor = self.layer.grouped(x, sizes)  # type: ignore[operator]
            return mapped
        state = dict(self.layer.state_dict(keep_vars=True))
        runs = [
            functional_call(self.layer, {name: value[i] for name, value in state.items()}, (run,))
            for i, run in enumerate(x.split(sizes))
            if len(run) or i == 0
        ]
        return torch.cat(runs)

    def entry(self) -> Entry:
        """Its entry in the configuration."""
        return {
            "kind": self.kind,
            "in": _in_features(self.layer),
            "experts": self.experts,
            "layer": self._one,
        }


def _in_features(layer: nn.Module) -> int:
    return int(layer.in_features)  # type: ignore[arg-type]


def _entry_of(layer: nn.Module) -> Entry:
    if isinstance(layer, nn.Linear):
        return {"kind": "dense", "out": layer.out_features, "bias": layer.bias is not None}
    entry: Entry = layer.entry()  # type: ignore[operator]
    return entry


class RoutedExperts(nn.Module):
    """Experts of transformers' common form: called with hidden states, the experts of each token, and their weights.

    ``rule`` is the module it takes the place of, without its matrices: it knows the activation, how gate and up are
    told apart, and a norm behind the experts if the family has one. The attributes ``gate_up_proj`` or ``up_proj``,
    and ``down_proj``, are :class:`EachExpert` or :class:`GroupedExperts`.
    """

    kind = "experts"

    def __init__(self, rule: nn.Module, matrices: dict[str, nn.Module], experts: int) -> None:
        super().__init__()
        self.rule, self.experts, self.names = rule, experts, tuple(matrices)
        for name, layers in matrices.items():
            setattr(self, name, layers)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Maps ``[tokens, d]`` to ``[tokens, d]``; indices and weights are ``[tokens, k]``."""
        tokens, k = top_k_index.shape
        if tokens == 0:
            return torch.zeros_like(hidden_states)
        order = torch.argsort(top_k_index.reshape(-1), stable=True)
        sizes: list[int] = torch.bincount(top_k_index.reshape(-1), minlength=self.experts).tolist()
        own = sum(sizes[: self.experts])  # numbers above belong to experts without matrices
        x = hidden_states[order // k]
        y = self._mapped(x[:own], sizes[: self.experts])
        if own < len(x):
            rest = x[own:] if hasattr(self.rule, "identity_expert") else torch.zeros_like(x[own:])
            y = torch.cat([y, rest.to(y.dtype)])
        weighted = y * top_k_weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return weighted[back].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)

    def _mapped(self, x: Tensor, sizes: list[int]) -> Tensor:
        first, last = (getattr(self, name) for name in self.names)
        y = first(x, sizes)
        if getattr(self.rule, "has_gate", True):
            gate = getattr(self.rule, "_apply_gate", None)
            y = _gated(self.rule.act_fn, y) if gate is None else gate(y)
        else:
            y = self.rule.act_fn(y)  # type: ignore[operator]
        y = last(y, sizes)
        if getattr(self.rule, "has_post_expert_norm", False):
            y = self.rule.post_expert_norm(y)  # type: ignore[operator]
        mapped: Tensor = y
        return mapped

    def entry(self) -> Entry:
        """Its entry in the configuration."""
        parts = [{"name": name} | getattr(self, name).entry() for name in self.names]
        return {"kind": self.kind, "experts": self.experts, "parts": parts}


class SortedExperts(RoutedExperts):
    """Experts that are called with as many tokens for each of them, one expert after the other (Llama 4)."""

    kind = "sorted-experts"

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Maps ``[experts * tokens, d]`` to the same shape."""
        return self._mapped(hidden_states, [len(hidden_states) // self.experts] * self.experts).view_as(hidden_states)


def _gated(activation: Any, both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    gated: Tensor = activation(gate) * up
    return gated


def rule_of(module: nn.Module) -> nn.Module:
    """A copy of an experts module without its matrices; everything else is shared."""
    rule = copy.copy(module)
    rule._parameters = {name: p for name, p in module._parameters.items() if p is None or p.ndim < 2}
    return rule


def _matrices(module: nn.Module, entry: Entry) -> dict[str, nn.Module]:
    parts = named_parts(entry)
    if len(parts) != 2 or not all(hasattr(module, name) for name in parts):
        raise ValueError(f"parts must be two matrices of a {type(module).__name__}, not {', '.join(parts)[:80]}")
    return {name: build_layer(size_in(part, "in", LARGEST), part) for name, part in parts.items()}


@builds(EachExpert.kind)
def _each(in_features: int, entry: Entry) -> EachExpert:
    return EachExpert([build_layer(in_features, part) for part in parts_in(entry)])


@builds(GroupedExperts.kind)
def _grouped(in_features: int, entry: Entry) -> GroupedExperts:
    return GroupedExperts(build_layer(in_features, inner_in(entry)), size_in(entry, "experts", MOST_EXPERTS))


@builds(RoutedExperts.kind, of_module=True)
def _routed(module: nn.Module, entry: Entry) -> RoutedExperts:
    return RoutedExperts(rule_of(module), _matrices(module, entry), size_in(entry, "experts", MOST_EXPERTS))


@builds(SortedExperts.kind, of_module=True)
def _sorted(module: nn.Module, entry: Entry) -> SortedExperts:
    return SortedExperts(rule_of(module), _matrices(module, entry), size_in(entry, "experts", MOST_EXPERTS))
