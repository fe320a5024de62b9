"""Diagonal of the empirical Fisher information of a matrix's weights, added up over its outputs (arXiv 2207.00112).

``[in]``: the mean over sequences of ``(dL/dW)^2``, L the loss of the sequence's own next tokens summed over the
sequence (nats). The gradient of one sequence is ``g^T x`` summed over its positions, so no parameter needs one of
autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bolaco.errors import NonFiniteError
from bolaco.models.structure import Site
from bolaco.parallel import team
from bolaco.statistics.statistic import GradientStatistic


class _WeightFisher:
    """Mean over sequences of the squared weight gradient of one matrix, added up over its outputs."""

    def __init__(self, site: Site, device: torch.device) -> None:
        self._sums = torch.zeros(site.in_features, dtype=torch.float64, device=device)
        self._sequences = 0

    def update(self, x: Tensor, gradient: Tensor) -> None:
        for inputs, outputs in zip(x, gradient, strict=True):
            # In float32 at least: squares of half-precision gradients underflow.
            exact = torch.float64 if inputs.dtype == torch.float64 else torch.float32
            weight = outputs.to(exact).T @ inputs.to(exact)
            columns = weight.square_().sum(dim=0, dtype=torch.float64)
            if not torch.isfinite(columns).all():
                raise NonFiniteError("NaN or infinity")
            self._sums += columns
            self._sequences += 1

    def reduce(self) -> None:
        count = torch.tensor([self._sequences])
        team.all_reduce({"sums": self._sums, "count": count})
        self._sequences = int(count)

    def result(self) -> Tensor:
        return self._sums / max(self._sequences, 1)


class _Fisher(GradientStatistic):
    name = "fisher"
    labels = "text"
    per_sequence = True

    def accumulator(self, site: Site, device: torch.device) -> _WeightFisher:
        return _WeightFisher(site, device)

    def stack(self, values: Sequence[Tensor]) -> Tensor:
        """The outputs of all matrices are added up."""
        return torch.stack(tuple(values)).sum(dim=0)

    def numbers(self, site: Site) -> int:
        return site.in_features


FISHER = _Fisher()
