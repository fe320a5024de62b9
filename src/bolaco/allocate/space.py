"""The spaces 5x1 and 5x4 of arXiv 2405.10616: a few keep ratios, each shared by many matrices.

A dimension's ratio moves in levels, one for each step of a rank of its matrices to the next multiple, with dense on
top. A level's ratio is what it costs, so an allocation's ratios lead back to the same levels. Every allocation a search
evaluates is a level per dimension, so budgets are settled in integers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import Field

from bolaco.allocate.allocator import AllocationTask
from bolaco.errors import RecipeError
from bolaco.models.labels import TYPES, ordered
from bolaco.models.structure import Site, Structure
from bolaco.settings import Section
from bolaco.storage.budget import Budget, Ranks
from bolaco.storage.storage import Storage

# Types that share a ratio, in the order of the search dimensions; v joins when it is not left dense.
_SHARED = (("q", "k"), ("qk",), ("v",), ("o",), ("gate",), ("up",), ("gate_up",), ("down",))

# What to do where not even the lowest ranks fit, and no smallest ratio is in the way.
NO_FLOOR = "raise --keep, or let more types be factored (search.dense_types)"


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
        """Cost when dense: the last level is."""
        return self.levels[-1].cost

    def at(self, keep: float) -> int:
        """Index of the highest level not above ``keep``; the lowest level for ratios below all."""
        return max(bisect_right([level.keep for level in self.levels], keep + 1e-9) - 1, 0)


def _levels(sites: Sequence[Site], multiple: int, min_keep: float, storage: Storage) -> tuple[Level, ...]:
    size = sum(storage.dense_cost(site) for site in sites)
    ratios = {min_keep}
    for site in sites:
        for rank in range(multiple, storage.max_rank(site, multiple) + 1, multiple):
            ratio = storage.parameters(site, rank) / storage.dense_cost(site)
            if ratio > min_keep:
                ratios.add(ratio)
    found: list[Level] = []
    for ratio in [*sorted(ratios), 1.0]:
        ranks = tuple(storage.rank_for(site, ratio, multiple) for site in sites)
        cost = sum(storage.parameters(site, rank) for site, rank in zip(sites, ranks, strict=True))
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
            raise budget.too_small(
                lowest, "raise --keep, lower search.min_keep, or let more types be factored (search.dense_types)"
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
        """The ratios nearest to given ranks (another run's allocation, possibly of another space)."""
        storage = self.budget.storage
        return [sum(storage.parameters(s, ranks[s.name]) for s in d.sites) / d.size for d in self.dimensions]


def make_space(
    structure: Structure,
    budget: Budget,
    parts: int = 1,
    dense_types: Sequence[str] = ("v",),
    multiple: int = 8,
    min_keep: float = 0.2,
    fill: bool = True,
) -> SearchSpace:
    """The space with a ratio for each matrix type in each of ``parts`` runs of layers: 1 is the paper's 5x1, 4 its 5x4.

    Types a family does not have (gate in GPT-2 and OPT) have no dimension.

    Raises:
        RecipeError: an unknown type in ``dense_types``.
        BudgetError: not even the smallest allocation fits.
    """
    known = structure.types | set(TYPES)
    unknown = set(dense_types) - known
    if unknown:
        raise RecipeError(
            f"search.dense_types: unknown type {sorted(unknown)[0]!r}; known are {', '.join(ordered(known))}"
        )
    grouped = {kind for types in _SHARED for kind in types}
    families = (*_SHARED, *((kind,) for kind in ordered(structure.types - grouped)))
    dimensions = []
    for part in range(parts):
        for types in families:
            sites = tuple(
                site
                for site in structure.sites
                if site.type in types
                and site.type not in dense_types
                and site.layer * parts // structure.num_layers == part
                and budget.storage.max_rank(site, multiple) > 0
            )
            if sites:
                name = "".join(types) + (f"/{part + 1}" if parts > 1 else "")
                dimensions.append(Dimension(name, sites, _levels(sites, multiple, min_keep, budget.storage)))
    return SearchSpace(dimensions, budget, fill, min_keep)


class SpaceOptions(Section):
    """How ratios become ranks."""

    min_keep: float = Field(0.2, gt=0, lt=1, description="smallest ratio of a dimension")
    fill: bool = Field(True, description="raise ranks until no affordable multiple is left")


def space_of(task: AllocationTask, options: SpaceOptions, parts: int = 1) -> SearchSpace:
    """The space of a task."""
    return make_space(
        task.structure, task.budget, parts, task.dense_types, task.multiple, options.min_keep, options.fill
    )


def uniform_preview(task: AllocationTask) -> Ranks:
    """One ratio for all matrices, down to the lowest rank of each: what an allocation of this size looks like.

    Raises:
        BudgetError: not even the lowest ranks fit.
    """
    storage, budget = task.budget.storage, task.budget
    least = 0
    for site in task.structure.sites:
        factored = site.type not in task.dense_types and storage.max_rank(site, task.multiple) > 0
        least += storage.cost(site, task.multiple) if factored else storage.dense_cost(site)
    if least > budget.limit:
        raise budget.too_small(least, NO_FLOOR)
    space = space_of(task, SpaceOptions(min_keep=1e-9))
    return space.ranks(space.settle([budget.keep] * len(space.names)))
