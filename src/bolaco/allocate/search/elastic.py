"""The model of the search: every factored matrix at any rank, changed by slicing.

Nothing is copied, multiplied or replaced between trials. A layer keeps its dense weight (rank None) beside the
factors of its highest rank, mapped from disk.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bolaco.factorize.solver import Factors
from bolaco.factorize.store import FactorStore
from bolaco.layers import put_module
from bolaco.models.structure import Site
from bolaco.models.subject import Subject
from bolaco.storage.budget import Ranks


class ElasticLinear(nn.Module):
    """A matrix whose rank is a slice. ``rank`` None is the dense original."""

    def __init__(self, weight: Tensor, bias: Tensor | None, factors: Factors | None) -> None:
        super().__init__()
        # Plain attributes: the search owns no parameters.
        self.weight, self.bias, self.factors = weight, bias, factors
        self.rank: int | None = None
        self._slices: tuple[Tensor, Tensor, Tensor | None] | None = None

    def set_rank(self, rank: int | None) -> None:
        """Takes another rank; the only arithmetic is one vector for the bias.

        Raises:
            ValueError: above the factors' highest rank, or any rank where the matrix has no factors.
        """
        if rank is not None and (self.factors is None or not 0 < rank <= self.factors.max_rank):
            top = None if self.factors is None else self.factors.max_rank
            raise ValueError(f"rank {rank} of a matrix whose highest factored rank is {top}")
        if rank is None or self.factors is None:
            self._slices = None
        elif rank != self.rank:
            self._slices = (
                self.factors.reduce[:rank],
                self.factors.expand_t[:rank].T,
                self.factors.bias(rank, self.bias),
            )
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        if self._slices is None:
            return F.linear(x, self.weight, self.bias)
        reduce, expand, bias = self._slices
        return F.linear(F.linear(x, reduce), expand, bias)


class _ElasticSplit(nn.Module):
    """A fused projection as elastic parts; whole and untouched while all of them are dense."""

    def __init__(self, original: nn.Module, parts: list[ElasticLinear]) -> None:
        super().__init__()
        self.original = original
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to the parts' outputs side by side."""
        if all(part.rank is None for part in self.parts):
            whole: Tensor = self.original(x)
            return whole
        return torch.cat([part(x) for part in self.parts], dim=-1)


class ElasticModel:
    """Turns a subject's model elastic while the ``with`` block lasts; the model is as before afterwards."""

    def __init__(self, subject: Subject, store: FactorStore) -> None:
        self.subject, self.model, self.store = subject, subject.model, store
        self.layers: dict[str, ElasticLinear] = {}
        self._originals: dict[str, nn.Module] = {}

    def __enter__(self) -> ElasticModel:
        by_module: dict[str, list[Site]] = {}
        factors: dict[str, Factors] = {}
        structure = self.subject.structure
        for layer in range(structure.num_layers):
            by_module |= structure.modules(layer)
            factors |= self.store.load(layer)
        device = self.model.device
        for name, sites in by_module.items():
            parts = []
            for site in sites:
                item = factors.get(site.name)
                weight, bias = self.subject.weight(site), self.subject.bias(site)
                elastic = ElasticLinear(weight, bias, None if item is None else _to(item, device))
                self.layers[site.name] = elastic
                parts.append(elastic)
            original = self.model.base_model.get_submodule(name)
            self._originals[name] = original
            elastic_module = parts[0] if sites[0].part is None else _ElasticSplit(original, parts)
            put_module(self.model.base_model, name, elastic_module)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, module in self._originals.items():
            put_module(self.model.base_model, name, module)
        self.layers, self._originals = {}, {}

    def set_ranks(self, ranks: Ranks) -> None:
        """Takes the rank of every matrix; matrices not named become dense."""
        for name, layer in self.layers.items():
            layer.set_rank(ranks.get(name))


def _to(factors: Factors, device: torch.device) -> Factors:
    if device.type == "cpu":
        return factors
    moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in vars(factors).items()}
    return Factors(**moved)
