"""``bolaco compare``."""

from __future__ import annotations

import argparse

from rich.console import Console

from bolaco.commands.words import reporter_of, settings_given
from bolaco.errors import BolacoError, RecipeError
from bolaco.recipe.words import COMPARED


def compare_command(args: argparse.Namespace, console: Console) -> None:
    """Compares methods."""
    try:
        keep = [] if args.keep is None else [float(word) for word in args.keep.split(",")]
    except ValueError:
        raise RecipeError(f"--keep {args.keep}: expected numbers with commas between, such as 0.9,0.8") from None
    methods = [word.strip() for word in args.methods.split(",") if word.strip()]
    if args.tasks is None and (args.task_limit is not None or args.task_keep is not None):
        raise RecipeError("--task-limit and --task-keep are about --tasks, which is missing")
    from bolaco.api import compare
    from bolaco.report.comparison import asked_words, rich_table

    result = compare(
        args.model,
        methods,
        keep,
        args.out,
        keep_model=args.keep_model or (),
        target_size=[word.strip() for word in (args.target_size or "").split(",") if word.strip()],
        evaluation=args.evaluation or (),
        tasks=args.tasks or (),
        task_limit=args.task_limit,
        task_keep=args.task_keep,
        keep_models=args.keep_models,
        quantized=() if args.quantized == "none" else [word.strip() for word in args.quantized.split(",")],
        work=args.work,
        keep_work=args.keep_work,
        reporter=reporter_of(args),
        options=settings_given(args.set),
        **{word: getattr(args, word) for word in COMPARED},
    )
    console.print(rich_table(result.record))
    for row in result.failed:
        console.print(f"{row.method} at {asked_words(result.record.size, row.keep)} failed: {row.error}")
    console.print(f"written to {result.path}")
    if len(result.failed) == len(result.record.rows):
        raise BolacoError(f"{result.path}: no row has a result")
