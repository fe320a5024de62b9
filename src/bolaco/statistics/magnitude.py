"""Mean absolute value of each input, as ASVD weighs inputs by it (arXiv 2312.05821)."""

from __future__ import annotations

import torch
from torch import Tensor

from bolaco.errors import NonFiniteError
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


MAGNITUDE = _Magnitude()
