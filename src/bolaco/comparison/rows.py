"""One row of a comparison: an ordinary run of its recipe, measured on everything that is reported."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.checkpoint.info import CompressedInfo, read_curves, read_info
from bolaco.comparison.plan import Comparison, row_name
from bolaco.data.sources import fingerprint
from bolaco.data.texts import Texts
from bolaco.errors import BolacoError, ResumeError, no_memory, no_space
from bolaco.evaluation.perplexity import PerplexityResult, perplexity
from bolaco.evaluation.tasks import TaskSet, evaluate_tasks
from bolaco.models.load import load_model
from bolaco.models.weights import dtype_name
from bolaco.parallel import team
from bolaco.recipe.recipe import LowRankRecipe, Recipe
from bolaco.report.record import FailedRow, Row, RowResult
from bolaco.runs.chop import chop_loaded
from bolaco.runs.compress import compress_loaded
from bolaco.runs.measure import dense_perplexity
from bolaco.runs.session import Loaded, Session
from bolaco.work.folder import Artefact, Clock
from bolaco.work.memory import PeakMemory

# What a method can stumble over at one point; anything else is a defect and stops the comparison.
_FAILURES = (BolacoError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class Common:
    """What all rows have in common.

    Attributes:
        comparison: what is compared.
        loaded: the original.
        texts: of each row, by its name.
        tasks: what accuracy is measured on, if on anything.
        session: of the comparison.
    """

    comparison: Comparison
    loaded: Loaded
    texts: Mapping[str, Texts]
    tasks: TaskSet | None
    session: Session

    def places(self) -> dict[str, Path]:
        """Where the checkpoint of each row is, while it is kept."""
        return {name: row_artefact(self, name).path for name in self.comparison.recipes}


class DenseResults(BaseModel):
    """The original on all texts, by source, and on all tasks."""

    model_config = ConfigDict(frozen=True)

    texts: list[tuple[str, PerplexityResult]]
    tasks: dict[str, dict[str, Any]]


def row_artefact(common: Common, name: str) -> Artefact:
    """Where a row is kept: its record, and its checkpoint."""
    comparison, texts = common.comparison, common.texts[name]
    recipe = comparison.recipes[name]
    return common.session.folder.artefact(
        "row",
        row=name,
        model=common.loaded.identity,
        recipe=recipe,
        text=[fingerprint(texts.calibration), texts.measured],
        candidates=None if texts.candidates is None else fingerprint(texts.candidates),
        tasks=[comparison.tasks, comparison.task_limit] if _with_tasks(comparison, recipe) else None,
    )


def finished_row(common: Common, name: str) -> Row | None:
    """A row that is recorded already; its checkpoint is there too if it is part of the result."""
    artefact = row_artefact(common, name)
    row: Row | None = artefact.read(Row)  # type: ignore[arg-type]  # a union is no type to mypy
    lost = isinstance(row, RowResult) and common.comparison.keep_models and not artefact.path.is_dir()
    return None if lost else row


def _with_tasks(comparison: Comparison, recipe: Recipe) -> bool:
    return bool(comparison.tasks) and getattr(recipe, comparison.size) == comparison.task_keep


def one_line(error: BaseException) -> str:
    """An error as a cell of a table."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, BolacoError) else f"{type(error).__name__}: {text}"


def expected_failure(error: BaseException) -> bool:
    """Whether a failure is a row's own; a full disk, a full memory or a damaged work folder is not."""
    if isinstance(error, ResumeError) or no_space(error) or no_memory(error):
        return False
    return isinstance(error, _FAILURES)


def finite(value: float) -> float | None:
    """The value, or None for infinity and NaN."""
    return value if math.isfinite(value) else None


def _log_ratio(after: float, before: float) -> float | None:
    return math.log(after) - math.log(before) if math.isfinite(after) and math.isfinite(before) else None


def _measured(
    common: Common, model: PreTrainedModel, texts: Sequence[tuple[str, Tensor]], batch: int, what: str
) -> list[PerplexityResult]:
    with common.session.reporter.stage(f"evaluate {what}", sum(len(blocks) for _, blocks in texts)) as tick:
        return [perplexity(model, blocks, batch, tick) for _, blocks in texts]


