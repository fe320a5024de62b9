"""A comparison, from model to tables, top to bottom.

What the rows have in common is computed once: loss gradients, the pass over the calibration text, factors of each
method up to the largest rank that any row needs, the dense model's evaluation. Each row is then an ordinary run of its
recipe in the comparison's own work folder, where it finds all that. A row that is finished is an artefact like any
other, so a comparison that was killed goes on with the next row.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bolaco.checkpoint.info import versions
from bolaco.checkpoint.write import check_savable
from bolaco.comparison.plain import check_forms, quantized_rows
from bolaco.comparison.plan import Comparison, row_name
from bolaco.comparison.rows import (
    Common,
    DenseResults,
    expected_failure,
    finished_row,
    finite,
    make_row,
    measured_dense,
    one_line,
    row_artefact,
)
from bolaco.comparison.write import write_results, write_so_far
from bolaco.data.memory import InMemory
from bolaco.data.texts import Texts
from bolaco.errors import DataError
from bolaco.evaluation.tasks import read_tasks
from bolaco.models.subject import Subject
from bolaco.models.weights import dtype_name
from bolaco.parallel import team
from bolaco.progress import Reporter
from bolaco.recipe.recipe import LowRankRecipe, Recipe
from bolaco.report.comparison import asked_words
from bolaco.report.record import (
    ComparisonRecord,
    DenseRecord,
    FailedRow,
    QuantizedRecord,
    Row,
    RowResult,
    TextRecord,
    read_record,
)
from bolaco.runs.factors import FactorPlan, carry_out, estimate_statistics, factor_bytes, plan_factors
from bolaco.runs.session import Source, begin, load, open_source, texts_for, work_folder
from bolaco.runs.written import with_own_text
from bolaco.work.files import require_space
from bolaco.work.folder import digest
from bolaco.work.memory import PeakMemory


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison leaves: the folder, and what its ``results.json`` says."""

    path: Path
    record: ComparisonRecord

    @property
    def failed(self) -> list[FailedRow]:
        """Rows without a result."""
        return [row for row in self.record.rows if isinstance(row, FailedRow)]


def compare(
    comparison: Comparison,
    out: Path,
    reporter: Reporter,
    work: Path | None = None,
    keep_work: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    given: Mapping[str, InMemory] | None = None,
) -> ComparisonResult:
    """Runs every row and writes ``out``: tables, a picture, a report, results and recipes; checkpoints if asked.

    ``model`` and ``tokenizer`` stand in for loading ``comparison.model``; they are not changed. ``given`` are texts in
    memory by the names that the recipes have for them.

    Raises:
        BolacoError: anything the user can mend, in one line. What fails at one row only is recorded there instead.
    """
    first = next(iter(comparison.recipes.values()))
    check_forms(comparison.quantized)
    tasks = read_tasks(comparison.tasks) if comparison.tasks else None
    # Which model it was that an earlier call was given is not known.
    with work_folder(comparison, out, work, model is None, first.device, reporter) as (folder, reporter):
        if folder.taken_up(reporter, keep_work):
            return ComparisonResult(out, read_record(out / "results.json"))
        session = begin(folder, comparison, reporter)
        with session.clock.timed("load"):
            reporter.say(f"loading {comparison.model}")
            source = team.each(lambda: open_source(comparison.model, model, tokenizer, given))
        source = with_own_text(comparison.recipes.values(), source, session, comparison.others)
        with session.clock.timed("load"):
            texts = team.each(lambda: _texts(comparison, source))
            loaded = team.each(lambda: load(source, first.dtype, first.device, None, first.stream, session))
            check_savable(loaded.model, loaded.tokenizer)
        common = Common(comparison, loaded, texts, tasks, session)
        dense = DenseResults.model_validate(team.first(lambda: measured_dense(common).model_dump()))
        plain = quantized_rows(common, dense)
        failed = _prepare(common)
        rows = _rows(common, dense, plain, failed)
        record = _record(common, dense, plain, rows)

        def write() -> None:
            with folder.output(out) as partial:
                write_results(partial, record, common.places() if comparison.keep_models else {})

        team.first(write)
        folder.close(keep_work)
    return ComparisonResult(out, record if team.is_first() else read_record(out / "results.json"))


def _texts(comparison: Comparison, source: Source) -> dict[str, Texts]:
    """Texts by row name; all rows are measured on the same tokens.

    Raises:
        DataError: unreadable, too short, or not the same.
    """
    known: dict[str, Texts] = {}
    found: dict[str, Texts] = {}
    first = next(iter(comparison.recipes))
    # Recipes that share a pass share its text, those that do not need it too.
    readers = {digest(recipe.calibration) for recipe in comparison.recipes.values() if recipe.calibrates}
    for name, recipe in comparison.recipes.items():
        reads = digest(recipe.calibration) in readers
        sections = (recipe.calibration, recipe.validation, recipe.evaluation)
        key = digest([*sections, recipe.bos, recipe.searches, reads])
        if key not in known:
            try:
                known[key] = texts_for(recipe, source, reads, comparison.others)
            except DataError as error:
                raise error if name == first else DataError(f"{name}: {error}") from None
        found[name] = known[key]
        if found[name].measured != found[first].measured:
            raise DataError(
                f"{first} and {name} would be measured on different tokens, because one of them searches on a part of "
                "the evaluation text or has other windows; give --eval a source of its own, and evaluation.seq_len and "
                "evaluation.windows for all"
            )
    return found


