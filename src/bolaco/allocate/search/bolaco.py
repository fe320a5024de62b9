"""Bolaco's search for ranks (arXiv 2405.10616): a keep ratio for each matrix type, tried on validation text.

``5x1`` has one ratio for each type, ``5x4`` one for each type and quarter of the depth. The hand allocation and a few
random ones come first, then a Gaussian process proposes.
"""

from __future__ import annotations

from bolaco.allocate.allocator import Allocation, AllocationTask, Allocator
from bolaco.allocate.allocators.hand import hand_ranks
from bolaco.allocate.search.options import BolacoOptions


def _allocate(task: AllocationTask, options: BolacoOptions, parts: int) -> Allocation:
    # Imported when there is something to search: BoTorch and Optuna take seconds.
    from bolaco.allocate.search.run import allocate_in

    return allocate_in(task, options, parts)


def bolaco_allocator(name: str, summary: str, parts: int) -> Allocator:
    """The search in the space of so many runs of layers."""
    return Allocator(
        name=name,
        paper="arXiv 2405.10616",
        summary=summary,
        allocate=lambda task, options: _allocate(task, options, parts),
        preview=lambda task, options: hand_ranks(task, options, parts),
        shows="hand",
        options=BolacoOptions,
        dense_types=("v",),
        searches=True,
        warms=True,
        stacks=False,
    )
