"""What a run would do, without its weights: ``--dry-run``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from bolaco.allocate.allocator import AllocationTask
from bolaco.checkpoint.write import check_savable
from bolaco.data.sources import is_self, on_hub
from bolaco.errors import UnsupportedModelError
from bolaco.evaluation.objective import check_tokens
from bolaco.models.find import inspect_structure
from bolaco.models.load import resolve_device, skeleton_of
from bolaco.models.structure import Structure
from bolaco.models.turns import needs_streaming
from bolaco.models.weights import StoredWeights, dtype_name, result_dtype, stored_weights
from bolaco.recipe.line import recipe_line
from bolaco.recipe.recipe import LowRankRecipe, Recipe, TransformRecipe
from bolaco.report.tables import blocks_line, kept_lines, larger_note, mib, plan_table
from bolaco.runs.chop import kept_blocks
from bolaco.runs.forecast import Amounts, Forecast, Machine, amounts_of, forecast
from bolaco.runs.session import open_source, texts_for
from bolaco.runs.size import Shapes, new_biases, refused_as_asked, settled
from bolaco.runs.tuning import tuning_settings
from bolaco.runs.warm import warm_ranks
from bolaco.storage.budget import Budget, Ranks
from bolaco.storage.coded import CodedStorage
from bolaco.work.files import require_space
from bolaco.work.folder import work_beside


def _no_spectra() -> Mapping[str, Tensor]:
    raise AssertionError("a preview looks at no weights")


def preview_task(recipe: LowRankRecipe, structure: Structure, dtype: torch.dtype) -> AllocationTask:
    """What an allocator gets to know before any weight is looked at; ``dtype`` is the result's."""
    units = recipe.units(structure)
    budget = Budget(units.sites, recipe.share, recipe.priced(dtype))
    return AllocationTask(units, budget, recipe.search.rank_multiple, recipe.dense_types, _no_spectra)


@dataclass(frozen=True)
class Preview:
    """What is known of a run before its weights are read.

    Attributes:
        recipe: settled on a keep ratio.
        shapes: of the model.
        stored: its weights on disk; None where they are not there yet.
        linears: parameters of the decoder linears afterwards.
        biases: parameters of the biases that they get.
        coded: bytes of quantized linears; None where they are not quantized.
        kept: decoder blocks that stay, of a transform.
        task, ranks: what an allocator gets to know, and its first allocation; None for a transform.
        amounts: tokens that are read; None for a transform.
    """

    recipe: Recipe
    shapes: Shapes
    stored: StoredWeights | None
    linears: int
    kept: tuple[int, ...]
    task: AllocationTask | None = None
    ranks: Ranks | None = None
    biases: int = 0
    coded: int | None = None
    amounts: Amounts | None = None

    @property
    def parameters(self) -> int:
        """Of the whole model afterwards."""
        return self.shapes.parameters - self.shapes.linears + self.linears + self.biases

    @property
    def bytes(self) -> int:
        """Of its weights."""
        if self.coded is not None:
            return self.shapes.bytes_at(self.biases) + self.coded
        return self.shapes.bytes_at(self.linears + self.biases)