def _prepare(common: Common) -> dict[str, str]:
    """Statistics and factors of every row that is not finished: one pass over each text for all methods.

    Returns:
        Of rows whose factors could not be computed, why, by name.
    """
    plans: dict[str, FactorPlan] = {}
    rows: dict[str, list[str]] = {}
    for name, recipe in common.comparison.recipes.items():
        plan = _common_plan(common, name, recipe) if finished_row(common, name) is None else None
        if plan is None:
            continue
        key = plan.artefact.key
        known = plans.get(key, plan)
        higher = {site: max(rank, known.top.get(site, 0)) for site, rank in plan.top.items()}
        plans[key] = replace(known, top=dict(known.top) | higher)
        rows.setdefault(key, []).append(name)
    # One checkpoint at a time.
    size = factor_bytes(list(plans.values()), common.session) + common.loaded.parameters * common.loaded.dtype.itemsize
    team.first(lambda: require_space([(common.session.folder.path, size)], "the factors and a checkpoint"))
    failed: dict[str, str] = {}
    passes: dict[str, list[FactorPlan]] = {}
    for plan in plans.values():
        with common.session.clock.timed("loss gradients"):
            why = _attempt(partial(estimate_statistics, plan, common.session))
        if why is None:
            passes.setdefault(plan.pass_key, []).append(plan)
        else:
            failed |= dict.fromkeys(rows[plan.artefact.key], why)
    for group in passes.values():
        with common.session.clock.timed("statistics and factors"):
            if _attempt(partial(carry_out, group, common.session)) is None:
                continue
            # Whose fault it was shows when each goes on alone; what is finished is not repeated.
            for plan in group:
                why = _attempt(partial(carry_out, [plan], common.session))
                if why is not None:
                    failed |= dict.fromkeys(rows[plan.artefact.key], why)
    return failed


def _attempt(work: Callable[[], object]) -> str | None:
    """Does something that can fail for reasons of its own; returns why it did."""
    try:
        work()
    except Exception as error:
        if not expected_failure(error):
            raise
        return one_line(error)
    return None


def _common_plan(common: Common, name: str, recipe: Recipe) -> FactorPlan | None:
    """What a row needs of factors that others can use: not where its method changes the model before."""
    if not isinstance(recipe, LowRankRecipe) or recipe.chosen.method.subject is not None:
        return None
    subject = Subject(common.loaded.working, recipe.units(common.loaded.structure))
    return plan_factors(recipe, common.loaded, common.texts[name], common.session, subject)


def _rows(
    common: Common, dense: DenseResults, plain: Sequence[QuantizedRecord], failed: Mapping[str, str]
) -> list[Row]:
    """All rows in order; each is kept as soon as it is finished."""
    comparison, session = common.comparison, common.session
    points = [(method, keep) for keep in comparison.keep for method in comparison.methods]
    done: list[Row] = []
    if team.is_first():
        write_so_far(session.folder.path, _record(common, dense, plain, done))
    factors = session.folder.kept("factors")
    for number, (method, keep) in enumerate(points, start=1):
        name = row_name(method, keep)
        artefact = row_artefact(common, name)
        row = finished_row(common, name)
        if row is None:
            size = None if comparison.size == "keep" else comparison.size
            session.reporter.say(f"{method} at {asked_words(size, keep)} ({number} of {len(points)})")
            row = make_row(common, dense, method, keep, failed.get(name))
            if isinstance(row, FailedRow):
                session.reporter.say(f"{name} failed: {row.error}")
            artefact.write(row)
        # What only this row needed.
        session.folder.discard("subject", "search", "refined", "quantized")
        session.folder.discard("factors", but=factors)
        done.append(row)
        if team.is_first():
            write_so_far(session.folder.path, _record(common, dense, plain, done))
        if team.is_first() and not comparison.keep_models:
            shutil.rmtree(artefact.path, ignore_errors=True)
    return done


def _record(
    common: Common, dense: DenseResults, plain: Sequence[QuantizedRecord], rows: Sequence[Row]
) -> ComparisonRecord:
    """The content of ``results.json``."""
    comparison, loaded = common.comparison, common.loaded
    calibrations = [
        f"{r.calibration.sequences} x {r.calibration.seq_len} tokens of {r.calibration.source}"
        for r in comparison.recipes.values()
        if r.calibrates
    ]
    found = {k: v for row in rows if isinstance(row, RowResult) for k, v in row.versions.items()}
    return ComparisonRecord(
        format=1,
        model=comparison.model,
        methods=list(comparison.methods),
        size=None if comparison.size == "keep" else comparison.size,
        keep=list(comparison.keep),
        task_keep=comparison.task_keep,
        calibration=list(dict.fromkeys(calibrations)),
        texts=[
            TextRecord(source=source, windows=text.windows, seq_len=text.seq_len, tokens=text.tokens)
            for source, text in dense.texts
        ],
        dense=DenseRecord(
            perplexity=[finite(text.perplexity) for _, text in dense.texts],
            tasks=dense.tasks,
            parameters=loaded.parameters,
            parameters_linears=sum(site.size for site in loaded.structure.sites),
            bytes=loaded.bytes,
            format=loaded.format,
        ),
        quantized=list(plain) or None,
        rows=list(rows),
        seconds=dict(common.session.clock.seconds),
        dtype=dtype_name(loaded.dtype),
        memory="row" if PeakMemory.resettable() else "process",
        versions=versions() | found,
    )
