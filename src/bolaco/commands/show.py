"""``bolaco inspect``, ``bolaco methods`` and ``bolaco completion``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from bolaco.commands.delta import inspect_delta
from bolaco.commands.words import print_json
from bolaco.errors import MissingPackageError, RecipeError
from bolaco.parser import command_parser


def inspect_command(args: argparse.Namespace, console: Console) -> None:
    """Says what is known of a result."""
    from bolaco.checkpoint.info import CompressedInfo, read_any_info, read_curves
    from bolaco.models.adapters import is_delta
    from bolaco.report.tables import (
        allocation_line,
        blocks_line,
        experts_table,
        kept_line,
        ranks_table,
        seconds_line,
        size_notes,
        summary_table,
        trials_table,
        tuning_table,
    )
    from bolaco.work.output import refuse_existing

    if is_delta(args.folder):
        inspect_delta(args, console)
        return
    info = read_any_info(args.folder)
    if args.json:
        from bolaco.report.document import result_document

        if args.html:
            raise RecipeError("--json prints one document, and --html writes another; leave out one of the two")
        print_json(result_document(Path(args.folder), info))
        return
    record = info.tuning
    while record is not None:
        console.print(tuning_table(record))
        console.print(seconds_line(record))
        record = record.earlier
    if not isinstance(info, CompressedInfo):
        return
    console.print(summary_table(info))
    for line in size_notes(info):
        console.print(line)
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


def methods_command(args: argparse.Namespace, console: Console) -> None:
    """Lists what is registered."""
    from bolaco.listing import one_of_it, tables

    for part in tables() if args.name is None else one_of_it(args.name):
        console.print(part)


def completion_command(args: argparse.Namespace, console: Console) -> None:
    """Prints the completion of a shell."""
    try:
        import shtab
    except ImportError:
        raise MissingPackageError("completion needs shtab; pip install 'bolaco[completion]'") from None
    print(shtab.complete(command_parser(), args.shell))  # noqa: T201 - it is the output