def preview(recipe: Recipe, out: Path | None = None, work: Path | None = None) -> Preview:
    """Does everything but read weights. Texts are read and cut, but for those that are on the hub.

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
    model = skeleton_of(recipe.model, source.config)
    structure, stored = inspect_structure(model), stored_weights(recipe.model)
    shapes = Shapes(model, structure, result_dtype(recipe.dtype, stored, model.dtype))
    asked, recipe = recipe, settled(recipe, shapes)
    # In the order of a run, so that the same is said first.
    texts = texts_for(recipe, source, local=True)
    for tokens in (texts.calibration, texts.evaluation):
        check_tokens(model, tokens)
    check_savable(model, source.tokenizer, compressed=isinstance(recipe, LowRankRecipe))
    with refused_as_asked(asked, shapes):
        found = _planned(recipe, shapes, stored)
    if isinstance(recipe, LowRankRecipe):
        found = replace(found, amounts=amounts_of(recipe, texts))
    if out is not None:
        require_space([(out, shapes.bytes_at(shapes.linears))], "the checkpoint")
    return found


def _planned(recipe: Recipe, shapes: Shapes, stored: StoredWeights | None) -> Preview:
    """What a settled recipe comes to.

    Raises:
        BudgetError: its size cannot be met.
    """
    structure = shapes.structure
    if isinstance(recipe, TransformRecipe):
        kept = kept_blocks(recipe, structure)
        linears = sum(site.size for site in structure.sites if site.layer in kept)
        return Preview(recipe, shapes, stored, linears, kept)
    if recipe.quantization is not None:
        check_quantizable(structure)
    task = preview_task(recipe, structure, shapes.dtype)
    ranks = recipe.allocator.preview(task, recipe.allocator_options)
    warm_ranks(recipe, task.budget)
    blocks = tuple(range(structure.num_layers))
    factored = (site for site in task.structure.sites if ranks.get(site.name) is not None)
    biases = new_biases(recipe, factored)
    linears = Budget(task.structure.sites, 1.0, recipe.form).cost(ranks)
    coded = None
    if recipe.quantization is not None:
        storage = CodedStorage(recipe.form, recipe.quantization.options, recipe.quantization.group, shapes.dtype)
        coded = Budget(task.structure.sites, 1.0, storage.cheapest()).cost(ranks) // 8
    return Preview(recipe, shapes, stored, linears, blocks, task, ranks, biases, coded)


def forecast_of(found: Preview) -> Forecast | None:
    """What the run will take on this machine, which is measured for it; None for a transform."""
    recipe, shapes, amounts = found.recipe, found.shapes, found.amounts
    if not isinstance(recipe, LowRankRecipe) or found.task is None or found.ranks is None or amounts is None:
        return None
    device = resolve_device(recipe.device)
    streamed = device.type == "cpu" and needs_streaming(shapes.bytes_in_memory, recipe.stream)
    return forecast(recipe, shapes, found.task, found.ranks, amounts, Machine(device), streamed)


def check_quantizable(structure: Structure) -> None:
    """Raises UnsupportedModelError for a model whose matrices cannot be quantized."""
    experts = next((site for unit in structure.sites for site in unit.members if site.expert is not None), None)
    if experts is not None:
        raise UnsupportedModelError(f"{experts.name}: matrices of experts cannot be quantized; leave out --quantize")


def described(recipe: Recipe, out: Path | None = None, work: Path | None = None) -> Iterator[Table | str]:
    """What there is to say of a run, in order; arguments and errors are those of :func:`preview`."""
    found = preview(recipe, out, work)
    yield recipe_line(recipe)
    if recipe.tuning is not None:
        settings = tuning_settings(recipe, Path(recipe.model))
        yield f"the result is tuned: mode {settings.mode} on {settings.data.source}"
    size, shapes = found.linears, found.shapes
    if found.task is None or found.ranks is None or not isinstance(found.recipe, LowRankRecipe):
        yield blocks_line(found.kept, shapes.structure.num_layers)
        yield f"{size:,} of {shapes.linears:,} parameters of the decoder linears stay ({size / shapes.linears:.4f})"
    else:
        yield from _factoring(found.recipe, found.task, found.ranks)
    yield from _sizes(found)
    expected = forecast_of(found)
    if expected is not None:
        yield expected.line


def values(recipe: Recipe, out: Path | None = None, work: Path | None = None) -> dict[str, Any]:
    """The same for programs; the fields are in docs/json.md."""
    found = preview(recipe, out, work)
    shapes, stored = found.shapes, found.stored
    expected = forecast_of(found)
    return {
        "dry_run": True,
        "model": recipe.model,
        "method": recipe.method.name,
        "keep": found.recipe.share,
        "parameters": found.parameters,
        "parameters_dense": shapes.parameters,
        "parameters_linears": found.linears,
        "parameters_linears_dense": shapes.linears,
        "bytes": found.bytes,
        "bytes_dense": None if stored is None else stored.bytes,
        "dtype": dtype_name(shapes.dtype),
        "dtype_dense": None if stored is None else stored.format,
        "layers": list(found.kept),
        "layers_dense": shapes.structure.num_layers,
        "ranks": found.ranks or {},
        "kept": [{"name": k.name, "parameters": k.size, "reason": k.reason} for k in shapes.structure.kept],
        "forecast": None if expected is None else asdict(expected),
        "recipe": recipe.model_dump(mode="json"),
    }


def _sizes(found: Preview) -> Iterator[str]:
    """The whole model beside the original."""
    stored, dtype = found.stored, dtype_name(found.shapes.dtype)
    yield f"whole model: {found.parameters:,} parameters, {mib(found.bytes)} in {dtype}"
    if stored is not None:
        yield f"the original: {found.shapes.parameters:,} parameters, {mib(stored.bytes)} on disk ({stored.format})"
        yield from larger_note(found.bytes, dtype, stored.bytes, stored.format)


def _factoring(recipe: LowRankRecipe, task: AllocationTask, ranks: Ranks) -> Iterator[Table | str]:
    allocator, calibration, validation = recipe.allocator, recipe.calibration, recipe.validation
    yield plan_table(task.structure, task.budget, ranks, allocator.shows)
    yield from kept_lines(task.structure)
    unread = ", which is on the hub and was not read" if on_hub(calibration.source) else ""
    unread = ", which the model writes in the run" if is_self(calibration.source) else unread
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
