"""The same keep ratio for every matrix."""

from __future__ import annotations

from bolaco.allocate.allocator import Allocation, AllocationTask, Allocator
from bolaco.allocate.space import SpaceOptions, space_of
from bolaco.storage.budget import Ranks


def uniform_ranks(task: AllocationTask, options: SpaceOptions) -> Ranks:
    """Ranks of the keep ratio, rounded down; what rounding leaves goes to the types that are furthest below it."""
    keep = task.budget.keep
    # A ratio below the usual smallest one is what was asked for.
    space = space_of(task, options.model_copy(update={"min_keep": min(options.min_keep, keep)}))
    return space.ranks(space.settle([keep] * len(space.names)))


ALLOCATOR = Allocator(
    name="uniform",
    paper="",
    summary="one ratio for all matrices",
    allocate=lambda task, options: Allocation(uniform_ranks(task, options)),
    preview=uniform_ranks,
    shows="uniform",
    options=SpaceOptions,
)
