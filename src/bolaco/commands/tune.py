"""``bolaco tune``."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from bolaco.commands.words import reporter_of, settings_given

# Options of `tune` that are fields of its settings.
_TUNE_WORDS = (
    *("evaluation", "text_column", "seq_len", "max_steps", "epochs", "minutes", "batch", "learning_rate", "distill"),
    *("teacher", "seed", "dtype", "device"),
)


def tune_command(args: argparse.Namespace, console: Console) -> None:
    """Tunes a model."""
    from bolaco.api import tune
    from bolaco.report.tables import seconds_line, tuning_table

    words: dict[str, Any] = {word: getattr(args, word) for word in _TUNE_WORDS}
    words["types"] = None if args.types is None else tuple(args.types.split(","))
    folders: dict[str, Any] = {"out": args.out, "work": args.work, "keep_work": args.keep_work}
    given = settings_given(args.set)
    result = tune(args.model, args.mode, args.data, **folders, reporter=reporter_of(args), options=given, **words)
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
