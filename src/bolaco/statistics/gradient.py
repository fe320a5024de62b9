"""Second moment of the loss gradient at the output of a matrix: the output side of a Kronecker-factored Fisher.

``G = E[g g^T]`` ``[out, out]`` with g the gradient of a token's loss, summed over the sequence, at the output (nats per
unit of output). Labels are sampled from the model itself, so this is the Fisher information, not the empirical one
(K-FAC, arXiv 1503.05671).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bolaco.models.structure import Site
from bolaco.statistics.moments import PooledMoments
from bolaco.statistics.statistic import GradientStatistic
from bolaco.statistics.symmetric import fold, folded_size, unfold


class _OutputMoment:
    """``E[g g^T]`` at the output of one matrix, over all positions."""

    def __init__(self, site: Site, device: torch.device) -> None:
        self._pooled = PooledMoments(site.out_features, device=device)

    def update(self, x: Tensor, gradient: Tensor) -> None:
        self._pooled.update(gradient)

    def result(self) -> Tensor:
        return self._pooled.finalize().second_moment


class _Gradient(GradientStatistic):
    name = "gradient"
    labels = "sampled"

    def accumulator(self, site: Site, device: torch.device) -> _OutputMoment:
        return _OutputMoment(site, device)

    def stack(self, values: Sequence[Tensor]) -> Tensor:
        """Block-diagonal: outputs of different matrices count as uncorrelated."""
        stacked: Tensor = torch.block_diag(*values)
        return stacked

    def numbers(self, site: Site) -> int:
        return folded_size(site.out_features)

    def encode(self, value: Tensor) -> Tensor:
        """One triangle: half of what a run of a wide model has on disk."""
        return fold(value)

    def decode(self, stored: Tensor) -> Tensor:
        return unfold(stored)


GRADIENT = _Gradient()
