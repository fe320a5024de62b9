"""Layers of a compressed model. This file is also what a checkpoint carries as its modelling code.

It imports torch and transformers only, so that a compressed folder loads where bolaco is not installed. A factored
matrix is two plain ``nn.Linear`` children, which quantizers, adapters and exporters recognise.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM
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

    def reduced(self, x: Tensor) -> Tensor:
        """``reduce(x)``, ``[..., rank]``."""
        reduced: Tensor = self.reduce(x)
        return reduced

    def dense(self) -> Tensor:
        """The product of the factors, ``[out, in]``."""
        return self.expand.weight @ self.reduce.weight

    def extra_repr(self) -> str:
        """Shape and rank, for printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LeadLinear(LowRankLinear):
    """The first of two factored matrices that share ``reduce``, as q and k do: keeps what it reduced for the other.

    What is kept belongs to one input tensor, for one use; it is no part of the module's state.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__(in_features, out_features, rank, bias)
        self._kept: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        reduced = self.reduce(x)
        self._kept = (x, reduced)
        return self.expand(reduced)

    def reduced(self, x: Tensor) -> Tensor:
        """``reduce(x)``, ``[..., rank]``: what was kept if it is of this very tensor, else computed; none is kept."""
        kept, self._kept = self._kept, None
        return kept[1] if kept is not None and kept[0] is x else self.reduce(x)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}


class FollowerLinear(nn.Module):
    """The second of two matrices that share ``reduce``: it belongs to the first, ``lead``; only ``expand`` is its own.

    Both called with the same tensor, one after the other, the shared product is computed once; called with another
    tensor, or without the lead having been called, it computes that itself (arXiv 2402.16319).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.expand = nn.Linear(rank, out_features, bias=bias)
        self._lead: tuple[LeadLinear, ...] = ()

    @property
    def lead(self) -> LeadLinear:
        """The other matrix."""
        return self._lead[0]

    def follow(self, module: nn.Module) -> None:
        """Takes ``module`` for its lead; ValueError if it is no :class:`LeadLinear` of this rank."""
        if not isinstance(module, LeadLinear) or module.rank != self.rank:
            raise ValueError(f"a factored matrix of rank {self.rank} cannot share the factor of {module}")
        # In a tuple, so that it is not registered as a child: its parameters are counted and stored once.
        self._lead = (module,)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        return self.expand(self.reduced(x))

    def reduced(self, x: Tensor) -> Tensor:
        """The lead's ``reduce(x)``, ``[..., rank]``."""
        return self.lead.reduced(x)

    def dense(self) -> Tensor:
        """The product of the factors, ``[out, in]``."""
        return self.expand.weight @ self.lead.reduce.weight

    def extra_repr(self) -> str:
        """Shape and rank, for printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotedLinear(nn.Module):
    """A matrix of the given rank, stored as some of its rows (or columns) and what makes the others from them.

    ``side="rows"``: ``pivot`` computes r outputs, ``rest`` the others from those, ``order`` puts them in place.
    ``side="columns"``: ``order`` puts r inputs first, ``rest`` folds the others into them, ``pivot`` maps them on.
    r (in + out - r) parameters, never more than the dense matrix (arXiv 2501.19090).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, side: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.side = in_features, out_features, rank, side
        if side == "rows":
            self.pivot = nn.Linear(in_features, rank, bias=bias)
            self.rest = nn.Linear(rank, out_features - rank, bias=bias)
        else:
            self.rest = nn.Linear(in_features - rank, rank, bias=False)
            self.pivot = nn.Linear(rank, out_features, bias=bias)
        size = out_features if side == "rows" else in_features
        self.register_buffer("order", torch.arange(size, dtype=torch.int32))
        self.order: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        if self.side == "rows":
            first = self.pivot(x)
            return torch.cat([first, self.rest(first)], dim=-1).index_select(-1, self.order)
        x = x.index_select(-1, self.order)
        return self.pivot(x[..., : self.rank] + self.rest(x[..., self.rank :]))

    def dense(self) -> Tensor:
        """The matrix, ``[out, in]``."""
        if self.side == "rows":
            kept = self.pivot.weight
            return torch.cat([kept, self.rest.weight @ kept])[self.order]
        kept = self.pivot.weight
        return torch.cat([kept, kept @ self.rest.weight], dim=1)[:, torch.argsort(self.order)]

    def dense_bias(self) -> Tensor | None:
        """The bias, ``[out]``, or None."""
        if self.side == "rows" and self.pivot.bias is not None:
            made = self.rest.weight @ self.pivot.bias + self.rest.bias
            return torch.cat([self.pivot.bias, made])[self.order]
        return self.pivot.bias

    def extra_repr(self) -> str:
        """Shape, rank and side, for printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, side={self.side}"


class SketchLinear(nn.Module):
    """A Linear whose weights are entries of small tables: ``W[i, j] = lut[i, j // size, code[i, j]]``.

    ``lut`` ``[out, groups, 2**bits]`` has a table for each row and each run of ``size = ceil(in / groups)`` columns.
    ``codes`` holds the codes of a row in ``bits`` bytes for every eight (arXiv 2410.06364). The weight is made anew
    in each pass, backward too, so that training holds no copy of it.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, groups: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.groups = in_features, out_features, bits, groups
        self.size = -(-in_features // groups)
        self.lut = nn.Parameter(torch.zeros(out_features, groups, 2**bits))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("codes", pack(torch.zeros(out_features, groups * self.size, dtype=torch.uint8), bits))
        self.codes: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight, ``[out, in]``."""
        indices = unpack(self.codes, self.bits)[:, : self.groups * self.size].long()
        found = self.lut.gather(2, indices.view(self.out_features, self.groups, self.size))
        return found.view(self.out_features, self.groups * self.size)[:, : self.in_features]

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        if not torch.is_grad_enabled():
            return self._product(x)
        made: Tensor = checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=False)
        return made

    def extra_repr(self) -> str:
        """Shape and code length, for printing a model."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, groups={self.groups}"


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[rows, n]`` below ``2**bits`` (bits up to 4) as bytes ``[rows, bits * ceil(n / 8)]``, first lowest."""
    eights = F.pad(codes.int(), (0, -codes.shape[1] % 8)).view(len(codes), -(-codes.shape[1] // 8), 8)
    words = (eights << (bits * torch.arange(8, dtype=torch.int32, device=codes.device))).sum(-1, dtype=torch.int64)
    found = (words[..., None] >> (8 * torch.arange(bits, device=codes.device))) & 255
    return found.to(torch.uint8).flatten(1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """What :func:`pack` packed, ``[rows, 8 * ceil(n / 8)]``: zeros follow the last code."""
    places = torch.arange(8, dtype=torch.int32, device=packed.device)
    eights = packed.view(len(packed), packed.shape[1] // bits, bits).int()
    words = (eights << (8 * places[:bits])).sum(-1, dtype=torch.int32)
    return ((words[..., None] >> (bits * places)) & (2**bits - 1)).to(torch.uint8).flatten(1)


def sketched(layer: nn.Module, bits: int, groups: int) -> nn.Module:
    """``layer`` with every Linear in it, or itself, as a :class:`SketchLinear` of that shape, without content."""
    if isinstance(layer, nn.Linear):
        return SketchLinear(layer.in_features, layer.out_features, layer.bias is not None, bits, groups)
    for name, child in layer.named_children():
        setattr(layer, name, sketched(child, bits, groups))
    return layer


class SplitLinear(nn.Module):
    """A fused projection (qkv, gate_up) whose parts are separate layers on the same input, outputs side by side."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., sum of the parts' out]``."""
        return torch.cat([part(x) for part in self.parts.values()], dim=-1)


def build_layer(in_features: int, entry: dict[str, Any]) -> nn.Module:
    """A layer from its entry in ``config.lowrank["matrices"]``: ``{"out", "rank", "bias"}`` or ``{"parts"}``.

    A ``"side"`` (``rows`` or ``columns``) makes a factored matrix pivoted; ``"bits"`` and ``"groups"`` code it.
    ``"lead"`` says that another one shares its input factor, which names it under ``"shares"``;
    :func:`install_layers` brings the two together.
    Parts are a list, top to bottom, each with its ``"name"``: transformers sorts the keys of a configuration.
    """
    if "parts" in entry:
        return SplitLinear({part["name"]: build_layer(in_features, part) for part in entry["parts"]})
    if "bits" in entry:
        plain = {key: value for key, value in entry.items() if key not in ("bits", "groups")}
        return sketched(build_layer(in_features, plain), entry["bits"], entry["groups"])
    if entry["rank"] is None:
        return nn.Linear(in_features, entry["out"], bias=entry["bias"])
    if "side" in entry:
        return PivotedLinear(in_features, entry["out"], entry["rank"], entry["bias"], entry["side"])
    made = FollowerLinear if "shares" in entry else LeadLinear if entry.get("lead") else LowRankLinear
    return made(in_features, entry["out"], entry["rank"], entry["bias"])


def install_layers(base_model: nn.Module, matrices: dict[str, Any]) -> None:
    """Replaces the named projections of a base model by the layers that ``matrices`` describes."""
    for name, entry in matrices.items():
        parent_name, _, attribute = name.rpartition(".")
        parent = base_model.get_submodule(parent_name)
        old = getattr(parent, attribute)
        in_features: int = old.nx if isinstance(old, Conv1D) else old.in_features
        setattr(parent, attribute, build_layer(in_features, entry))
    for name, entry in matrices.items():
        for part in entry.get("parts", [entry]):
            if "shares" in part:
                follower: Any = base_model.get_submodule(f"{name}.parts.{part['name']}" if "parts" in entry else name)
                follower.follow(base_model.get_submodule(part["shares"]))


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


class LowRankLlamaConfig(LlamaConfig):
    """Configuration of a llama model with factored projections."""

    model_type = "lowrank_llama"
    base_model_tp_plan = None


class LowRankLlamaModel(LowRankMixin, LlamaModel):
    """LlamaModel with factored projections."""

    config_class = LowRankLlamaConfig


class LowRankLlamaForCausalLM(LowRankMixin, LlamaForCausalLM):
    """LlamaForCausalLM with factored projections."""

    config_class = LowRankLlamaConfig
