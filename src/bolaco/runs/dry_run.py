"""What a run would do, without its weights: ``--dry-run``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.table import Table
from torch import Tensor

from bolaco.allocate.allocator import AllocationTask
from bolaco.models.find import inspect_structure, meta_model
from bolaco.models.load import load_config
from bolaco.models.lowrank import refuse_compressed
from bolaco.models.structure import Structure
from bolaco.recipe.recipe import LowRankRecipe, Recipe, TransformRecipe
from bolaco.report.tables import blocks_line, kept_lines, plan_table
from bolaco.runs.chop import kept_blocks
from bolaco.runs.tuning import tuning_settings
from bolaco.storage.budget import Budget


def _no_spectra() -> Mapping[str, Tensor]:
    raise AssertionError("a preview looks at no weights")


def preview_task(recipe: LowRankRecipe, structure: Structure) -> AllocationTask:
    """What an allocator gets to know before any weight is looked at."""
    units = recipe.units(structure)
    budget = Budget(units.sites, recipe.keep, recipe.form)
    return AllocationTask(units, budget, recipe.search.rank_multiple, recipe.dense_types, _no_spectra)


def described(recipe: Recipe) -> Iterator[Table | str]:
    """What there is to say of a run, in order.

    Raises:
        BolacoError: what would stop the run and can be known before its weights are read.
    """
    config = load_config(recipe.model)
    if recipe.tuning is not None:
        settings = tuning_settings(recipe, Path(recipe.model))
        yield f"the result is tuned: mode {settings.mode} on {settings.data.source}"
    refuse_compressed(config)
    structure = inspect_structure(meta_model(config))
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
    yield plan_table(task.structure, task.budget, ranks, allocator.shows)
    yield from kept_lines(task.structure)
    yield f"calibration: {calibration.sequences} x {calibration.seq_len} tokens of {calibration.source}"
    if allocator.shows != allocator.name and not allocator.searches:
        yield f"ranks come from the spectra of the matrices; the {allocator.shows} allocation is shown for its size"
    if allocator.searches:
        length = validation.seq_len or calibration.seq_len
        options = ", ".join(f"{name} {value}" for name, value in recipe.allocator_options.model_dump().items())
        yield (
            f"search {allocator.name} on {validation.sequences} x {length} tokens of "
            f"{validation.source or calibration.source}: {options}"
        )
