"""The Python API: the words of the command line as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, overload

import torch
from transformers import PreTrainedModel

from bolaco.checkpoint.export import export_dense
from bolaco.checkpoint.info import CompressedInfo, Info
from bolaco.checkpoint.result import ModelResult, Result
from bolaco.comparison.plan import make_comparison
from bolaco.comparison.run import ComparisonResult
from bolaco.comparison.run import compare as run_comparison
from bolaco.data.memory import Data, InMemory
from bolaco.delta.run import DeltaResult, make_delta
from bolaco.delta.serve import DeltaModel
from bolaco.distill.generate_text import WrittenTexts, make_generation
from bolaco.distill.generate_text import generate_text as write_texts
from bolaco.distill.run import Distilled
from bolaco.errors import DataError, RecipeError
from bolaco.evaluation.perplexity import PerplexityResult, evaluation_windows, perplexity
from bolaco.evaluation.tasks import TaskResult, TaskSet, evaluate_tasks, read_tasks
from bolaco.models.load import evaluation_mode, load_config, load_model, load_tokenizer
from bolaco.progress import Reporter
from bolaco.recipe.recipe import LowRankRecipe, Recipe, make_recipe, recipe_values
from bolaco.runs.chop import chop
from bolaco.runs.compress import compress as compress_recipe
from bolaco.runs.given import fitted, named, named_words
from bolaco.runs.tuned import compress_and_tune
from bolaco.runtime import fuse as fusing
from bolaco.settings import merge

__all__ = [
    "DeltaModel",
    "DeltaResult",
    "TaskResult",
    "TaskSet",
    "compare",
    "compress",
    "delta",
    "distill",
    "evaluate",
    "evaluate_tasks",
    "export",
    "fuse",
    "generate_text",
    "load",
    "read_tasks",
    "run",
    "tune",
    "unfuse",
]

fuse, unfuse = fusing.fuse, fusing.unfuse


def load(
    model: str,
    dtype: str = "auto",
    device: str = "auto",
    adapters: Literal["attach", "refuse", "leave"] = "attach",
    *,
    fuse: bool = False,
) -> PreTrainedModel:
    """Loads a model, dense or compressed, in evaluation mode.

    Args:
        model, dtype, device, adapters: as for :func:`bolaco.models.load.load_model`.
        fuse: lay it out for this machine, see :func:`fuse`.

    Raises:
        BolacoError: with one line that says what to mend.
    """
    loaded = load_model(model, dtype, device, adapters)
    return fusing.fuse(loaded) if fuse else loaded


@overload
def compress(
    model: str | PreTrainedModel, keep: float | None = None, out: None = None, **words: Any
) -> ModelResult[CompressedInfo]: ...


@overload
def compress(
    model: str | PreTrainedModel, keep: float | None = None, *, out: str | Path, **words: Any
) -> Result[CompressedInfo]: ...


@overload
def compress(
    model: str | PreTrainedModel, keep: float | None, out: str | Path, **words: Any
) -> Result[CompressedInfo]: ...


def compress(
    model: str | PreTrainedModel,
    keep: float | None = None,
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    preset: str | None = None,
    work: str | Path | None = None,
    reporter: Reporter | None = None,
    **words: Any,
) -> Result[CompressedInfo] | ModelResult[CompressedInfo]:
    """Compresses a model, and writes a checkpoint folder or gives it back in memory.

    Args:
        model: a hub id, a folder, a .gguf file, an alias, or a loaded model (then ``tokenizer`` is needed; the model
            is left as it is).
        keep: share of the decoder linears' parameters to keep, in (0, 1]; or else one of the words ``keep_model``, a
            share of all parameters, and ``target_size``, bytes of all weights such as ``"300MB"``.
        out: folder to write; must not exist. Without one the result is in memory and nothing is left on disk.
        tokenizer: for a loaded model.
        preset: a name in :data:`bolaco.recipe.presets.PRESETS`; by default the recipe that ``method`` names, or ours.
        work: folder of intermediate results, ``<out>.work`` by default; removed on success, continued from after an
            interruption.
        reporter: where progress goes; by default to a terminal or a notebook if there is one.
        words: those of :mod:`bolaco.recipe.words`, such as ``search``, ``method`` and ``calibration``, ``optimize``
            (``"size"`` or ``"speed"``), and ``options`` with further fields by dotted name. ``calibration``,
            ``validation`` and ``evaluation`` are names of sources, lists of strings, a ``datasets.Dataset`` with a
            column ``text``, or tokens ``[blocks, length]``.

    Raises:
        BolacoError: with one line that says what to mend.
    """
    loaded = None if isinstance(model, str) else model
    if loaded is not None and tokenizer is None:
        raise DataError("compress() of a loaded model needs its tokenizer: compress(model, ..., tokenizer=tokenizer)")
    name = model if isinstance(model, str) else (model.config.name_or_path or type(model).__name__)
    given: dict[str, InMemory] = {}
    values = recipe_values(keep=keep, **named_words(words, given))
    recipe = fitted(make_recipe(merge({"model": name}, values), preset), given, words.get("options") or ())
    own: dict[str, Any] = {"reporter": reporter, "model": loaded, "tokenizer": tokenizer, "given": given}
    if out is not None:
        return run(recipe, out, work=work, **own)
    with TemporaryDirectory(prefix="bolaco-", ignore_cleanup_errors=True) as folder:
        result = run(recipe, Path(folder) / "model", work=work, **own)
        return _in_memory(result, name, None if loaded is None else loaded.device)


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    work: str | Path | None = None,
    keep_work: bool = False,
    reporter: Reporter | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    given: Mapping[str, InMemory] | None = None,
) -> Result[CompressedInfo]:
    """Runs a recipe; see :func:`compress`. ``given`` are texts in memory by the names that the recipe has for them."""
    place = Path(out).expanduser()
    words = (reporter or Reporter.watched(), _folder(work), keep_work, model, tokenizer, given)
    with nullcontext() if model is None else evaluation_mode(model):
        if recipe.tuning is not None:
            return compress_and_tune(recipe, place, *words)
        if isinstance(recipe, LowRankRecipe):
            return compress_recipe(recipe, place, *words)
        return chop(recipe, place, *words)


def _in_memory(result: Result[CompressedInfo], name: str, device: torch.device | None) -> ModelResult[CompressedInfo]:
    """A result whose folder goes away; the model has the name of the original, whose tokenizer is its own."""
    made, tokenizer = load_model(str(result.path), device="auto" if device is None else str(device)), result.tokenizer
    made.name_or_path = made.config.name_or_path = tokenizer.name_or_path = name
    return ModelResult(made, tokenizer, result.info)


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
        reporter: where progress goes; by default to a terminal or a notebook if there is one.
        options: fields of :class:`bolaco.tune.settings.TuneSettings` by dotted name.
        words: ``evaluation``, ``text_column``, ``seq_len``, ``max_steps``, ``epochs``, ``minutes``, ``batch``,
            ``learning_rate``, ``distill``, ``teacher``, ``types``, ``seed``, ``dtype``, ``device``.

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
    return run_tune(settings, place, reporter or Reporter.watched(), _folder(work), keep_work)


def distill(
    teacher: str,
    task: str,
    out: str | Path,
    *,
    until: str = "student",
    work: str | Path | None = None,
    keep_work: bool = False,
    reporter: Reporter | None = None,
    options: dict[str, Any] | None = None,
    **words: Any,
) -> Distilled:
    """Makes a tiny classifier with a store of what a large model knows of a task (RetriKT, arXiv 2310.15594).

    Args:
        teacher: whatever :func:`compress` takes by name; it is not changed.
        task: labelled texts, a JSON Lines file of ``{"text": ..., "label": ...}``.
        out: folder to write; must not exist. :class:`bolaco.distill.predict.Predictor` reads it.
        until: stop after ``prompt``, ``reinforce`` or ``store``; the work folder then stays, and the next stage goes on
            from it.
        work: folder of finished stages, ``<out>.work`` by default; removed on success, continued from after an
            interruption.
        keep_work: keep it.
        reporter: where progress goes; by default to a terminal or a notebook if there is one.
        options: fields of :class:`bolaco.distill.settings.Distillation` by dotted name.
        words: ``student``, ``labels``, ``evaluation``, ``seed``, ``dtype``, ``device``.

    Raises:
        BolacoError: with one line that says what to mend.
    """
    from bolaco.distill.run import distill as run_distillation
    from bolaco.distill.settings import make_settings

    named = {("student.config" if word == "student" else word): value for word, value in words.items()}
    settings = make_settings({"teacher": teacher, "task": task} | named, options)
    place = Path(out).expanduser()
    return run_distillation(settings, place, reporter or Reporter.watched(), _folder(work), keep_work, until)


def generate_text(
    model: str,
    sequences: int,
    out: str | Path,
    *,
    like: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    work: str | Path | None = None,
    keep_work: bool = False,
    reporter: Reporter | None = None,
    **words: Any,
) -> WrittenTexts:
    """Lets a model write texts, to calibrate on for example, and writes them to a JSON Lines file.

    Args:
        model: whatever :func:`compress` takes by name.
        sequences: how many texts; none is empty or a copy of another.
        out: file to write, ``{"text": ...}`` a line; must not exist.
        like: a text source; a soft prompt is trained on it, behind which the model writes such texts.
        dtype, device: of the model.
        work: folder of finished batches, ``<out>.work`` by default; removed on success, continued from after an
            interruption.
        keep_work: keep it.
        reporter: where progress goes; by default to a terminal or a notebook if there is one.
        words: fields of :class:`bolaco.data.written.Writing`: ``length``, ``greedy``, ``temperature``, ``top_p``,
            ``batch``, ``seed``.

    Raises:
        BolacoError: with one line that says what to mend.
    """
    settings = make_generation(model, sequences, like, dtype, device, words)
    return write_texts(settings, Path(out).expanduser(), reporter or Reporter.watched(), _folder(work), keep_work)


def delta(
    base: str,
    tuned: str,
    out: str | Path,
    *,
    work: str | Path | None = None,
    keep_work: bool = False,
    reporter: Reporter | None = None,
    options: dict[str, Any] | None = None,
    **words: Any,
) -> DeltaResult:
    """Writes what a fine-tuned model adds to its base, in few bits.

    Args:
        base, tuned: hub ids, folders, .gguf files or aliases.
        out: folder to write; must not exist. :func:`load` of it gives the base with the delta.
        work: folder of intermediate results, ``<out>.work`` by default; removed on success, continued from after an
            interruption.
        keep_work: keep it.
        reporter: where progress goes; by default to a terminal or a notebook if there is one.
        options: fields of :class:`bolaco.delta.settings.DeltaSettings` by dotted name.
        words: ``ratio``, ``method``, ``calibration``, ``text_column``, ``seq_len``, ``evaluation``, ``seed``,
            ``dtype``, ``device``, ``bos``.

    Raises:
        BolacoError: with one line that says what to mend.
    """
    from bolaco.delta.settings import make_settings

    settings = make_settings(base, tuned, words, options)
    return make_delta(settings, Path(out).expanduser(), reporter or Reporter.watched(), _folder(work), keep_work)


def export(folder: str | Path, out: str | Path, *, drop_bias: bool = False) -> Path:
    """Multiplies the factors of a compressed folder back: a stock checkpoint at its full size, in ``out``.

    Args:
        folder: what :func:`compress` wrote.
        out: folder to write; must not exist.
        drop_bias: leave out biases that the stock architecture has no place for.

    Raises:
        BolacoError: with one line that says what to mend.
    """
    place = Path(out).expanduser()
    export_dense(str(Path(folder).expanduser()), place, drop_bias)
    return place


def compare(
    model: str | PreTrainedModel,
    methods: Sequence[str],
    keep: Sequence[float] = (),
    out: str | Path | None = None,
    *,
    keep_model: Sequence[float] = (),
    target_size: Sequence[int | str] = (),
    evaluation: Data | Sequence[Data] = (),
    tasks: str | Sequence[str] = (),
    task_limit: int | None = None,
    task_keep: float | None = None,
    keep_models: bool = False,
    quantized: Sequence[str] = ("int8", "int6", "int4", "int3"),
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
        keep: keep ratios; or else ``keep_model``, shares of all parameters, or ``target_size``, bytes of all weights.
        out: folder to write; must not exist. It must be given.
        evaluation: sources perplexity is reported on, the first one being the headline; all recipes share it. A list is
            one of sources, each a name or a text as for :func:`compress`.
        tasks, task_limit: accuracy on tasks too, see :func:`evaluate_tasks`.
        task_keep: the keep ratio tasks are run at, the first by default.
        keep_models: keep the checkpoints, in ``out/models``.
        quantized: forms of plain quantization that the original is measured in as well.
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
    if out is None:
        raise RecipeError("compare() writes a folder: compare(model, methods, keep, out)")
    given: dict[str, InMemory] = {}
    # Names are split at commas; what is no string and no list is one text.
    several = _items(evaluation) if isinstance(evaluation, str) else evaluation
    texts = several if isinstance(several, list | tuple) else [several]
    plan = make_comparison(
        name,
        methods,
        keep,
        keep_model=keep_model,
        target_size=target_size,
        evaluation=[named(text, "evaluation", given) for text in texts],
        tasks=_items(tasks),
        task_limit=task_limit,
        task_keep=task_keep,
        keep_models=keep_models,
        quantized=quantized,
        **named_words(words, given),
    )
    with nullcontext() if loaded is None else evaluation_mode(loaded):
        return run_comparison(
            plan,
            Path(out).expanduser(),
            reporter or Reporter.watched(),
            _folder(work),
            keep_work,
            loaded,
            tokenizer,
            given,
        )


def _items(words: str | Sequence[str]) -> list[str]:
    """A list, or a string with commas."""
    parts = words.split(",") if isinstance(words, str) else words
    return [part.strip() for part in parts if part.strip()]


def evaluate(
    model: str | PreTrainedModel,
    data: Data,
    *,
    seq_len: int | None = None,
    limit: int | None = None,
    text_column: str | None = None,
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
        data: name of a text source (see :mod:`bolaco.data`), a list of strings, a ``datasets.Dataset`` with a column
            ``text``, or tokens ``[windows, length]``.
        seq_len: window length in tokens; 1024, or that of the tokens given.
        limit: the first so many windows; None for all.
        text_column: of rows, see :func:`bolaco.data.sources.read_documents`.
        tokenizer: for a loaded model.
        dtype, device, bos, batch: as in a recipe.
        reporter: where progress goes.

    Raises:
        BolacoError: with one line that says what to mend.
    """
    given: dict[str, InMemory] = {}
    source = named(data, "data", given)
    tokens = given[source].tokens if given else None
    if seq_len is None:
        seq_len = 1024 if tokens is None else tokens.shape[1]
    # In order of cost: what is wrong with the model's name or the text shows before any weight is read.
    config = load_config(model) if isinstance(model, str) else model.config
    if tokenizer is None and tokens is None:
        tokenizer = load_tokenizer(model if isinstance(model, str) else str(model.name_or_path))
    text = given.get(source, source)
    blocks = evaluation_windows(text, tokenizer, config, seq_len, limit, bos, text_column)
    loaded = load_model(model, dtype, device) if isinstance(model, str) else model
    reporter = reporter or Reporter.watched()
    with evaluation_mode(loaded), reporter.stage("evaluate", len(blocks)) as tick:
        return perplexity(loaded, blocks, batch, tick)
