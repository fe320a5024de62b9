"""The hand allocation (arXiv 2405.10616, section 4): q and k get less, the others the keep ratio, v is dense."""

from __future__ import annotations

from bolaco.allocate.allocator import Allocation, AllocationTask, Allocator
from bolaco.allocate.space import SearchSpace, SpaceOptions, space_of
from bolaco.storage.budget import Ranks


def hand_keeps(space: SearchSpace) -> list[float]:
    """Keep ratio of each dimension.

    The paper gives q, k 0.7 at keep 0.8 and 0.55 at 0.7, the line 1.5 keep - 0.5, which is continued to other ratios.
    """
    keep = space.budget.keep
    low = min(max(1.5 * keep - 0.5, space.min_keep), 1.0)
    return [low if dimension.name.startswith("qk") else max(keep, space.min_keep) for dimension in space.dimensions]


def hand_ranks(task: AllocationTask, options: SpaceOptions, parts: int = 1) -> Ranks:
    """Ranks nearest to these ratios, within the budget."""
    space = space_of(task, options, parts)
    return space.ranks(space.settle(hand_keeps(space)))


ALLOCATOR = Allocator(
    name="hand",
    paper="arXiv 2405.10616",
    summary="the paper's allocation by hand: q and k get less, v stays dense",
    allocate=lambda task, options: Allocation(hand_ranks(task, options)),
    preview=hand_ranks,
    shows="hand",
    options=SpaceOptions,
    dense_types=("v",),
    stacks=False,
)
