"""Second moment of the loss gradient at the output of a matrix: the output side of a Kronecker-factored Fisher.

``G = E[g g^T]`` ``[out, out]`` with g the gradient of a token's loss, summed over the sequence, at the output (nats per
unit of output). Labels are sampled from the model itself, so this is the Fisher information, not the empirical one
(K-FAC, arXiv 1503.05671).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from bolaco.models.structure import Site
from bolaco.parallel import team
from bolaco.statistics.moments import PooledMoments
from bolaco.statistics.statistic import GradientStatistic
from bolaco.statistics.symmetric import BlockDiagonal, fold, folded_size, unfold

# Of numbers whose largest is below this, too many would not be numbers in float32 any more.
_SMALL = 1e-25
# Factors beyond this leave the range of float32 and of half precision.
_LIMIT = 2.0**64
# Rows from which on a block-diagonal matrix is kept as its blocks.
_LARGE = 16384


class _OutputMoment:
    """``E[g g^T]`` at the output of one matrix, over all positions."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self._pooled = PooledMoments(dim, device=device)
        self._scale = 1.0
        self._seen = 0

    def update(self, x: Tensor, gradient: Tensor) -> None:
        largest = float(gradient.abs().max()) if gradient.numel() else 0.0
        if self._seen == 0 and 0 < largest < math.inf:
            # Squares of small gradients underflow. A power of two changes nothing else.
            self._scale = 2.0 ** -round(math.log2(largest))
        self._seen += 1
        exact = (
            gradient.double()
            if self._scale > _LIMIT
            else gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        )
        self._pooled.update(exact * self._scale if self._scale != 1 else gradient)

    def reduce(self) -> None:
        scales = team.gather([self._scale, self._seen])
        self._seen = sum(seen for _, seen in scales)
        known = [scale for scale, seen in scales if seen]
        if known and known[0] != self._scale:
            self._pooled.rescale(known[0] / self._scale)
            self._scale = known[0]
        self._pooled.reduce()

    def result(self) -> Tensor:
        if self._seen == 0:
            # No gradient comes here, as none comes to what picks the keys of sparse attention, though the loss depends
            # on it. A whole nat for each output keeps it dense.
            return torch.eye(self._pooled.dim, dtype=torch.float64, device=self._pooled.sums.device)
        return self._pooled.finalize().second_moment / self._scale**2


class _Gradient(GradientStatistic):
    name = "gradient"
    labels = "sampled"
    of_outputs = _OutputMoment

    def accumulator(self, site: Site, device: torch.device) -> _OutputMoment:
        return _OutputMoment(site.out_features, device)

    def of_experts(
        self, values: Sequence[Tensor | None], counts: Sequence[int], tokens: int, common: bool
    ) -> list[Tensor]:
        """Per token of the text, so that an expert counts by how often it is called.

        As if every expert had seen as many tokens more as it has outputs, with the mean of all experts' gradients;
        where each one's outputs are a space of its own, with their mean square in every direction.
        """
        known = [(value, count) for value, count in zip(values, counts, strict=True) if value is not None]
        if not known:
            raise ValueError("no expert has seen a token")
        routed, outputs = sum(count for _, count in known), len(known[0][0])
        pooled = torch.stack([value * (count / routed) for value, count in known]).sum(dim=0)
        if not common:
            pooled = torch.eye(outputs, dtype=pooled.dtype, device=pooled.device) * pooled.diagonal().mean()
        found = []
        for value, count in zip(values, counts, strict=True):
            own = pooled if value is None else (value * count + pooled * outputs) / (count + outputs)
            # One that was never called in the text may be called once in as much of it again.
            found.append(own * (max(count, 1) / tokens))
        return found

    def stack(self, values: Sequence[Tensor]) -> Tensor:
        """Block-diagonal: outputs of different matrices count as uncorrelated.

        Of many matrices, such as those of experts, the whole would be far larger than its blocks; those alone it is.
        """
        if sum(map(len, values)) > _LARGE:
            return cast(Tensor, BlockDiagonal(tuple(values)))
        stacked: Tensor = torch.block_diag(*values)
        return stacked

    def numbers(self, site: Site) -> int:
        return folded_size(site.out_features)

    def encode(self, value: Tensor) -> Tensor:
        """One triangle: half of what a run of a wide model has on disk. In float32, if that has the range."""
        largest = float(value.abs().max())
        return fold(value if 0 < largest < _SMALL else value.float())

    def decode(self, stored: Tensor) -> Tensor:
        return unfold(stored)


GRADIENT = _Gradient()
