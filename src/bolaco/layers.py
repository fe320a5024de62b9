"""Layers of a compressed model. This file is also what a checkpoint carries as its modelling code.

It imports torch and transformers only, so that a compressed folder loads where bolaco is not installed. A factored
matrix is two plain ``nn.Linear`` children, which quantizers, adapters and exporters recognise.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class LowRankLinear(nn.Module):
    """``y = expand(reduce(x))``: a matrix of the given rank, stored as two thin ones; bias on the second."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.expand = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        return self.expand(self.reduce(x))

    def dense(self) -> Tensor:
        """The product of the factors, ``[out, in]``."""
        return self.expand.weight @ self.reduce.weight

    def extra_repr(self) -> str:
        """Shape and rank, for printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class SplitLinear(nn.Module):
    """A fused projection (qkv, gate_up) whose parts are separate layers on the same input, outputs side by side."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., sum of the parts' out]``."""
        return torch.cat([part(x) for part in self.parts.values()], dim=-1)


def build_layer(in_features: int, entry: dict[str, Any]) -> nn.Module:
    """A layer from its entry in ``config.lowrank["matrices"]``: ``{"out", "rank", "bias"}`` or ``{"parts"}``."""
    if "parts" in entry:
        return SplitLinear({name: build_layer(in_features, part) for name, part in entry["parts"].items()})
    if entry["rank"] is None:
        return nn.Linear(in_features, entry["out"], bias=entry["bias"])
    return LowRankLinear(in_features, entry["out"], entry["rank"], entry["bias"])


def install_layers(base_model: nn.Module, matrices: dict[str, Any]) -> None:
    """Replaces the named projections of a base model by the layers that ``matrices`` describes."""
    for name, entry in matrices.items():
        parent_name, _, attribute = name.rpartition(".")
        parent = base_model.get_submodule(parent_name)
        old = getattr(parent, attribute)
        in_features: int = old.nx if isinstance(old, Conv1D) else old.in_features
        setattr(parent, attribute, build_layer(in_features, entry))


class LowRankMixin:
    """Put before a transformers model class: builds it, then swaps in the layers of ``config.lowrank``."""

    base_model: nn.Module

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(getattr(config, "lowrank", None), dict):
            raise ValueError(
                f"config.json of a {config.model_type} model must have a 'lowrank' entry; this one has none"
            )
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install_layers(self.base_model, config.lowrank["matrices"])
