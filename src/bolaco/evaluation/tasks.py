"""Accuracy on benchmark tasks, by lm-evaluation-harness: its own tasks by name, and the user's files."""

from __future__ import annotations

import difflib
import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bolaco.errors import BolacoError, DataError, MissingPackageError, RecipeError
from bolaco.evaluation.local_tasks import LocalTask, is_local, read_local
from bolaco.models.load import evaluation_mode, load_model, load_tokenizer
from bolaco.progress import Reporter

# Metrics without a closed form, such as perplexities, have a standard error from so many resamplings.
_BOOTSTRAP = 1000


@dataclass(frozen=True)
class TaskResult:
    """What a model scored on one task, or on a group of tasks.

    ``metrics`` and ``stderr`` have the same names: ``acc``, ``acc_norm`` (log-probabilities divided by the answers'
    characters), ``perplexity`` (of continuations) or what the task defines; a standard error that is not defined is
    None. ``shots`` are the solved examples before each question; None in a group whose tasks differ.
    """

    task: str
    examples: int
    shots: int | None
    metrics: dict[str, float]
    stderr: dict[str, float | None]

    @property
    def record(self) -> dict[str, Any]:
        """Flat, for JSON: ``{"examples": .., "shots": .., "acc": .., "acc_stderr": .., ..}``."""
        values: dict[str, Any] = {"examples": self.examples, "shots": self.shots}
        for name, value in self.metrics.items():
            values |= {name: value, f"{name}_stderr": self.stderr[name]}
        return values


@dataclass(frozen=True)
class TaskSet:
    """Tasks with their data, ready for any number of models: the harness's objects by name."""

    tasks: dict[str, Any]
    groups: dict[str, Any]


def read_tasks(items: str | Sequence[str]) -> TaskSet:
    """Finds tasks and loads their data; the harness downloads those of named tasks.

    Args:
        items: names of lm-evaluation-harness's tasks, tags or groups, ``.jsonl`` files (see
            :mod:`bolaco.evaluation.local_tasks`), and folders of them; a list, or a string with commas.

    Raises:
        RecipeError: no items, or a name that the harness does not know, or a task that is not run here.
        DataError: a file that is not there or malformed, or data that cannot be loaded.
        MissingPackageError: lm-evaluation-harness is not installed.
    """
    words = items.split(",") if isinstance(items, str) else items
    wanted = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not wanted:
        raise RecipeError("tasks: none is named; give names of lm-evaluation-harness or .jsonl files")
    # The user's own files first: they take no time, and need nothing that may not be there.
    local = {item: read_local(item) for item in wanted if is_local(item)}
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError(
            "tasks need lm-evaluation-harness, which is not installed: pip install 'lm-eval>=0.4.12'"
        )
    from bolaco.evaluation.harness import undisturbed

    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    labels = _labels([task for found in local.values() for task in found])
    with undisturbed():
        named = [item for item in wanted if item not in local]
        manager = _manager() if named else None
        for name in named:
            _check_known(name, manager)
        for item in wanted:
            if item in local:
                tasks |= {labels[task.name]: _local_task(task, labels[task.name]) for task in local[item]}
            else:
                loaded = _load(item, manager)
                tasks |= loaded["tasks"]
                groups |= loaded["groups"]
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise RecipeError(f"{name}: this task runs code that the model writes; bolaco does not")
        if getattr(task, "MULTIMODAL", False):
            raise RecipeError(f"{name}: this task needs more than text")
    return TaskSet(tasks, groups)


def _labels(local: Sequence[LocalTask]) -> dict[str, str]:
    """A name for each file: the file's own, or its whole path where two have the same."""
    files = {Path(task.name) for task in local}
    count = Counter(file.name for file in files)
    return {str(file): file.name if count[file.name] == 1 else str(file) for file in files}


def _local_task(task: LocalTask, label: str) -> Any:
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(config=task.config | {"task": label})


def _manager() -> Any:
    """The index of all tasks of the harness; reading it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_known(name: str, manager: Any) -> None:
    if name not in manager.task_index:
        close = difflib.get_close_matches(name, manager.all_tasks, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`lm_eval ls tasks` lists them"
        raise RecipeError(f"{name}: lm-evaluation-harness has no such task; {hint}")


def _load(name: str, manager: Any) -> Any:
    try:
        return manager.load([name])
    except BolacoError:
        raise
    except Exception as error:  # any library that a task's data or code goes through
        reason = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise DataError(f"{name}: the task cannot be loaded: {reason[0].strip()}") from error


def evaluate_tasks(
    model: str | PreTrainedModel,
    tasks: str | Sequence[str] | TaskSet,
    *,
    limit: int | None = None,
    batch: int = 8,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    reporter: Reporter | None = None,
) -> list[TaskResult]:
    """Accuracy of a dense or compressed model on tasks, by lm-evaluation-harness.

    Prompts, answers and special tokens are the harness's and the tokenizer's own; solved examples are shown only where
    a task asks for them itself.

    Args:
        model: as for :func:`bolaco.compress`; a folder it wrote is loaded like any other.
        tasks: as for :func:`read_tasks`, or what it returned, to load data once for several models.
        limit: the first so many examples of each task; None for all.
        batch: sequences at once.
        tokenizer: for a loaded model.
        dtype, device: as in a recipe, for a model that is loaded here.
        reporter: where progress goes.

    Returns:
        A result for each task, in the given order, and then for each group that has a score of its own.

    Raises:
        BolacoError: with one line that says what to mend.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}")
    if batch < 1:
        raise DataError(f"batch must be at least 1, got {batch}")
    ready = tasks if isinstance(tasks, TaskSet) else read_tasks(tasks)
    loaded = load_model(model, dtype, device) if isinstance(model, str) else model
    if tokenizer is None:
        tokenizer = load_tokenizer(model if isinstance(model, str) else str(loaded.name_or_path))
    from lm_eval.evaluator import evaluate

    from bolaco.evaluation.harness import FEWSHOT_SEED, HarnessModel, undisturbed

    reporter = reporter or Reporter.watched()
    with evaluation_mode(loaded), undisturbed():
        harness = HarnessModel(loaded, tokenizer, batch, reporter)
        for task in ready.tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(FEWSHOT_SEED)
        found = evaluate(
            lm=harness,
            task_dict={"tasks": ready.tasks, "groups": ready.groups},
            limit=limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=False,
        )
    if harness.cut:
        reporter.say(f"{harness.cut} prompts lost their start: the model has {harness.max_length} positions")
    return _results(found)


def _results(found: Any) -> list[TaskResult]:
    """The harness writes ``acc,none`` and ``acc_stderr,none``: metric and filter."""
    results = []
    for name, values in found["results"].items():
        metrics: dict[str, float] = {}
        stderr: dict[str, float | None] = {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = metric if kind == "none" else key
            error = values.get(f"{metric}_stderr,{kind}")
            metrics[label] = float(value)
            stderr[label] = float(error) if isinstance(error, int | float) else None
        if metrics:  # a group may have no score of its own
            results.append(TaskResult(name, values["sample_len"], found["n-shot"].get(name), metrics, stderr))
    return results
