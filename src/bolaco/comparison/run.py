"""The rows of a comparison, and what they share.

What the methods have in common is computed once: loss gradients, the pass over the calibration text, factors of each
factorization up to the largest rank that any row needs, the dense model's evaluation. Each row is then an ordinary run
of its recipe (:func:`bolaco.pipeline.compress`) that is handed these, and becomes an entry of a ledger, so a comparison
that was killed goes on with the next row.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bolaco import pipeline
from bolaco.checkpoint.info import read_curves, read_info, versions
from bolaco.checkpoint.write import new_folder, refuse_compressed, refuse_existing, refuse_nested
from bolaco.comparison.plan import (
    Comparison,
    factors_key,
    row_name,
    shares_factors,
    short_hash,
    statistics_key,
)
from bolaco.data import fingerprint
from bolaco.errors import BolacoError, DataError, ResumeError, no_space
from bolaco.evaluation.perplexity import perplexity
from bolaco.evaluation.tasks import TaskSet, evaluate_tasks, read_tasks
from bolaco.factorize import Method, get_method
from bolaco.factorize.run import FactorJob, factorize
from bolaco.factorize.store import FactorStore
from bolaco.memory import PeakMemory
from bolaco.models.load import check_finite, load_config, load_model, load_tokenizer, resolve_device
from bolaco.models.structure import inspect_structure
from bolaco.planning import calibrates, top_ranks
from bolaco.progress import Reporter
from bolaco.recipe import Recipe
from bolaco.report.charts import frontier_chart
from bolaco.report.comparison import comma_separated, labels, markdown
from bolaco.report.html import REPORT_FILE, comparison_page
from bolaco.report.svg import standalone
from bolaco.statistics.site import LossStatistics, loss_bytes
from bolaco.texts import Texts, prepare_texts
from bolaco.work import WorkFolder, require_space, weights_fingerprint

# What a method can stumble over at one point; anything else is a defect and stops the comparison.
_FAILURES = (BolacoError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison leaves: the folder, and what its ``results.json`` says."""

    path: Path
    record: dict[str, Any]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Rows without a result; each has an ``error``."""
        return [row for row in self.record["rows"] if "error" in row]


def compare(
    comparison: Comparison,
    out: Path,
    reporter: Reporter,
    work: Path | None = None,
    keep_work: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
) -> ComparisonResult:
    """Runs every row and writes ``out``: tables, a picture, a report, results and recipes; checkpoints if asked.

    ``model`` and ``tokenizer`` stand in for loading ``comparison.model``; they are not changed.

    Raises:
        BolacoError: anything the user can mend, in one line. What fails at one row only is recorded there instead.
    """
    refuse_existing(out)
    work = work or out.with_name(out.name + ".work")
    refuse_nested(out, work)
    for recipe in comparison.recipes.values():
        if recipe.transform is None:
            get_method(recipe.factorization.method)
        resolve_device(recipe.device)
    tasks = read_tasks(comparison.tasks) if comparison.tasks else None
    with WorkFolder(work, comparison) as folder:
        with folder.timed("load"):
            reporter.say(f"loading {comparison.model}")
            first = next(iter(comparison.recipes.values()))
            config = model.config if model is not None else load_config(comparison.model)
            refuse_compressed(config)
            tokenizer = tokenizer if tokenizer is not None else load_tokenizer(comparison.model)
            texts = _texts(comparison, tokenizer, config)
            model = model if model is not None else load_model(comparison.model, first.dtype, first.device)
            check_finite(model)
            fingerprints = [found.fingerprint for found in texts.values()]
            folder.same("model", weights_fingerprint(model), "the model's weights have changed")
            folder.same("texts", short_hash(fingerprints), "the text or its tokens have changed")
        run = _Run(comparison, model, tokenizer, texts, tasks, folder, reporter)
        dense = run.dense()
        run.prepare()
        rows = run.rows(dense)
        record = run.record(dense, rows)
        with new_folder(out) as partial, folder.unfinished(partial):
            _write(partial, record, folder.path / "rows" if comparison.keep_models else None)
        if not keep_work:
            folder.remove()
    return ComparisonResult(out, record)


def _texts(comparison: Comparison, tokenizer: Any, config: Any) -> dict[str, Texts]:
    """Texts by row name; all rows are measured on the same tokens.

    Raises:
        DataError: unreadable, too short, or not the same.
    """
    known: dict[str, Texts] = {}
    found: dict[str, Texts] = {}
    first = next(iter(comparison.recipes))
    # Recipes that share a pass share its text, those that do not need it too.
    readers = {statistics_key(recipe) for recipe in comparison.recipes.values() if calibrates(recipe)}
    for name, recipe in comparison.recipes.items():
        sections = (recipe.calibration, recipe.validation, recipe.evaluation)
        reads = statistics_key(recipe) in readers
        values = [section.model_dump(mode="json") for section in sections]
        key = short_hash([*values, recipe.bos, recipe.searches, reads])
        if key not in known:
            try:
                known[key] = prepare_texts(recipe, tokenizer, config, reads, more=comparison.others)
            except DataError as error:
                raise error if name == first else DataError(f"{name}: {error}") from None
        found[name] = known[key]
        if _measured(found[name]) != _measured(found[first]):
            raise DataError(
                f"{first} and {name} would be measured on different tokens, because one of them searches on a part of "
                "the evaluation text or has other windows; give --eval a source of its own, and evaluation.seq_len and "
                "evaluation.windows for all"
            )
    return found


def _measured(texts: Texts) -> str:
    return fingerprint(texts.evaluation, *(blocks for _, blocks in texts.others))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, BolacoError) else f"{type(error).__name__}: {text}"


def _expected(error: BaseException) -> bool:
    """Whether a failure is one of the row's own; a full disk or a damaged work folder is not."""
    return not isinstance(error, ResumeError) and not no_space(error)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _log_ratio(after: float, before: float) -> float | None:
    return math.log(after) - math.log(before) if math.isfinite(after) and math.isfinite(before) else None


