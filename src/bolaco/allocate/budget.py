"""Parameter arithmetic, in integers, in one place.

The convention everything is reported in (arXiv 2405.10616, restated): the keep ratio is the parameters of the
compressed decoder linears over those of all decoder linears, matrices left dense included, biases not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

from bolaco.errors import BudgetError
from bolaco.models.structure import Site

# Rank of each matrix by site name; None means dense.
Ranks = dict[str, int | None]


# How a rank-r product is stored, and what that costs:
#   two-factor  [out, r] and [r, in]                          r (out + in)
#   pivoted     r rows (or columns) and what the others are of them   r (out + in - r)   (arXiv 2501.19090)
#   shared      the same; of two stacked [out1 + out2, r] and [r, in]   r (out1 + out2 + in)   (arXiv 2402.16319)
STORAGES = ("two-factor", "pivoted", "shared")


def parameters(site: Site, rank: int | None, storage: str = "two-factor") -> int:
    """Parameters of a site at a rank; of the dense matrix for None."""
    if rank is None:
        return site.size
    saved = rank if storage == "pivoted" else 0
    return rank * (site.out_features + site.in_features - saved)


def max_rank(site: Site, multiple: int, storage: str = "two-factor") -> int:
    """Largest multiple of ``multiple`` that is stored in less than the dense matrix; 0 if there is none."""
    if storage == "pivoted":
        below = min(site.out_features, site.in_features) - 1
    else:
        below = (site.size - 1) // (site.out_features + site.in_features)
    return below // multiple * multiple


def rank_for(site: Site, keep: float, multiple: int, storage: str = "two-factor") -> int | None:
    """The rank stored in a share ``keep`` of the matrix, rounded down to a multiple, at least one multiple.

    ``keep * out * in / (out + in)`` for two factors. None (dense) for keep >= 1. A matrix too small to factor at all
    stays dense.
    """
    top = max_rank(site, multiple, storage)
    if keep >= 1 or top == 0:
        return None
    # The guard keeps a ratio that was computed from a rank from rounding down to the rank below.
    both = site.out_features + site.in_features
    if storage == "pivoted":
        exact = (both - math.sqrt(both * both - 4 * keep * site.size)) / 2
    else:
        exact = keep * site.size / both
    return min(max(math.floor(exact / multiple + 1e-9), 1) * multiple, top)


class Budget:
    """A keep ratio over a model's linears, as a number of parameters.

    Args:
        sites: every decoder linear, the ones that stay dense included.
        keep: keep ratio in (0, 1].
        storage: how factored matrices are stored.

    Raises:
        BudgetError: keep outside (0, 1].
    """

    def __init__(self, sites: Iterable[Site], keep: float, storage: str = "two-factor") -> None:
        if not 0 < keep <= 1:
            raise BudgetError(f"keep must be in (0, 1], got {keep}")
        self.sites = {site.name: site for site in sites}
        self.keep = keep
        self.storage = storage
        self.total = sum(site.size for site in self.sites.values())
        # Through the decimal the user wrote: 0.8 of 10 is 8, not 7.
        self.limit = math.floor(Fraction(str(keep)) * self.total)

    def cost(self, ranks: Mapping[str, int | None]) -> int:
        """Parameters of the linears at ``ranks``; matrices not named count as dense."""
        return sum(parameters(site, ranks.get(name), self.storage) for name, site in self.sites.items())

    def ratio(self, ranks: Mapping[str, int | None]) -> float:
        """The keep ratio that ``ranks`` come to."""
        return self.cost(ranks) / self.total
