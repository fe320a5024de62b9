"""Pooled mean and covariance of vectors that arrive in batches (arXiv 2405.10616, section 3.1).

The calibration data are split into groups; the pooled covariance is the mean of the groups' unbiased sample
covariances, each centred on its own group mean. With ``n_g`` vectors in group ``g``::

    pooled = (sum_x (x - c)(x - c)^T - sum_g n_g d_g d_g^T) / sum_g (n_g - 1),    d_g = mean_g - c

for any fixed shift ``c``: one d x d matrix for all groups, and the whole state adds up over shards and over batches
in any order. For groups of equal size this is the plain mean of the covariances; a short last group counts by its
degrees of freedom. The shift, taken from the first batch, keeps the subtraction harmless where means are large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bolaco.errors import NonFiniteError
from bolaco.parallel import team
from bolaco.statistics.statistic import InputStatistic

# Columns per panel of the symmetric product: only panels on and above the diagonal are computed.
_PANEL = 256
# Rows accumulated in the inputs' precision before they are added to the float64 total.
_FLUSH_ROWS = 16384


def group_runs(rows: slice, groups: int, sequences: int) -> Iterator[tuple[int, slice]]:
    """The groups of a batch of sequences, each with its run inside the batch.

    Sequence ``i`` of ``n`` belongs to group ``i * groups // n``, so groups are runs of consecutive sequences.
    """
    owner = [i * groups // sequences for i in range(rows.start, rows.stop)]
    for group in sorted(set(owner)):
        yield group, slice(owner.index(group), len(owner) - owner[::-1].index(group))


@dataclass(frozen=True)
class Moments:
    """Finished statistics of ``count`` vectors of length d, in float64.

    Attributes:
        mean: ``[d]``, the mean of the group means weighted by their counts.
        covariance: ``[d, d]``, pooled within groups.
        group_means: ``[groups with vectors, d]``.
        group_counts: ``[groups with vectors]``, vectors in each, float64.
    """

    mean: Tensor
    covariance: Tensor
    group_means: Tensor
    group_counts: Tensor

    @property
    def count(self) -> int:
        """Vectors seen."""
        return int(self.group_counts.sum())

    @cached_property
    def second_moment(self) -> Tensor:
        """``[d, d]``, E[x x^T], not centred; computed when asked for."""
        freedom = float((self.group_counts - 1).sum())
        between = (self.group_means * self.group_counts[:, None]).T @ self.group_means
        return (freedom * self.covariance + between) / self.count


class PooledMoments:
    """Accumulates :class:`Moments`. All vectors of one :meth:`update` belong to one group.

    Args:
        dim: length d of the vectors.
        groups: number of groups m; ``groups=1`` gives the ordinary sample covariance.
        device: where to accumulate; the total is float64 (a GPU keeps it too).
    """

    def __init__(self, dim: int, groups: int = 1, device: torch.device | str = "cpu") -> None:
        self.dim, self.groups = dim, groups
        self.shift: Tensor | None = None
        self.counts = torch.zeros(groups, dtype=torch.int64)
        self.sums = torch.zeros(groups, dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._pending: Tensor | None = None
        self._pending_rows = 0

    def update(self, x: Tensor, group: int = 0) -> None:
        """Adds vectors ``[..., d]`` of one group.

        Raises:
            NonFiniteError: a NaN or infinity among them.
        """
        x = x.detach().reshape(-1, self.dim)
        # float64 inputs stay float64 (the reference path); everything else is accumulated from float32.
        x = x if x.dtype == torch.float64 else x.float()
        if len(x) == 0:
            return
        # Rounded to float32, the shift is the same number whichever precision it is subtracted in.
        shift = x.mean(dim=0).float().double() if self.shift is None else self.shift
        x = x - shift.to(x.dtype)
        total = x.sum(dim=0, dtype=torch.float64)
        if not torch.isfinite(total).all():
            raise NonFiniteError(f"NaN or infinity in input {int((~torch.isfinite(total)).nonzero()[0])} of {self.dim}")
        self.shift = shift
        self.sums[group] += total
        self.counts[group] += len(x)
        if self._pending is None or self._pending.dtype != x.dtype:
            self._flush()
            self._pending = torch.zeros(self.dim, self.dim, dtype=x.dtype, device=x.device)
        for start in range(0, self.dim, _PANEL):
            panel = slice(start, start + _PANEL)
            self._pending[panel, start:].addmm_(x[:, panel].T, x[:, start:])
        self._pending_rows += len(x)
        if self._pending_rows >= _FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._pending is not None and self._pending_rows:
            self._scatter += self._pending
            self._pending.zero_()
            self._pending_rows = 0

    def merge(self, other: PooledMoments) -> None:
        """Adds the state of another shard (its groups are the same groups); ``other`` is left as it is.

        Raises:
            ValueError: different dimension or number of groups.
        """
        if (self.dim, self.groups) != (other.dim, other.groups):
            raise ValueError(f"cannot merge {other.groups} groups of {other.dim} into {self.groups} of {self.dim}")
        if other.shift is None:
            return
        self._flush()
        other._flush()
        if self.shift is None:
            self.shift = other.shift.clone()
        # Re-base the other shard from its shift to ours: x - ours = (x - theirs) + delta.
        delta = other.shift - self.shift
        sums = other.sums.sum(dim=0)
        cross = torch.outer(sums, delta)
        self._scatter += other._scatter + cross + cross.T + int(other.counts.sum()) * torch.outer(delta, delta)
        self.sums += other.sums + other.counts.to(delta)[:, None] * delta
        self.counts += other.counts

    def reduce(self) -> None:
        """Adds up what all ranks have seen, on each of them."""
        if team.count() == 1:
            return
        self._flush()
        # The mean of the ranks' shifts, each by its vectors, is a shift for all.
        seen = self.counts.sum().to(self.sums)
        own = torch.zeros_like(self.sums[0]) if self.shift is None else self.shift
        total = torch.cat([own * seen, seen[None]])
        team.all_reduce({"shift": total})
        if total[-1] == 0:
            return
        common = total[:-1] / total[-1]
        if self.shift is not None:
            delta, sums = self.shift - common, self.sums.sum(dim=0)
            self._scatter.addr_(sums, delta).addr_(delta, sums + seen * delta)
            self.sums += self.counts.to(delta)[:, None] * delta
        self.shift = common
        team.all_reduce({"scatter": self._scatter, "sums": self.sums, "counts": self.counts})

    def rescale(self, factor: float) -> None:
        """Makes the vectors seen so far so many times as large; exact for powers of two."""
        self._flush()
        self._scatter *= factor**2
        self.sums *= factor
        if self.shift is not None:
            self.shift = self.shift * factor

    def finalize(self) -> Moments:
        """The statistics so far; the accumulator can go on afterwards.

        Raises:
            ValueError: fewer than two vectors in every group.
        """
        self._flush()
        freedom = int((self.counts - 1).clamp(min=0).sum())
        if freedom < 1 or self.shift is None:
            raise ValueError(f"a covariance needs at least two vectors in a group, got {self.counts.tolist()}")
        filled = self.counts > 0
        counts = self.counts[filled].to(self.sums)
        offsets = self.sums[filled] / counts[:, None]
        # Only the panels on and above the diagonal were summed; one pass mirrors them.
        within = torch.addmm(self._scatter, (offsets * counts[:, None]).T, offsets, alpha=-1).div_(freedom)
        for start in range(0, self.dim, _PANEL):
            panel = slice(start, start + _PANEL)
            corner = within[panel, panel]
            within[panel, panel] = corner.triu() + corner.triu(diagonal=1).T
            within[start + _PANEL :, panel] = within[panel, start + _PANEL :].T
        mean = self.shift + self.sums.sum(dim=0) / counts.sum()
        return Moments(mean, within, self.shift + offsets, counts)


def pooled_moments(parts: Sequence[Moments]) -> Moments:
    """The moments of several sets of vectors together; the groups of each stay groups.

    Raises:
        ValueError: there is none.
    """
    if not parts:
        raise ValueError("no expert has seen two tokens")
    freedoms = [float((part.group_counts - 1).sum()) for part in parts]
    weighted = [part.covariance * freedom for part, freedom in zip(parts, freedoms, strict=True)]
    total = torch.stack(weighted).sum(dim=0)
    means = torch.cat([part.group_means for part in parts])
    counts = torch.cat([part.group_counts for part in parts])
    return Moments((counts @ means) / counts.sum(), total / max(sum(freedoms), 1.0), means, counts)


class _Moments(InputStatistic[Moments]):
    """Mean and pooled covariance of the input."""

    name = "moments"

    def accumulator(self, dim: int, groups: int, device: torch.device) -> PooledMoments:
        return PooledMoments(dim, groups, device)

    def numbers(self, dim: int) -> int:
        return 2 * dim * dim

    def pooled(self, values: Sequence[Moments], counts: Sequence[int]) -> Moments:
        return pooled_moments(values)

    def of_experts(
        self, values: Sequence[Moments | None], counts: Sequence[int], common: bool, dim: int
    ) -> list[Moments]:
        """As if every expert had seen ``dim`` tokens more, whose moments are those of all experts' tokens together.

        Where each expert's input is a space of its own, directions of one mean nothing for another: those tokens then
        have the mean square of all inputs in every direction, and mean zero.
        """
        pooled = pooled_moments([value for value in values if value is not None])
        mean, second = pooled.mean, pooled.second_moment
        if not common:
            mean = torch.zeros_like(mean)
            second = torch.eye(dim, dtype=second.dtype, device=second.device) * second.diagonal().mean()
        weight = max(dim, 2)
        spread = (second - torch.outer(mean, mean)) * (weight / (weight - 1))
        prior = Moments(mean, spread, mean[None], torch.full((1,), float(weight)).to(mean))
        return [prior if value is None else pooled_moments([value, prior]) for value in values]


MOMENTS = _Moments()