class _Run:
    """The stages of a comparison, with what they share."""

    def __init__(
        self,
        comparison: Comparison,
        model: PreTrainedModel,
        tokenizer: Any,
        texts: dict[str, Texts],
        tasks: TaskSet | None,
        folder: WorkFolder,
        reporter: Reporter,
    ) -> None:
        self.comparison, self.model, self.tokenizer = comparison, model, tokenizer
        self.texts, self.tasks, self.folder, self.reporter = texts, tasks, folder, reporter
        self.structure = inspect_structure(model)
        self.ledger: dict[str, dict[str, Any]] = folder.read("rows", dict) or {}
        self.failed: dict[str, str] = {}  # factors that could not be computed, and why
        self.memory = PeakMemory()

    def _measure(self, model: PreTrainedModel, texts: Sequence[tuple[str, Any]], batch: int, what: str) -> list[Any]:
        results = []
        with self.reporter.stage(f"evaluate {what}", sum(len(blocks) for _, blocks in texts)) as tick:
            for _, blocks in texts:
                results.append(perplexity(model, blocks, batch, tick))
        return results

    def _accuracies(self, model: PreTrainedModel) -> dict[str, Any]:
        assert self.tasks is not None
        scores = evaluate_tasks(
            model, self.tasks, limit=self.comparison.task_limit, tokenizer=self.tokenizer, reporter=self.reporter
        )
        return {score.task: score.record for score in scores}

    def dense(self) -> dict[str, Any]:
        """The original on all texts and tasks: ``{"texts": [PerplexityResult as dict, ..], "tasks": {..}}``."""
        known: dict[str, Any] | None = self.folder.read("dense", dict)
        if known is None:
            name, recipe = next(iter(self.comparison.recipes.items()))
            texts = self.texts[name]
            everything = [(texts.evaluation_source, texts.evaluation), *texts.others]
            with self.folder.timed("dense evaluation"):
                found = self._measure(self.model, everything, recipe.validation.batch, "the original")
                known = {
                    "texts": [asdict(result) | {"source": s} for result, (s, _) in zip(found, everything, strict=True)],
                    "tasks": self._accuracies(self.model) if self.tasks is not None else {},
                }
            self.folder.write("dense", known)
        return known

    def _store(self, recipe: Recipe) -> FactorStore:
        return FactorStore(self.folder.path / "factors" / factors_key(recipe))

    def _losses(self, recipe: Recipe) -> Path:
        return self.folder.path / "losses" / statistics_key(recipe)

    def prepare(self) -> None:
        """Statistics and factors of every row that is not finished: one pass over each text for all methods."""
        top: dict[str, dict[str, int]] = {}
        waiting: dict[str, dict[str, Recipe]] = {}
        for name, recipe in self.comparison.recipes.items():
            if not shares_factors(recipe):
                continue
            key = factors_key(recipe)
            ranks = top.setdefault(key, {})
            for site, rank in top_ranks(recipe, self.structure).items():
                ranks[site] = max(rank, ranks.get(site, 0))
            if name not in self.ledger:
                waiting.setdefault(statistics_key(recipe), {}).setdefault(key, recipe)
        self._require_space(top)
        for recipes in waiting.values():
            self._prepare_group(recipes, top)

    def _require_space(self, top: Mapping[str, Mapping[str, int]]) -> None:
        itemsize = self.model.dtype.itemsize
        sites = {site.name: site for site in self.structure.sites}
        size = sum(p.numel() for p in self.model.parameters()) * itemsize  # one checkpoint at a time
        for key, ranks in top.items():
            if not FactorStore(self.folder.path / "factors" / key).has(self.structure.num_layers - 1):
                size += sum(
                    rank * (sites[n].out_features + sites[n].in_features) * itemsize for n, rank in ranks.items()
                )
        walks: dict[str, tuple[str, Recipe, set[str]]] = {}
        for name, recipe in self.comparison.recipes.items():
            if shares_factors(recipe):
                _, _, fields = walks.setdefault(statistics_key(recipe), (name, recipe, set()))
                fields.update(get_method(recipe.factorization.method).losses)
        for name, recipe, fields in walks.values():
            tokens, settings = self.texts[name].calibration, recipe.calibration
            size += loss_bytes(fields, self.model, self.structure, tokens, settings)
            if settings.cache == "disk":
                size += tokens.numel() * self.model.config.hidden_size * itemsize
        require_space([(self.folder.path, size)], "the factors and a checkpoint")

    def _prepare_group(self, recipes: Mapping[str, Recipe], top: Mapping[str, Mapping[str, int]]) -> None:
        """Factors of recipes that share their statistics, by key."""
        recipe = next(iter(recipes.values()))
        tokens = next(t for n, t in self.texts.items() if self.comparison.recipes[n] == recipe).calibration
        settings, on_disk = recipe.calibration, recipe.calibration.cache == "disk"
        methods: dict[str, Method] = {key: get_method(r.factorization.method) for key, r in recipes.items()}
        with self.folder.timed("loss gradients"):
            for field in sorted({field for method in methods.values() for field in method.losses}):
                try:
                    LossStatistics(self._losses(recipe), [field]).estimate(
                        self.model,
                        self.structure,
                        tokens[: settings.gradient_sequences],
                        settings.batch,
                        self.reporter,
                        recipe.seed,
                        on_disk,
                    )
                except _FAILURES as error:
                    if not _expected(error):
                        raise
                    self.failed |= {key: _one_line(error) for key, m in methods.items() if field in m.losses}
        jobs = {
            key: FactorJob(
                method, self._store(recipes[key]), top[key], LossStatistics(self._losses(recipe), method.losses)
            )
            for key, method in methods.items()
            if key not in self.failed
        }
        cache = self.folder.path / "hidden.cache" if on_disk else None
        words: tuple[Any, ...] = (settings, self.reporter, cache)
        with self.folder.timed("statistics and factors"):
            try:
                factorize(self.model, self.structure, tokens, list(jobs.values()), *words)
            except _FAILURES as error:
                if not _expected(error):
                    raise
                # Whose fault it was shows when each goes on alone; what is finished is not repeated.
                for key, job in jobs.items():
                    try:
                        factorize(self.model, self.structure, tokens, [job], *words)
                    except _FAILURES as own:
                        if not _expected(own):
                            raise
                        self.failed[key] = _one_line(own)

    def rows(self, dense: Mapping[str, Any]) -> list[dict[str, Any]]:
        """All rows in order; each is written into the ledger when it is finished."""
        points = [(method, keep) for keep in self.comparison.keep for method in self.comparison.methods]
        self._write_so_far(dense, points)
        for number, (method, keep) in enumerate(points, start=1):
            name = row_name(method, keep)
            if name not in self.ledger:
                recipe = self.comparison.recipes[name]
                self.reporter.say(f"{method} at keep {keep:g} ({number} of {len(points)})")
                row: dict[str, Any] = {"name": name, "method": method, "keep": keep}
                try:
                    row |= self._row(name, recipe, dense)
                except _FAILURES as error:
                    if not _expected(error):
                        raise
                    row["error"] = _one_line(error)
                    self.reporter.say(f"{name} failed: {row['error']}")
                self.ledger[name] = row | {"recipe": recipe.model_dump(mode="json"), "recipe_yaml": recipe.to_yaml()}
                self.folder.write("rows", self.ledger)
                self._write_so_far(dense, points)
            if not self.comparison.keep_models:
                shutil.rmtree(self._place(name), ignore_errors=True)
            shutil.rmtree(self._place(f"{name}.work"), ignore_errors=True)
        return [self.ledger[row_name(*point)] for point in points]

    def _write_so_far(self, dense: Mapping[str, Any], points: Sequence[tuple[str, float]]) -> None:
        """Table and report of the rows that are finished, in the work folder: long comparisons are looked at early."""
        done = [self.ledger[row_name(*point)] for point in points if row_name(*point) in self.ledger]
        record = self.record(dense, done)
        for name, text in (("table.md", markdown(record)), (REPORT_FILE, comparison_page(record))):
            partial = self.folder.path / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.folder.path / name)

    def _place(self, name: str) -> Path:
        return self.folder.path / "rows" / name

    def _row(self, name: str, recipe: Recipe, dense: Mapping[str, Any]) -> dict[str, Any]:
        key = factors_key(recipe)
        if shares_factors(recipe) and key in self.failed:
            raise BolacoError(self.failed[key])
        out, texts = self._place(name), self.texts[name]
        self.memory = PeakMemory()
        # A run that was killed between the checkpoint and the ledger has left it; its memory is not known any more.
        found = out.exists()
        if found:
            info = read_info(out)
        else:
            headline = {k: v for k, v in dense["texts"][0].items() if k != "source"}
            shared = pipeline.Shared(texts, headline)
            if shares_factors(recipe):
                shared = replace(shared, factors=self._store(recipe), losses=self._losses(recipe))
            info = pipeline.compress(
                recipe, out, self.reporter, model=self.model, tokenizer=self.tokenizer, shared=shared
            ).info
        results, tasks = [info["perplexity"]["compressed"]], {}
        seconds = dict(info["seconds"])
        with_tasks = self.tasks is not None and recipe.keep == self.comparison.task_keep
        if texts.others or with_tasks:
            compressed = load_model(str(out), device=str(self.model.device))
            others = self._measure(compressed, texts.others, recipe.validation.batch, "on other texts")
            results += [result.perplexity for result in others]
            seconds |= {"other texts": round(sum(result.seconds for result in others), 3)} if others else {}
            tasks = self._accuracies(compressed) if with_tasks else {}
        before = [text["perplexity"] for text in dense["texts"]]
        gaps = [_log_ratio(after, dense) for after, dense in zip(results, before, strict=True)]
        sizes = ("keep_linears", "keep_model", "parameters", "parameters_linears", "bytes")
        return {
            **{field: info[field] for field in (*sizes, "storage", "ranks", "trials", "versions")},
            "perplexity": [_finite(value) for value in results],
            "gap": gaps,
            "tasks": tasks,
            "seconds": seconds,
            "peak_bytes": None if found else self.memory.bytes(),
            "curves": read_curves(out),
        }

    def record(self, dense: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The content of ``results.json``."""
        recipes = self.comparison.recipes.values()
        calibrations = [
            f"{r.calibration.sequences} x {r.calibration.seq_len} tokens of {r.calibration.source}"
            for r in recipes
            if calibrates(r)
        ]
        parameters = sum(p.numel() for p in self.model.parameters())
        return {
            "format": 1,
            "model": self.comparison.model,
            "methods": list(self.comparison.methods),
            "keep": list(self.comparison.keep),
            "task_keep": self.comparison.task_keep,
            "calibration": list(dict.fromkeys(calibrations)),
            "texts": [{k: text[k] for k in ("source", "windows", "seq_len", "tokens")} for text in dense["texts"]],
            "dense": {
                "perplexity": [_finite(text["perplexity"]) for text in dense["texts"]],
                "tasks": dense["tasks"],
                "parameters": parameters,
                "parameters_linears": sum(site.size for site in self.structure.sites),
                "bytes": parameters * self.model.dtype.itemsize,
            },
            "rows": list(rows),
            "seconds": dict(self.folder.seconds),
            "memory": "row" if self.memory.reset else "process",
            "versions": versions() | {k: v for row in rows for k, v in row.get("versions", {}).items()},
        }


def _link(source: str, target: str) -> None:
    """A second name for the same file where the file system has such, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _write(folder: Path, record: Mapping[str, Any], models: Path | None) -> None:
    """All files of a comparison; ``models`` is the folder with the checkpoints to keep."""
    files = {
        "table.md": markdown(record),
        "table.csv": comma_separated(record),
        "results.json": json.dumps(record, indent=1) + "\n",
        REPORT_FILE: comparison_page(record),
    }
    names = labels([text["source"] for text in record["texts"]])
    picture = frontier_chart("frontier", record["rows"], names[0])
    if picture is not None:
        files["frontier.svg"] = standalone(picture)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "recipes").mkdir()
    for row in record["rows"]:
        (folder / "recipes" / f"{row['name']}.yaml").write_text(row["recipe_yaml"], encoding="utf-8")
    for row in record["rows"]:
        if models is not None and (models / row["name"]).is_dir():
            shutil.copytree(models / row["name"], folder / "models" / row["name"], copy_function=_link)
