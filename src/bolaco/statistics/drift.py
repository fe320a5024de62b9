"""How the inputs of a compressed model differ from those of the original."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bolaco.statistics.moments import Moments, PooledMoments


@dataclass(frozen=True)
class Drift:
    """How the input x of an original matrix differs from the input x' it has in a compressed model; float64.

    Attributes:
        inputs: statistics of x'.
        mean: ``[d]``, E[x - x'].
        covariance: ``[d, d]``, Cov(x - x', x'), pooled within groups; all zeros where the two are the same.
    """

    inputs: Moments
    mean: Tensor
    covariance: Tensor
    group_means: Tensor

    @cached_property
    def second_moment(self) -> Tensor:
        """``[d, d]``, E[(x - x') x'^T], not centred."""
        counts = self.inputs.group_counts
        between = (self.group_means * counts[:, None]).T @ self.inputs.group_means
        return (float((counts - 1).sum()) * self.covariance + between) / self.inputs.count


class DriftMoments:
    """Accumulates :class:`Drift` from pairs of inputs that arrive in batches; groups as in :class:`PooledMoments`."""

    def __init__(self, dim: int, groups: int = 1, device: torch.device | str = "cpu") -> None:
        self.inputs = PooledMoments(dim, groups, device)
        self.sums = torch.zeros(groups, dim, dtype=torch.float64, device=device)
        self._cross = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, original: Tensor, compressed: Tensor, group: int = 0) -> None:
        """Adds pairs ``[..., d]`` of one group.

        Raises:
            NonFiniteError: a NaN or infinity among the compressed model's inputs.
        """
        compressed = compressed.detach().reshape(-1, self.inputs.dim)
        self.inputs.update(compressed, group)
        difference = original.detach().reshape(-1, self.inputs.dim).to(compressed) - compressed
        exact = difference.double() if difference.dtype == torch.float64 else difference.float()
        assert self.inputs.shift is not None
        self.sums[group] += exact.sum(dim=0, dtype=torch.float64)
        self._cross += exact.T @ (compressed.to(exact) - self.inputs.shift.to(exact))

    def finalize(self) -> Drift:
        """The statistics so far."""
        moments = self.inputs.finalize()
        filled = self.inputs.counts > 0
        counts, sums = moments.group_counts, self.sums[filled]
        assert self.inputs.shift is not None
        offsets = moments.group_means - self.inputs.shift
        covariance = (self._cross - sums.T @ offsets) / float((counts - 1).clamp(min=0).sum())
        return Drift(moments, sums.sum(dim=0) / counts.sum(), covariance, sums / counts[:, None])
