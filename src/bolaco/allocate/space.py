"""The spaces 5x1 and 5x4 of arXiv 2405.10616: a few keep ratios, each shared by many matrices.

A dimension's ratio moves in levels, one for each step of a rank of its matrices to the next multiple, with dense on
top. A level's ratio is what it costs, so an allocation's ratios lead back to the same levels. Every allocation a search
evaluates is a level per dimension, so budgets are settled in integers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from bolaco.allocate.budget import Budget, Ranks, max_rank, parameters, rank_for
from bolaco.errors import BudgetError, RecipeError
from bolaco.models.structure import TYPES, Site, Structure

# Types that share a ratio, in the order of the search dimensions; v joins when it is not left dense.
_SHARED = (("q", "k"), ("qk",), ("v",), ("o",), ("gate",), ("up",), ("gate_up",), ("down",))


@dataclass(frozen=True)
class Level:
    """One setting of a dimension: the parameters it costs, their share of the dense ones, and the ranks it means."""

    keep: float
    cost: int
    ranks: tuple[int | None, ...]


@dataclass(frozen=True)
class Dimension:
    """Matrices that share a keep ratio, and the levels the ratio can take, ascending; the last one is dense."""

    name: str
    sites: tuple[Site, ...]
    levels: tuple[Level, ...] = field(repr=False)

    @property
    def size(self) -> int:
        """Parameters when dense."""
        return sum(site.size for site in self.sites)

    def at(self, keep: float) -> int:
        """Index of the highest level not above ``keep``; the lowest level for ratios below all."""
        return max(bisect_right([level.keep for level in self.levels], keep + 1e-9) - 1, 0)


def _levels(sites: Sequence[Site], multiple: int, min_keep: float, storage: str) -> tuple[Level, ...]:
    size = sum(site.size for site in sites)
    ratios = {min_keep}
    for site in sites:
        for rank in range(multiple, max_rank(site, multiple, storage) + 1, multiple):
            ratio = parameters(site, rank, storage) / site.size
            if ratio > min_keep:
                ratios.add(ratio)
    found: list[Level] = []
    for ratio in [*sorted(ratios), 1.0]:
        ranks = tuple(rank_for(site, ratio, multiple, storage) for site in sites)
        cost = sum(parameters(site, rank, storage) for site, rank in zip(sites, ranks, strict=True))
        if not found or ranks != found[-1].ranks:
            found.append(Level(cost / size, cost, ranks))
    return tuple(found)


class SearchSpace:
    """Keep ratios per dimension, and how they become ranks within a budget."""

    def __init__(
        self, dimensions: Sequence[Dimension], budget: Budget, fill: bool = True, min_keep: float = 0.2
    ) -> None:
        self.dimensions = tuple(dimensions)
        self.budget = budget
        self.fill = fill
        self.min_keep = min_keep
        self.fixed = budget.total - sum(dimension.size for dimension in self.dimensions)
        lowest = self.fixed + sum(dimension.levels[0].cost for dimension in self.dimensions)
        if lowest > budget.limit:
            raise BudgetError(
                f"keep {budget.keep} allows {budget.limit:,} parameters in the decoder linears, but the smallest "
                f"allocation has {lowest:,} ({lowest / budget.total:.3f}); raise --keep, lower search.min_keep, "
                "or let more types be factored (search.dense_types)"
            )

    @property
    def names(self) -> list[str]:
        """Names of the dimensions."""
        return [dimension.name for dimension in self.dimensions]

    def _cost(self, index: Sequence[int]) -> int:
        return self.fixed + sum(d.levels[i].cost for d, i in zip(self.dimensions, index, strict=True))

    def settle(self, keeps: Sequence[float], fill: bool | None = None) -> tuple[int, ...]:
        """Levels for proposed keep ratios: rounded down, lowered until they fit, raised while a step is affordable.

        Steps go to the dimension that is furthest below its proposal (or least above), so the proposal's shape is kept.
        With ``fill`` false the raising is left out. The budget is never exceeded.
        """
        fill = self.fill if fill is None else fill
        index = [dimension.at(keep) for dimension, keep in zip(self.dimensions, keeps, strict=True)]
        cost = self._cost(index)

        def excess(d: int, i: int) -> float:
            return self.dimensions[d].levels[i].keep / max(keeps[d], 1e-9)

        while cost > self.budget.limit:
            d = max((d for d, i in enumerate(index) if i > 0), key=lambda d: excess(d, index[d]))
            cost += self.dimensions[d].levels[index[d] - 1].cost - self.dimensions[d].levels[index[d]].cost
            index[d] -= 1
        while fill:
            steps = []
            for d, i in enumerate(index):
                if i + 1 < len(self.dimensions[d].levels):
                    step = self.dimensions[d].levels[i + 1].cost - self.dimensions[d].levels[i].cost
                    if cost + step <= self.budget.limit:
                        steps.append((excess(d, i + 1), d, step))
            if not steps:
                break
            _, d, step = min(steps)
            index[d] += 1
            cost += step
        return tuple(index)

    def ranks(self, index: Sequence[int]) -> Ranks:
        """Rank of every site of the model at these levels; sites outside the dimensions are dense."""
        ranks: Ranks = dict.fromkeys(self.budget.sites)
        for dimension, i in zip(self.dimensions, index, strict=True):
            ranks.update(zip((site.name for site in dimension.sites), dimension.levels[i].ranks, strict=True))
        return ranks

    def keeps(self, index: Sequence[int]) -> list[float]:
        """Keep ratio realised in each dimension (parameters over dense parameters)."""
        return [d.levels[i].keep for d, i in zip(self.dimensions, index, strict=True)]

    def keeps_of(self, ranks: Ranks) -> list[float]:
        """The ratios nearest to given ranks (another run's allocation, possibly of another space).

        Raises:
            RecipeError: a matrix of this model has no rank there.
        """
        missing = [site.name for d in self.dimensions for site in d.sites if site.name not in ranks]
        if missing:
            raise RecipeError(
                f"search.warm_start: that result has no rank for {missing[0]}; it is of another architecture"
            )
        storage = self.budget.storage
        return [sum(parameters(s, ranks[s.name], storage) for s in d.sites) / d.size for d in self.dimensions]


def make_space(
    structure: Structure,
    budget: Budget,
    layout: str = "5x1",
    dense_types: Sequence[str] = ("v",),
    multiple: int = 8,
    min_keep: float = 0.2,
    fill: bool = True,
) -> SearchSpace:
    """The space of a layout: ``5x1`` (all layers together; also for ``none``) or ``5x4`` (four runs of layers).

    Types a family does not have (gate in GPT-2 and OPT) have no dimension.

    Raises:
        RecipeError: an unknown type in ``dense_types``.
        BudgetError: not even the smallest allocation fits.
    """
    unknown = set(dense_types) - set(TYPES)
    if unknown:
        raise RecipeError(f"search.dense_types: unknown type {sorted(unknown)[0]!r}; known are {', '.join(TYPES)}")
    parts = 4 if layout == "5x4" else 1
    dimensions = []
    for part in range(parts):
        for types in _SHARED:
            sites = tuple(
                site
                for site in structure.sites
                if site.type in types
                and site.type not in dense_types
                and site.layer * parts // structure.num_layers == part
                and max_rank(site, multiple, budget.storage) > 0
            )
            if sites:
                name = "".join(types) + (f"/{part + 1}" if parts > 1 else "")
                dimensions.append(Dimension(name, sites, _levels(sites, multiple, min_keep, budget.storage)))
    return SearchSpace(dimensions, budget, fill, min_keep)


def hand_keeps(space: SearchSpace) -> list[float]:
    """The hand allocation (arXiv 2405.10616, section 4): q and k get less, the others the keep ratio, v is dense.

    The paper gives q, k 0.7 at keep 0.8 and 0.55 at 0.7, the line 1.5 keep - 0.5, which is continued to other ratios.
    """
    keep = space.budget.keep
    low = min(max(1.5 * keep - 0.5, space.min_keep), 1.0)
    return [low if dimension.name.startswith("qk") else max(keep, space.min_keep) for dimension in space.dimensions]
