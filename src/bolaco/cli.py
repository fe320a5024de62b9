"""The command line. Each command parses its words, builds a recipe and makes one call; heavy imports are inside."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from bolaco.errors import BolacoError, RecipeError, no_memory, no_space
from bolaco.parser import command_parser
from bolaco.recipe.words import COMPARED, WORDS


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--set {pair}: expected FIELD=VALUE")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"--set {pair}: the value is no YAML") from None
    return options


def _compress(args: argparse.Namespace, console: Console) -> None:
    from bolaco.recipe.recipe import load_recipe, make_recipe, recipe_values
    from bolaco.settings import merge

    if args.command == "run":
        recipe = load_recipe(args.recipe)
    else:
        values = recipe_values(**{word: getattr(args, word) for word in WORDS}, options=_settings(args.set))
        recipe = make_recipe(merge({"model": args.model}, values), args.preset)
        if args.print_recipe:
            print(recipe.to_yaml(), end="")  # noqa: T201 - the recipe is the output
            return
    if args.dry_run:
        from bolaco.runs.dry_run import described

        for part in described(recipe):
            console.print(part)
        return
    if not args.out:
        raise RecipeError("-o OUT is missing: the folder to write")
    from bolaco.api import run
    from bolaco.progress import Reporter
    from bolaco.report.tables import seconds_line, summary_table, tuning_table

    result = run(recipe, args.out, work=args.work, keep_work=args.keep_work, reporter=Reporter())
    console.print(summary_table(result.info))
    console.print(seconds_line(result.info))
    if result.info.tuning is not None:
        console.print(tuning_table(result.info.tuning))
        console.print(seconds_line(result.info.tuning))
    console.print(f"written to {result.path}")


def _compare(args: argparse.Namespace, console: Console) -> None:
    try:
        keep = [float(word) for word in args.keep.split(",")]
    except ValueError:
        raise RecipeError(f"--keep {args.keep}: expected numbers with commas between, such as 0.9,0.8") from None
    methods = [word.strip() for word in args.methods.split(",") if word.strip()]
    if args.tasks is None and (args.task_limit is not None or args.task_keep is not None):
        raise RecipeError("--task-limit and --task-keep are about --tasks, which is missing")
    from bolaco.api import compare
    from bolaco.progress import Reporter
    from bolaco.report.comparison import rich_table

    result = compare(
        args.model,
        methods,
        keep,
        args.out,
        evaluation=args.evaluation or (),
        tasks=args.tasks or (),
        task_limit=args.task_limit,
        task_keep=args.task_keep,
        keep_models=args.keep_models,
        work=args.work,
        keep_work=args.keep_work,
        reporter=Reporter(),
        options=_settings(args.set),
        **{word: getattr(args, word) for word in COMPARED},
    )
    console.print(rich_table(result.record))
    for row in result.failed:
        console.print(f"{row.method} at keep {row.keep:g} failed: {row.error}")
    console.print(f"written to {result.path}")
    if len(result.failed) == len(result.record.rows):
        raise BolacoError(f"{result.path}: no row has a result")


def _eval(args: argparse.Namespace, console: Console) -> None:
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise RecipeError(f"--json {args.json}: there is no such folder")
    if args.data is None and args.tasks is None:
        raise RecipeError("eval needs --data SRC for perplexity, --tasks NAMES for accuracy, or both")
    if args.limit is not None and args.data is None:
        raise RecipeError("--limit counts the windows of --data, which is missing; examples of tasks: --task-limit")
    if args.task_limit is not None and args.tasks is None:
        raise RecipeError("--task-limit counts the examples of --tasks, which is missing; windows of --data: --limit")
    for option, count in (("--batch", args.batch), ("--task-limit", args.task_limit)):
        if count is not None and count < 1:
            raise RecipeError(f"{option} {count}: must be at least 1")
    from bolaco.api import evaluate, evaluate_tasks, read_tasks
    from bolaco.models.load import load_model, load_tokenizer
    from bolaco.progress import Reporter
    from bolaco.report.tables import tasks_table

    # What can be wrong with the tasks is found before the hours a perplexity can take.
    tasks = None if args.tasks is None else read_tasks(args.tasks)
    model, tokenizer = args.model, None
    if args.data is not None and tasks is not None:
        model, tokenizer = load_model(args.model, args.dtype, args.device), load_tokenizer(args.model)
    common: dict[str, Any] = {"tokenizer": tokenizer, "dtype": args.dtype, "device": args.device}
    common |= {"reporter": Reporter()} | ({} if args.batch is None else {"batch": args.batch})
    record: dict[str, Any] = {"model": args.model}
    if args.data is not None:
        result = evaluate(model, args.data, seq_len=args.seq_len, limit=args.limit, bos=args.bos, **common)
        console.print(
            f"perplexity {result.perplexity:.4f} on {result.windows} x {result.seq_len} tokens of {args.data} "
            f"({result.tokens:,} predicted, {result.seconds:.1f} s)"
        )
        record |= {"data": args.data} | asdict(result)
    if tasks is not None:
        scores = evaluate_tasks(model, tasks, limit=args.task_limit, **common)
        console.print(tasks_table(scores))
        record["tasks"] = {score.task: score.record for score in scores}
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _bench(args: argparse.Namespace, console: Console) -> None:
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise RecipeError(f"--json {args.json}: there is no such folder")
    batches = [int(word) if word.strip().isdigit() else 0 for word in args.batch.split(",")]
    if min(batches) < 1:
        raise RecipeError(f"--batch {args.batch}: expected numbers from 1 up with commas between, such as 1,8")
    for option, count in (("--prompt", args.prompt), ("--new-tokens", args.new_tokens)):
        if count < 1:
            raise RecipeError(f"{option} {count}: must be at least 1")
    from bolaco.evaluation.speed import measure_apart
    from bolaco.progress import Reporter
    from bolaco.report.tables import speed_table

    found = []
    with Reporter().stage("measure", len(args.models)) as tick:
        for model in args.models:
            settings = {"batches": batches, "prompt": args.prompt, "new": args.new_tokens}
            found.append(measure_apart(model, **settings, dtype=args.dtype, device=args.device))
            tick(1)
    console.print(speed_table(found))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(speed) for speed in found], indent=1) + "\n", encoding="utf-8")


# Options of `tune` that are fields of its settings.
_TUNE_WORDS = (
    *("evaluation", "seq_len", "max_steps", "epochs", "minutes", "batch", "learning_rate", "distill", "teacher"),
    *("seed", "dtype", "device"),
)


def _tune(args: argparse.Namespace, console: Console) -> None:
    from bolaco.api import tune
    from bolaco.progress import Reporter
    from bolaco.report.tables import seconds_line, tuning_table

    words: dict[str, Any] = {word: getattr(args, word) for word in _TUNE_WORDS}
    words["types"] = None if args.types is None else tuple(args.types.split(","))
    folders: dict[str, Any] = {"out": args.out, "work": args.work, "keep_work": args.keep_work}
    given = _settings(args.set)
    result = tune(args.model, args.mode, args.data, **folders, reporter=Reporter(), options=given, **words)
    if result is None:
        return
    record = result.info.tuning
    assert record is not None  # it was tuned
    console.print(tuning_table(record))
    if record.out_of_time:
        console.print(f"stopped at the budget of {record.settings['training']['minutes']:g} minutes")
    console.print(seconds_line(record))
    if record.note:
        console.print(record.note)
    console.print(f"written to {result.path}")


def _inspect(args: argparse.Namespace, console: Console) -> None:
    from bolaco.checkpoint.info import CompressedInfo, read_any_info, read_curves
    from bolaco.report.tables import (
        allocation_line,
        blocks_line,
        experts_table,
        kept_line,
        ranks_table,
        seconds_line,
        summary_table,
        trials_table,
        tuning_table,
    )
    from bolaco.work.output import refuse_existing

    info = read_any_info(args.folder)
    record = info.tuning
    while record is not None:
        console.print(tuning_table(record))
        console.print(seconds_line(record))
        record = record.earlier
    if not isinstance(info, CompressedInfo):
        return
    console.print(summary_table(info))
    if info.ranks:
        console.print(ranks_table(info.ranks))
        if info.allocation:
            console.print(allocation_line(info))
    else:
        console.print(blocks_line(info.layers, info.layers_dense))
    if info.tokens_per_expert:
        console.print(experts_table(info.tokens_per_expert))
    if info.kept:
        console.print(kept_line(info))
    if info.walk:
        console.print(f"statistics from whole forward passes: {info.walk}")
    if info.trials:
        console.print(trials_table(info.trials))
        best = [min(t.objective for t in info.trials[: i + 1]) for i in range(len(info.trials))]
        console.print("best objective so far: " + " ".join(f"{value:.5g}" for value in best))
    console.print(seconds_line(info))
    if args.html:
        from bolaco.report.html import result_page

        refuse_existing(Path(args.html))
        page = result_page(info, read_curves(args.folder), Path(args.folder).resolve().name)
        Path(args.html).write_text(page, encoding="utf-8")
        console.print(f"report written to {args.html}")


def _export(args: argparse.Namespace, console: Console) -> None:
    from bolaco.checkpoint.export import export_dense

    counts = export_dense(args.folder, Path(args.out), args.drop_bias)
    before, after = counts["parameters"], counts["parameters_dense"]
    console.print(
        f"written to {args.out}: a stock checkpoint with {after:,} parameters; the compressed one has {before:,}. "
        "Multiplying the factors gives the saved size and speed back."
    )


def _methods(args: argparse.Namespace, console: Console) -> None:
    from bolaco.listing import one_of_it, tables

    for part in tables() if args.name is None else one_of_it(args.name):
        console.print(part)


_COMMANDS = {
    "compress": _compress,
    "compare": _compare,
    "run": _compress,
    "eval": _eval,
    "tune": _tune,
    "bench": _bench,
    "inspect": _inspect,
    "export": _export,
    "methods": _methods,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    args = command_parser().parse_args(argv)
    # Libraries draw their own bars on import; a run shows one set only.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Names of models and files are printed as they are: no markup, no emoji codes in them.
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        _COMMANDS[args.command](args, console)
    except BolacoError as error:
        errors.print(f"bolaco: error: {' '.join(str(error).splitlines())}")
        return 1
    except KeyboardInterrupt:
        errors.print("bolaco: stopped; the same command continues where this one was")
        return 130
    except Exception as error:
        if no_space(error):
            errors.print("bolaco: error: no space left on the disk; free some and give the same command again")
            return 1
        if no_memory(error):
            errors.print(
                "bolaco: error: not enough memory; the same command continues where this one was, and takes less with "
                "--set calibration.batch=1, --set calibration.cache=disk or a shorter --seq-len"
            )
            return 1
        if isinstance(error, OSError) and error.filename is not None:
            errors.print(f"bolaco: error: {error.filename}: {error.strerror}")
            return 1
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
