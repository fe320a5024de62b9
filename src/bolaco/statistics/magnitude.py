"""Mean absolute value of each input, as ASVD weighs inputs by it (arXiv 2312.05821)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bolaco.errors import NonFiniteError
from bolaco.parallel import team
from bolaco.statistics.statistic import InputStatistic


class Magnitudes:
    """Accumulates E|x| ``[d]`` in float64.

    Args:
        dim: length d of the vectors.
        device: where to accumulate.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(dim, dtype=torch.float64, device=device)
        self.count = 0

    def update(self, x: Tensor, group: int = 0) -> None:
        """Adds vectors ``[..., d]``; groups make no difference.

        Raises:
            NonFiniteError: a NaN or infinity among them.
        """
        x = x.detach().reshape(-1, len(self.sums))
        x = x if x.dtype == torch.float64 else x.float()
        total = x.abs().sum(dim=0, dtype=torch.float64)
        if not torch.isfinite(total).all():
            first = int((~torch.isfinite(total)).nonzero()[0])
            raise NonFiniteError(f"NaN or infinity in input {first} of {len(total)}")
        self.sums += total
        self.count += len(x)

    def reduce(self) -> None:
        """Adds up what all ranks have seen, on each of them."""
        count = torch.tensor([self.count])
        team.all_reduce({"sums": self.sums, "count": count})
        self.count = int(count)

    def merge(self, other: Magnitudes) -> None:
        """Adds the state of another shard; ``other`` is left as it is."""
        self.sums += other.sums
        self.count += other.count

    def finalize(self) -> Tensor:
        """The means so far; ValueError without any vector."""
        if self.count == 0:
            raise ValueError("a mean needs at least one vector")
        return self.sums / self.count


class _Magnitude(InputStatistic[Tensor]):
    """``[in]``, E|x|, not centred."""

    name = "magnitude"

    def accumulator(self, dim: int, groups: int, device: torch.device) -> Magnitudes:
        return Magnitudes(dim, device)

    def pooled(self, values: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        total = sum(counts)
        return torch.stack([v * (n / total) for v, n in zip(values, counts, strict=True)]).sum(dim=0)

    def of_experts(
        self, values: Sequence[Tensor | None], counts: Sequence[int], common: bool, dim: int
    ) -> list[Tensor]:
        """As if every expert had seen one token more, with the mean of all tokens; see the moments' rule."""
        known = [(value, count) for value, count in zip(values, counts, strict=True) if value is not None]
        if not known:
            raise ValueError("no expert has seen a token")
        mean = self.pooled(*zip(*known, strict=True))
        mean = mean if common else torch.full_like(mean, float(mean.mean()))
        return [mean if v is None else (v * n + mean) / (n + 1) for v, n in zip(values, counts, strict=True)]


MAGNITUDE = _Magnitude()
