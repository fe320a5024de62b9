"""What a run would do, without its weights: ``--dry-run``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.table import Table
from torch import Tensor

from bolaco.allocate.allocator import AllocationTask
from bolaco.checkpoint.write import check_savable
from bolaco.data.sources import on_hub
from bolaco.evaluation.objective import check_tokens
from bolaco.models.find import inspect_structure
from bolaco.models.load import resolve_device, skeleton_of
from bolaco.models.structure import Structure
from bolaco.recipe.recipe import LowRankRecipe, Recipe, TransformRecipe
from bolaco.report.tables import blocks_line, kept_lines, plan_table
from bolaco.runs.chop import kept_blocks
from bolaco.runs.session import open_source, texts_for
from bolaco.runs.warm import warm_ranks
from bolaco.storage.budget import Budget
from bolaco.work.files import require_space
from bolaco.work.output import work_beside


def _no_spectra() -> Mapping[str, Tensor]:
    raise AssertionError("a preview looks at no weights")


def preview_task(recipe: LowRankRecipe, structure: Structure) -> AllocationTask:
    """What an allocator gets to know before any weight is looked at."""
    units = recipe.form.units(structure, recipe.dense_types)
    budget = Budget(units.sites, recipe.keep, recipe.form)
    return AllocationTask(units, budget, recipe.search.rank_multiple, recipe.dense_types, _no_spectra)


def described(recipe: Recipe, out: Path | None = None, work: Path | None = None) -> Iterator[Table | str]:
    """What there is to say of a run, in order. Texts are read and cut, but for those that are on the hub.

    Args:
        recipe: of the run.
        out, work: where it would write, if that is known.

    Raises:
        BolacoError: what would stop the run and can be known before its weights are read.
    """
    if out is not None:
        work_beside(out, work)
    resolve_device(recipe.device)
    source = open_source(recipe.model, None, None)
    skeleton = skeleton_of(recipe.model, source.config)
    structure = inspect_structure(skeleton)
    texts = texts_for(recipe, source, local=True)
    for tokens in (texts.calibration, texts.evaluation):
        check_tokens(skeleton, tokens)
    check_savable(skeleton, source.tokenizer, compressed=isinstance(recipe, LowRankRecipe))
    if out is not None:
        size = sum(p.numel() for p in skeleton.parameters()) * skeleton.dtype.itemsize
        require_space([(out, size)], "the checkpoint")
    if isinstance(recipe, TransformRecipe):
        kept = kept_blocks(recipe, structure)
        size = sum(site.size for site in structure.sites if site.layer in kept)
        total = sum(site.size for site in structure.sites)
        yield blocks_line(kept, structure.num_layers)
        yield f"{size:,} of {total:,} parameters of the decoder linears stay ({size / total:.4f})"
        return
    yield from _factoring(recipe, preview_task(recipe, structure))


def _factoring(recipe: LowRankRecipe, task: AllocationTask) -> Iterator[Table | str]:
    allocator, calibration, validation = recipe.allocator, recipe.calibration, recipe.validation
    ranks = allocator.preview(task, recipe.allocator_options)
    warm_ranks(recipe, task.budget)
    yield plan_table(task.structure, task.budget, ranks, allocator.shows)
    yield from kept_lines(task.structure)
    unread = ", which is on the hub and was not read" if on_hub(calibration.source) else ""
    yield f"calibration: {calibration.sequences} x {calibration.seq_len} tokens of {calibration.source}{unread}"
    if allocator.shows != allocator.name and not allocator.searches:
        yield f"ranks come from the spectra of the matrices; the {allocator.shows} allocation is shown for its size"
    if allocator.searches:
        length = validation.seq_len or calibration.seq_len
        options = ", ".join(f"{name} {value}" for name, value in recipe.allocator_options.model_dump().items())
        yield (
            f"search {allocator.name} on {validation.sequences} x {length} tokens of "
            f"{validation.source or calibration.source}: {options}"
        )
