"""``bolaco delta``, with its ``apply`` and ``export``, and what ``bolaco inspect`` says of a delta."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from bolaco.commands.words import print_json, reporter_of, settings_given
from bolaco.errors import RecipeError

# Options of `delta` that are fields of its settings.
_DELTA_WORDS = (*("ratio", "method", "calibration", "text_column", "evaluation", "seq_len", "seed", "dtype", "device"),)


def delta_command(args: argparse.Namespace, console: Console) -> None:
    """Makes, applies or exports a delta."""
    what, place = args.models
    if what in ("apply", "export"):
        _use_delta(args, console)
        return
    if args.peft:
        raise RecipeError("--peft is about a delta that is there: bolaco delta export DELTA --peft -o ADAPTER")
    from bolaco.api import delta
    from bolaco.delta.page import document, lines_of
    from bolaco.report.tables import seconds_line

    words: dict[str, Any] = {word: getattr(args, word) for word in _DELTA_WORDS}
    folders: dict[str, Any] = {"out": args.out, "work": args.work, "keep_work": args.keep_work}
    result = delta(what, place, **folders, reporter=reporter_of(args), options=settings_given(args.set), **words)
    if args.json:
        print_json(document(result.path, result.info))
        return
    for line in (*lines_of(result.info), seconds_line(result.info)):
        console.print(line)
    console.print(f"written to {result.path}")


def _use_delta(args: argparse.Namespace, console: Console) -> None:
    """``bolaco delta apply`` and ``bolaco delta export``."""
    what, place = args.models
    given = [f"--{word.replace('_', '-')}" for word in _DELTA_WORDS if getattr(args, word) is not None]
    if given or args.set:
        raise RecipeError(f"delta {what}: takes -o alone, not {(given or ['--set'])[0]}")
    out = Path(args.out).expanduser()
    if what == "apply":
        from bolaco.delta.apply import apply_delta

        apply_delta(place, out)
        console.print(f"written to {out}")
        return
    if not args.peft:
        raise RecipeError("delta export: --peft is the one format there is; `bolaco delta apply` writes a whole model")
    from bolaco.delta.export import export_peft

    for line in export_peft(place, out):
        console.print(line)
    console.print(f"written to {out}")


def inspect_delta(args: argparse.Namespace, console: Console) -> None:
    """Says what is known of a delta."""
    from bolaco.delta.page import delta_page, document, lines_of
    from bolaco.delta.record import read_record
    from bolaco.report.tables import seconds_line
    from bolaco.work.output import refuse_existing

    folder = Path(args.folder)
    info = read_record(folder)
    if args.json:
        print_json(document(folder, info))
        return
    for line in (*lines_of(info), seconds_line(info)):
        console.print(line)
    if args.html:
        refuse_existing(Path(args.html))
        Path(args.html).write_text(delta_page(info, folder.resolve().name), encoding="utf-8")
        console.print(f"report written to {args.html}")
