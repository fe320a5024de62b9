"""``bolaco eval`` and ``bolaco bench``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from rich.console import Console

from bolaco.commands.words import check_json_file, reporter_of, write_json
from bolaco.errors import RecipeError


def eval_command(args: argparse.Namespace, console: Console) -> None:
    """Perplexity, accuracy or both."""
    check_json_file(args)
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
    from bolaco.evaluation.perplexity import evaluation_windows
    from bolaco.models.load import load_config, load_model, load_tokenizer
    from bolaco.report.tables import tasks_table

    # In order of cost: what is wrong shows before the weights are read, and before the hours a perplexity can take.
    config, tokenizer = load_config(args.model), load_tokenizer(args.model)
    text = (args.seq_len, args.limit, args.bos, args.text_column)
    windows = None if args.data is None else evaluation_windows(args.data, tokenizer, config, *text)
    tasks = None if args.tasks is None else read_tasks(args.tasks)
    model = load_model(args.model, args.dtype, args.device)
    common: dict[str, Any] = {"tokenizer": tokenizer, "reporter": reporter_of(args)} | (
        {} if args.batch is None else {"batch": args.batch}
    )
    record: dict[str, Any] = {"model": args.model}
    silent = args.json == "-"
    if windows is not None:
        result = evaluate(model, windows, **common)
        if not silent:
            console.print(
                f"perplexity {result.perplexity:.4f} on {result.windows} x {result.seq_len} tokens of {args.data} "
                f"({result.tokens:,} predicted, {result.seconds:.1f} s)"
            )
        record |= {"data": args.data} | asdict(result)
    if tasks is not None:
        scores = evaluate_tasks(model, tasks, limit=args.task_limit, **common)
        if not silent:
            console.print(tasks_table(scores))
        record["tasks"] = {score.task: score.record for score in scores}
    write_json(args, record)


def bench_command(args: argparse.Namespace, console: Console) -> None:
    """Speed and memory."""
    check_json_file(args)
    batches = [int(word) if word.strip().isdigit() else 0 for word in args.batch.split(",")]
    if min(batches) < 1:
        raise RecipeError(f"--batch {args.batch}: expected numbers from 1 up with commas between, such as 1,8")
    for option, count in (("--prompt", args.prompt), ("--new-tokens", args.new_tokens)):
        if count < 1:
            raise RecipeError(f"{option} {count}: must be at least 1")
    if args.deltas:
        if args.runtime != "eager":
            raise RecipeError(f"--runtime {args.runtime}: deltas beside one base run in eager only")
        _bench_deltas(args, console)
        return
    from bolaco.evaluation.engines import runtime_named
    from bolaco.evaluation.speed import measure_apart
    from bolaco.report.tables import speed_table

    runtimes = [runtime_named(word.strip()).name for word in args.runtime.split(",")]
    found = []
    with reporter_of(args).stage("measure", len(args.models) * len(runtimes)) as tick:
        for runtime in runtimes:
            for model in args.models:
                settings = {"batches": batches, "prompt": args.prompt, "new": args.new_tokens, "runtime": runtime}
                found.append(measure_apart(model, **settings, dtype=args.dtype, device=args.device))
                tick(1)
    if args.json != "-":
        console.print(speed_table(found))
    write_json(args, found)


def _bench_deltas(args: argparse.Namespace, console: Console) -> None:
    counts = [int(word) if word.strip().isdigit() else 0 for word in args.counts.split(",")]
    if min(counts) < 1:
        raise RecipeError(f"--counts {args.counts}: expected numbers from 1 up with commas between, such as 1,4,16")
    from bolaco.delta.bench import delta_table, measure_deltas

    found = []
    words = {"prompt": args.prompt, "new": args.new_tokens, "dtype": args.dtype, "device": args.device}
    with reporter_of(args).stage("measure", len(counts)) as tick:
        for row in measure_deltas(args.models, counts, unpacked=args.unpacked, **words):
            found.append(row)
            tick(1)
    if args.json != "-":
        console.print(delta_table(found))
        console.print("in brackets: memory over one whole model's; tokens/s of whole models")
    write_json(args, found)