def _accuracies(common: Common, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    assert common.tasks is not None  # asked for where there are some
    scores = evaluate_tasks(
        model,
        common.tasks,
        limit=common.comparison.task_limit,
        tokenizer=common.loaded.tokenizer,
        reporter=common.session.reporter,
    )
    return {score.task: score.record for score in scores}


def measured_dense(common: Common) -> DenseResults:
    """The original on all texts and tasks."""
    comparison, session, loaded = common.comparison, common.session, common.loaded
    name, recipe = next(iter(comparison.recipes.items()))
    texts, batch = common.texts[name], recipe.validation.batch
    artefact = session.folder.artefact(
        "dense-all",
        model=loaded.identity,
        text=texts.measured,
        batch=batch,
        tasks=[comparison.tasks, comparison.task_limit],
    )
    known = artefact.read(DenseResults)
    if known is None:
        with session.clock.timed("dense evaluation"):
            found = [dense_perplexity(loaded, texts, batch, session)]
            found += _measured(common, loaded.model, texts.others, batch, "the original on other texts")
            sources = [texts.evaluation_source, *(source for source, _ in texts.others)]
            tasks = _accuracies(common, loaded.model) if common.tasks is not None else {}
        known = DenseResults(texts=list(zip(sources, found, strict=True)), tasks=tasks)
        artefact.write(known)
    return known


def make_row(common: Common, dense: DenseResults, method: str, keep: float, failed: str | None) -> Row:
    """Runs one recipe and measures the result; a failure of its own is recorded instead.

    Args:
        common: what all rows have in common.
        dense: the original's results.
        method, keep: which row.
        failed: why its factors could not be computed, if that is known already.
    """
    name = row_name(method, keep)
    recipe = common.comparison.recipes[name]
    head = {"name": name, "method": method, "keep": keep}
    tail = {"recipe": recipe.model_dump(mode="json"), "recipe_yaml": recipe.to_yaml()}
    try:
        if failed is not None:
            raise BolacoError(failed)
        return RowResult.model_validate(head | _result(common, name, recipe, dense) | tail)
    except Exception as error:
        if not expected_failure(error):
            raise
        return FailedRow.model_validate(head | {"error": one_line(error)} | tail)


def _result(common: Common, name: str, recipe: Recipe, dense: DenseResults) -> dict[str, Any]:
    out, texts = row_artefact(common, name).path, common.texts[name]
    memory = PeakMemory()
    # A run that was killed between the checkpoint and its record has left it; its memory is not known any more.
    found = team.agreed(out.exists())
    info = read_info(out) if found else _run(common, recipe, out, texts)
    with_tasks = _with_tasks(common.comparison, recipe)

    def more() -> tuple[list[float], dict[str, float], dict[str, dict[str, Any]]]:
        """Perplexities on other texts, the seconds of that, accuracies."""
        if not texts.others and not with_tasks:
            return [], {}, {}
        # In the arithmetic of the original, as for the first text.
        compressed = load_model(str(out), dtype_name(common.loaded.model.dtype), str(common.loaded.model.device))
        others = _measured(common, compressed, texts.others, recipe.validation.batch, "on other texts")
        took = {"other texts": round(sum(result.seconds for result in others), 3)} if others else {}
        return [result.perplexity for result in others], took, _accuracies(common, compressed) if with_tasks else {}

    perplexities, took, tasks = team.first(more)
    results, seconds = [info.perplexity.compressed, *perplexities], dict(info.seconds) | took
    before = [text.perplexity for _, text in dense.texts]
    values = json.loads(info.model_dump_json())
    kept = (
        "keep_linears",
        "keep_model",
        "parameters",
        "parameters_linears",
        "bytes",
        "storage",
        "ranks",
        "stacks",
        "trials",
    )
    return {
        **{field: values[field] for field in (*kept, "versions")},
        "perplexity": [finite(value) for value in results],
        "gap": [_log_ratio(after, dense) for after, dense in zip(results, before, strict=True)],
        "tasks": tasks,
        "seconds": seconds,
        "peak_bytes": None if found else memory.bytes(),
        "curves": read_curves(out),
    }


def _run(common: Common, recipe: Recipe, out: Path, texts: Texts) -> CompressedInfo:
    """The run of a recipe, whose seconds are its own."""
    session = common.session
    own = Session(
        session.folder, Clock(session.folder.path, {"row": recipe}, session.reporter.detail), session.reporter
    )
    if isinstance(recipe, LowRankRecipe):
        return compress_loaded(recipe, out, common.loaded, texts, own).info
    team.first(lambda: chop_loaded(recipe, out, common.loaded, texts, own).path.name)
    return read_info(out)
