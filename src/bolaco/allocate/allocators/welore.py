"""One threshold for all matrices: the rank allocation of WeLore (arXiv 2407.11239).

The singular values of each matrix are scaled to [0, 1] between its smallest and its largest, and one threshold, the
same for every matrix, says how many of them stay. A matrix that loses much of its rank is a low-rank component (LRC)
and is factored; one that loses little (N-LRC) stays dense, as does one whose rank would cost more than itself. In the
result an N-LRC is a matrix without a rank.

Deviations from the paper: it aims at an effective rank reduction, the share of all ranks pruned; here the threshold is
the lowest that meets the parameter budget, in the storage the factors have, unless ``reduction`` asks for the former.
The result records both numbers. Ranks are rounded down to a multiple. The
paper's spectra are those of the weights (``--method svd``, as in the preset); with another method they are those of
the weights in its metric. Nothing is spent of what the threshold leaves of the budget: that would be another rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field
from torch import Tensor

from bolaco.allocate.allocator import Allocation, AllocationTask, Allocator
from bolaco.allocate.space import NO_FLOOR, uniform_preview
from bolaco.errors import BudgetError
from bolaco.models.structure import Site
from bolaco.settings import Section
from bolaco.storage.budget import Budget, Ranks
from bolaco.storage.storage import Storage


def normalised(spectrum: Tensor) -> np.ndarray:
    """Singular values ``[k]`` scaled to [0, 1], from squared ones; all 1 where they are all the same.

    Ascending.
    """
    values = np.sort(spectrum.double().clamp(min=0).sqrt().numpy())
    span = values[-1] - values[0]
    return (values - values[0]) / span if span > 0 else np.ones_like(values)


def rank_at(
    site: Site, values: np.ndarray, threshold: float, multiple: int, storage: Storage, min_ratio: float
) -> int | None:
    """Rank of a site at a threshold on its ascending :func:`normalised` values; None (dense) for an N-LRC.

    The values not below the threshold are counted and rounded down to a multiple, at least one multiple. Dense if the
    share below it does not exceed ``min_ratio`` or the rank saves nothing. Never costs more at a higher threshold.
    """
    kept = len(values) - int(np.searchsorted(values, threshold))
    rank = max(kept // multiple, 1) * multiple
    if (len(values) - kept) / len(values) <= min_ratio or rank > storage.max_rank(site, multiple):
        return None
    return rank


@dataclass(frozen=True)
class Cut:
    """What a threshold makes of all matrices.

    Attributes:
        threshold: on normalised singular values.
        reduction: the paper's effective rank reduction: of all singular values, the share below it.
        ranks: of every matrix.
    """

    threshold: float
    reduction: float
    ranks: Ranks


def welore_cut(
    sites: Sequence[Site],
    spectra: Mapping[str, Tensor],
    budget: Budget,
    multiple: int,
    min_ratio: float = 0.0,
    reduction: float | None = None,
) -> Cut:
    """The lowest threshold that meets the budget, or reaches an effective rank reduction.

    Sites without a spectrum stay dense.

    Args:
        sites: every decoder linear.
        spectra: squared singular values of the matrices that may be factored.
        budget: the budget; its storage decides what a rank costs.
        multiple: rank step.
        min_ratio: a matrix must lose more of its rank than this share to be factored (the paper: 0 for compression
            alone, 0.4999 where the factors are tuned afterwards).
        reduction: the least reduction wanted. Then nothing is removed to meet the budget.

    Raises:
        BudgetError: not even the highest threshold meets the budget, or the one of the reduction does not.
    """
    values = {site.name: normalised(spectra[site.name]) for site in sites if site.name in spectra}
    count = sum(len(mine) for mine in values.values())

    def at(threshold: float) -> Cut:
        ranks: Ranks = dict.fromkeys(budget.sites)
        for name, mine in values.items():
            ranks[name] = rank_at(budget.sites[name], mine, threshold, multiple, budget.storage, min_ratio)
        below = sum(int(np.searchsorted(mine, threshold)) for mine in values.values())
        return Cut(threshold, below / max(count, 1), ranks)

    def enough(cut: Cut) -> bool:
        return budget.cost(cut.ranks) <= budget.limit if reduction is None else cut.reduction >= reduction

    # Between two values nothing changes, and costs only fall: the values themselves are bisected, exactly. Above them
    # all, every matrix has its lowest rank.
    thresholds = np.unique(np.concatenate([*values.values(), [np.nextafter(1.0, 2.0)]])).tolist()
    low, high = 0, len(thresholds) - 1
    if not enough(at(thresholds[high])) and reduction is None:
        raise budget.too_small(budget.cost(at(thresholds[high]).ranks), NO_FLOOR)
    while low < high:
        middle = (low + high) // 2
        if enough(at(thresholds[middle])):
            high = middle
        else:
            low = middle + 1
    found = at(thresholds[low])
    cost = budget.cost(found.ranks)
    if cost > budget.limit:
        raise BudgetError(
            f"search.reduction {reduction:g} keeps {cost / budget.total:.4f} of the decoder linears' parameters, more "
            f"than keep {budget.keep:g}; raise keep (1 leaves the size to the reduction) or the reduction"
        )
    return found


class WeloreOptions(Section):
    """Which matrices count as low-rank components, and what the threshold is to reach."""

    min_ratio: float = Field(
        0.0, ge=0, lt=1, description="a matrix that would lose no more of its rank than this share stays dense"
    )
    reduction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="effective rank reduction, the share of all singular values below the threshold, that is aimed at "
        "instead of keep, which is then only a limit (1: none)",
    )


def allocate(task: AllocationTask, options: WeloreOptions) -> Allocation:
    """The lowest threshold that does what is asked for."""
    found = welore_cut(
        task.structure.sites, task.spectra(), task.budget, task.multiple, options.min_ratio, options.reduction
    )
    return Allocation(found.ranks, notes={"threshold": found.threshold, "rank_reduction": found.reduction})


ALLOCATOR = Allocator(
    name="welore",
    paper="arXiv 2407.11239",
    summary="one threshold on all normalised singular values (WeLore)",
    allocate=allocate,
    preview=lambda task, options: uniform_preview(task),
    shows="uniform",
    options=WeloreOptions,
)
