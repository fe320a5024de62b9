"""Parameter arithmetic of a whole model, in integers.

The convention everything is reported in (arXiv 2405.10616, restated): the keep ratio is the parameters of the
compressed decoder linears over those of all decoder linears, matrices left dense included, biases not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from bolaco.errors import BudgetError
from bolaco.models.structure import Site, parameter_limit
from bolaco.storage.storage import Storage

# Rank of each matrix by site name; None means dense.
Ranks = dict[str, int | None]


def ratio_of(limit: int, total: int) -> float:
    """The keep ratio that allows exactly ``limit`` of ``total``."""
    keep = limit / total
    while parameter_limit(keep, total) < limit:
        keep = math.nextafter(keep, 1)
    return keep


class Budget:
    """A keep ratio over a model's linears, as a number of parameters.

    Args:
        sites: every decoder linear, the ones that stay dense included.
        keep: keep ratio in (0, 1].
        storage: how factored matrices are stored, and the unit that they are counted in: parameters, or bits for a
            :class:`bolaco.storage.coded.CodedStorage`.

    Raises:
        BudgetError: keep outside (0, 1].
    """

    def __init__(self, sites: Iterable[Site], keep: float, storage: Storage) -> None:
        if not 0 < keep <= 1:
            raise BudgetError(f"keep must be in (0, 1], got {keep}")
        self.sites = {site.name: site for site in sites}
        self.keep = keep
        self.storage = storage
        self.total = sum(storage.dense_cost(site) for site in self.sites.values())
        self.limit = parameter_limit(keep, self.total)

    def cost(self, ranks: Mapping[str, int | None]) -> int:
        """Parameters of the linears at ``ranks``; matrices not named count as dense."""
        return sum(self.storage.parameters(site, ranks.get(name)) for name, site in self.sites.items())

    def in_storage(self, storage: Storage) -> Budget:
        """The same limit, as far as it goes, where costs are those of another storage."""
        total = sum(storage.dense_cost(site) for site in self.sites.values())
        return Budget(self.sites.values(), ratio_of(min(self.limit, total), total), storage)

    def ratio(self, ranks: Mapping[str, int | None]) -> float:
        """The keep ratio that ``ranks`` come to."""
        return self.cost(ranks) / self.total

    def too_small(self, least: int, advice: str) -> BudgetError:
        """The error where not even the smallest allocation, of ``least`` parameters, fits."""
        return BudgetError(
            f"keep {self.keep} allows {self.limit:,} {self.storage.unit} in the decoder linears, but the smallest "
            f"allocation has {least:,} ({least / self.total:.3f}); {advice}",
            least,
        )
