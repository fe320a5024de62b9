"""What an allocator is: a function from a budget and the spectra of the matrices to a rank for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bolaco.data.settings import Validation
from bolaco.factorize.noise import Noise
from bolaco.factorize.store import FactorStore
from bolaco.models.structure import Structure
from bolaco.models.subject import Subject
from bolaco.plugins import Registry, in_folder
from bolaco.progress import Reporter
from bolaco.settings import Section
from bolaco.storage.budget import Budget, Ranks


@dataclass(frozen=True)
class Trial:
    """One allocation that was evaluated.

    Attributes:
        keep: keep ratio of each dimension of the search.
        ranks: of each dimension, the ranks of its matrix types.
        objective: what the search minimises.
        perplexity, kl: what that is made of.
        seconds: it took.
    """

    keep: dict[str, float]
    ranks: dict[str, list[int | None]]
    objective: float
    perplexity: float
    kl: float
    seconds: float


@dataclass(frozen=True)
class Allocation:
    """Ranks, and how they were found.

    Attributes:
        ranks: of every site.
        dimensions: names of the dimensions of the search, if it was one.
        trials: in order.
        notes: numbers that say what the rule came to, by name.
        bits: of every site, where the allocator chose them; else empty.
    """

    ranks: Ranks
    dimensions: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    notes: Mapping[str, float] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Trials:
    """What it takes to try allocations on text.

    Attributes:
        subject: what was factored.
        factors: of all its matrices that may be factored.
        candidates: ``[sequences, length]``, the validation text.
        settings: how many of them are used, and how they are selected.
        folder: of the ledger, which outlives the run.
        reporter: where progress goes.
        timed: opens a stage whose seconds count.
    """

    subject: Subject
    factors: FactorStore
    candidates: Tensor
    settings: Validation
    folder: Path
    reporter: Reporter
    timed: Callable[[str], Any]


@dataclass(frozen=True)
class AllocationTask:
    """What an allocator gets to know.

    Attributes:
        structure: the decoder; its sites are what gets a rank, or stays dense.
        budget: parameters allowed, and the storage, which decides what a rank costs.
        multiple: ranks are multiples of it.
        dense_types: matrix types that stay dense.
        spectra: reads the squared errors by component of the matrices that may be factored, descending, by site name.
        comparable: whether errors of different matrices are in one unit.
        seed: of the run.
        warm: ranks of an earlier result to start from.
        trials: for allocators that search; None for the others.
        noise: reads the errors that codes of some bits add, by bits and site name; None where bits are not chosen. The
            budget is then one of bits, and its storage a :class:`bolaco.storage.coded.CodedStorage`.
    """

    structure: Structure
    budget: Budget
    multiple: int
    dense_types: tuple[str, ...]
    spectra: Callable[[], Mapping[str, Tensor]]
    comparable: bool = False
    seed: int = 0
    warm: Ranks | None = None
    trials: Trials | None = None
    noise: Callable[[], Mapping[int, Mapping[str, Noise]]] | None = None


def _never(options: Section) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Allocator:
    """A way to find ranks.

    Attributes:
        name: what ``--search`` takes.
        paper: where it is from.
        summary: one line for ``bolaco methods``.
        allocate: the ranks for a task, from it and the allocator's options. BudgetError where none fit.
        preview: ranks that need no look at the weights, for ``--dry-run``, from the same; raises what can be known to
            be wrong before a run.
        shows: what the preview is called: the allocation itself, or one that only shows its size.
        options: what ``--set search.NAME=VALUE`` can change, beside what all allocators have.
        dense_types: matrix types that stay dense unless the recipe names others.
        searches: whether it evaluates allocations on the validation text.
        warms: whether it takes ``search.warm_start``.
        stacks: whether it can give a rank to a stack of matrices.
        chooses_bits: whether it gives bits to matrices, where :attr:`AllocationTask.noise` says what they cost.
        offers: from its options, whether it looks at the stacks that are offered in the place of matrices.
    """

    name: str
    paper: str
    summary: str
    allocate: Callable[[AllocationTask, Any], Allocation]
    preview: Callable[[AllocationTask, Any], Ranks]
    shows: str
    options: type[Section]
    dense_types: tuple[str, ...] = ()
    searches: bool = False
    warms: bool = False
    stacks: bool = True
    chooses_bits: bool = False
    offers: Callable[[Any], bool] = _never


ALLOCATORS = Registry(
    "search",
    "search.name",
    Allocator,
    in_folder("bolaco.allocate.allocators", "ALLOCATOR")
    | {f"5x{parts}": f"bolaco.allocate.search.bolaco_5x{parts}:ALLOCATOR" for parts in (1, 4)},
    group="bolaco.allocators",
)
