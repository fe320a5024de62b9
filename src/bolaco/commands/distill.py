"""``bolaco generate-text``, ``bolaco distill`` and ``bolaco distill predict``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from bolaco.commands.words import reporter_of, settings_given
from bolaco.errors import RecipeError

# Options of `generate-text` that are fields of how a model writes.
_WRITING = ("length", "greedy", "temperature", "top_p", "batch", "seed")


def generate_text_command(args: argparse.Namespace, console: Console) -> None:
    """Lets a model write."""
    from bolaco.api import generate_text

    words = {word: value for word in _WRITING if (value := getattr(args, word)) is not None}
    places: dict[str, Any] = {"work": args.work, "keep_work": args.keep_work, "reporter": reporter_of(args)}
    places |= {"like": args.like, "dtype": args.dtype, "device": args.device}
    found = generate_text(args.model, args.sequences, args.out, **places, **words)
    if found.losses is not None:
        before, after = found.losses
        console.print(
            f"held-out texts of {args.like}: {after:.3f} nats a token behind the prompt, {before:.3f} at first"
        )
    console.print(f"{found.texts:,} texts of {found.tokens:,} tokens written to {found.path}")


def distill_command(args: argparse.Namespace, console: Console) -> None:
    """Distils, or answers with what was distilled."""
    if args.stage == "predict":
        _predict(args, console)
        return
    if args.data is not None or args.items:
        raise RecipeError("--data and --items are of `distill predict`; labelled texts to report on: --eval")
    if args.task is None:
        raise RecipeError("--task FILE is missing: the labelled texts")
    from bolaco.api import distill
    from bolaco.distill.tables import distilled_table

    result = distill(
        args.model,
        args.task,
        args.out,
        until=args.stage or "student",
        student=args.student,
        labels=None if args.labels is None else tuple(args.labels.split(",")),
        evaluation=args.evaluation,
        seed=args.seed,
        dtype=args.dtype,
        device=args.device,
        options=settings_given(args.set),
        work=args.work,
        keep_work=args.keep_work,
        reporter=reporter_of(args),
    )
    if result.info is not None:
        console.print(distilled_table(result.info))
    console.print(f"written to {result.path}")


def _predict(args: argparse.Namespace, console: Console) -> None:
    given = [name for name in ("task", "student", "labels", "evaluation", "work") if getattr(args, name) is not None]
    if given or args.set:
        raise RecipeError(f"distill predict takes --data, --items and --device, not --{(given or ['set'])[0]}")
    if args.data is None:
        raise RecipeError("--data FILE is missing: the texts to answer")
    from bolaco.distill.predict import Predictor, predict_file

    predictor = Predictor(args.model, device=args.device or "auto")
    found = predict_file(predictor, args.data, Path(args.out).expanduser(), args.items)
    right = "" if found.accuracy is None else f", {found.accuracy:.4f} of the labelled ones right"
    console.print(f"{found.texts:,} texts answered{right}; written to {args.out}")
