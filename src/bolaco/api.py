"""The Python API: the words of the command line as functions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bolaco.checkpoint.info import CompressedInfo, Info
from bolaco.checkpoint.result import Result
from bolaco.comparison.plan import make_comparison
from bolaco.comparison.run import ComparisonResult
from bolaco.comparison.run import compare as run_comparison
from bolaco.data.sources import TokenStream
from bolaco.errors import DataError
from bolaco.evaluation.perplexity import PerplexityResult, perplexity
from bolaco.evaluation.tasks import TaskResult, TaskSet, evaluate_tasks, read_tasks
from bolaco.models.load import evaluation_mode, load_model, load_tokenizer
from bolaco.models.structure import positions_of
from bolaco.progress import Reporter
from bolaco.recipe.recipe import LowRankRecipe, Recipe, make_recipe, recipe_values
from bolaco.runs.chop import chop
from bolaco.runs.compress import compress as compress_recipe
from bolaco.runs.tuned import compress_and_tune
from bolaco.settings import merge

__all__ = [
    "TaskResult",
    "TaskSet",
    "compare",
    "compress",
    "evaluate",
    "evaluate_tasks",
    "load",
    "read_tasks",
    "run",
    "tune",
]

load = load_model


def compress(
    model: str | PreTrainedModel,
    keep: float,
    out: str | Path,
    *,
    tokenizer: Any = None,
    preset: str = "default",
    work: str | Path | None = None,
    reporter: Reporter | None = None,
    **words: Any,
) -> Result[CompressedInfo]:
    """Compresses a model and writes a checkpoint folder.

    Args:
        model: a hub id, a folder, a .gguf file, an alias, or a loaded model (then ``tokenizer`` is needed; the model
            is left as it is).
        keep: share of the decoder linears' parameters to keep, in (0, 1].
        out: folder to write; must not exist.
        tokenizer: for a loaded model.
        preset: a name in :data:`bolaco.recipe.presets.PRESETS`.
        work: folder of intermediate results, ``<out>.work`` by default; removed on success, continued from after an
            interruption.
        reporter: where progress goes; silent by default.
        words: those of :mod:`bolaco.recipe.words`, such as ``search``, ``method`` and ``calibration``, and ``options``
            with further fields by dotted name.

    Raises:
        BolacoError: with one line that says what to mend.
    """
    loaded = None if isinstance(model, str) else model
    if loaded is not None and tokenizer is None:
        raise DataError("compress() of a loaded model needs its tokenizer: compress(model, ..., tokenizer=tokenizer)")
    name = model if isinstance(model, str) else (model.config.name_or_path or type(model).__name__)
    recipe = make_recipe(merge({"model": name}, recipe_values(keep=keep, **words)), preset)
    return run(recipe, out, work=work, reporter=reporter, model=loaded, tokenizer=tokenizer)


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    work: str | Path | None = None,
    keep_work: bool = False,
    reporter: Reporter | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
) -> Result[CompressedInfo]:
    """Runs a recipe; see :func:`compress`."""
    place = Path(out).expanduser()
    words = (reporter or Reporter(quiet=True), _folder(work), keep_work, model, tokenizer)
    with nullcontext() if model is None else evaluation_mode(model):
        if recipe.tuning is not None:
            return compress_and_tune(recipe, place, *words)
        if isinstance(recipe, LowRankRecipe):
            return compress_recipe(recipe, place, *words)
        return chop(recipe, place, *words)


def _folder(work: str | Path | None) -> Path | None:
    return None if work is None else Path(work).expanduser()


def tune(
    model: str,
    mode: str,
    data: str,
    out: str | Path,
    *,
    work: str | Path | None = None,
    keep_work: bool = False,
    reporter: Reporter | None = None,
    options: dict[str, Any] | None = None,
    **words: Any,
) -> Result[Info] | None:
    """Tunes a compressed model, or any other, and writes a checkpoint folder of the same kind.

    Args:
        model: a compressed folder, or whatever :func:`compress` takes by name.
        mode: what is trained; a name that ``bolaco methods`` lists.
        data: a text source, or a .jsonl file of instructions (see :mod:`bolaco.tune.data`).
        out: folder to write; must not exist.
        work: folder of checkpoints, ``<out>.work`` by default; removed on success, continued from after an
            interruption.
        keep_work: keep it.
        reporter: where progress goes; silent by default.
        options: fields of :class:`bolaco.tune.settings.TuneSettings` by dotted name.
        words: ``evaluation``, ``seq_len``, ``max_steps``, ``epochs``, ``minutes``, ``batch``, ``learning_rate``,
            ``distill``, ``teacher``, ``types``, ``seed``, ``dtype``, ``device``.

    Returns:
        The result; None in the processes of torchrun that are not the first.

    Raises:
        BolacoError: with one line that says what to mend.
    """
    # transformers' Trainer takes seconds to import.
    from bolaco.tune.run import tune as run_tune
    from bolaco.tune.settings import make_settings

    settings = make_settings(model, {"mode": mode, "data": data} | words, options)
    place = Path(out).expanduser()
    return run_tune(settings, place, reporter or Reporter(quiet=True), _folder(work), keep_work)


def compare(
    model: str | PreTrainedModel,
    methods: Sequence[str],
    keep: Sequence[float],
    out: str | Path,
    *,
    evaluation: str | Sequence[str] = (),
    tasks: str | Sequence[str] = (),
    task_limit: int | None = None,
    task_keep: float | None = None,
    keep_models: bool = False,
    tokenizer: Any = None,
    work: str | Path | None = None,
    keep_work: bool = False,
    reporter: Reporter | None = None,
    **words: Any,
) -> ComparisonResult:
    """Compresses a model by several methods at several sizes, and writes tables, a picture and a report.

    Statistics and factors are computed once for all; every row gives what :func:`compress` gives with its recipe.

    Args:
        model: as for :func:`compress`.
        methods: names of presets, or of factorization methods (then in two factors, one ratio for all matrices).
        keep: keep ratios.
        out: folder to write; must not exist.
        evaluation: sources perplexity is reported on, the first one being the headline; all recipes share it.
        tasks, task_limit: accuracy on tasks too, see :func:`evaluate_tasks`.
        task_keep: the keep ratio tasks are run at, the first by default.
        keep_models: keep the checkpoints, in ``out/models``.
        tokenizer, work, keep_work, reporter: as for :func:`run`.
        words: as for :func:`compress`, for all methods; ``options`` may name one of them, as in
            ``{"default:refinement.steps": 5}``.

    Raises:
        BolacoError: with one line that says what to mend. What fails at one row only is recorded there.
    """
    loaded = None if isinstance(model, str) else model
    if loaded is not None and tokenizer is None:
        raise DataError("compare() of a loaded model needs its tokenizer: compare(model, ..., tokenizer=tokenizer)")
    name = model if isinstance(model, str) else (model.config.name_or_path or type(model).__name__)
    plan = make_comparison(
        name,
        methods,
        keep,
        evaluation=_items(evaluation),
        tasks=_items(tasks),
        task_limit=task_limit,
        task_keep=task_keep,
        keep_models=keep_models,
        **words,
    )
    with nullcontext() if loaded is None else evaluation_mode(loaded):
        return run_comparison(
            plan,
            Path(out).expanduser(),
            reporter or Reporter(quiet=True),
            _folder(work),
            keep_work,
            loaded,
            tokenizer,
        )


def _items(words: str | Sequence[str]) -> list[str]:
    """A list, or a string with commas."""
    parts = words.split(",") if isinstance(words, str) else words
    return [part.strip() for part in parts if part.strip()]


def evaluate(
    model: str | PreTrainedModel,
    data: str,
    *,
    seq_len: int = 1024,
    limit: int | None = None,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    bos: str = "auto",
    batch: int = 4,
    reporter: Reporter | None = None,
) -> PerplexityResult:
    """Perplexity of a dense or compressed model on a text source, over non-overlapping windows.

    Args:
        model: as for :func:`compress`; a folder it wrote is loaded like any other.
        data: text source (see :mod:`bolaco.data`).
        seq_len: window length in tokens.
        limit: the first so many windows; None for all.
        tokenizer: for a loaded model.
        dtype, device, bos, batch: as in a recipe.
        reporter: where progress goes.

    Raises:
        BolacoError: with one line that says what to mend.
    """
    if seq_len < 2:
        raise DataError(f"seq_len must be at least 2, got {seq_len}: the first token of a window is not predicted")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}")
    loaded = load_model(model, dtype, device) if isinstance(model, str) else model
    if tokenizer is None:
        tokenizer = load_tokenizer(model if isinstance(model, str) else str(loaded.name_or_path))
    positions = positions_of(loaded.config)
    if positions is not None and seq_len > positions:
        raise DataError(f"seq_len {seq_len}: the model has {positions} positions")
    model_type = loaded.config.model_type
    blocks = TokenStream(data, tokenizer, bos, model_type).take(limit, seq_len, "evaluation")
    reporter = reporter or Reporter(quiet=True)
    with evaluation_mode(loaded), reporter.stage("evaluate", len(blocks)) as tick:
        return perplexity(loaded, blocks, batch, tick)
