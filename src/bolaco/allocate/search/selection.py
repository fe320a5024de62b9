"""Choosing validation sequences by how much allocations differ on them (arXiv 2405.10616, section 5.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def select_sequences(
    evaluate: Callable[[Sequence[float]], Tensor],
    allocations: Sequence[Sequence[float]],
    count: int,
    candidates: int,
) -> Tensor:
    """Indices, ascending, of the ``count`` candidates whose perplexity varies most over random allocations.

    Args:
        evaluate: per-candidate perplexities ``[candidates]`` under given keep ratios.
        allocations: keep ratios of the random allocations; fewer than two select the first sequences.
        count: sequences to keep.
        candidates: sequences there are.
    """
    if count >= candidates or len(allocations) < 2:
        return torch.arange(min(count, candidates))
    table = torch.stack([evaluate(keeps) for keeps in allocations])
    spread = torch.nan_to_num(table, nan=0.0, posinf=1e300).std(dim=0)
    return spread.topk(count).indices.sort().values
