"""What commands share: the words that are settings, where progress goes, and results as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolaco.errors import RecipeError

if TYPE_CHECKING:
    from bolaco.progress import Reporter


def settings_given(pairs: Sequence[str]) -> dict[str, Any]:
    """What ``--set FIELD=VALUE`` says."""
    from bolaco.settings import parsed_yaml

    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--set {pair}: expected FIELD=VALUE")
        try:
            options[name] = parsed_yaml(value)
        except ValueError as error:
            raise RecipeError(f"--set {name}: the value is no plain YAML: {error}") from None
    return options


def reporter_of(args: argparse.Namespace) -> Reporter:
    """Where progress goes: to the standard error, as loud as was asked."""
    from bolaco.progress import Reporter

    return Reporter(quiet=args.quiet, verbose=args.verbose)


def print_json(value: Any) -> None:
    """Prints a value as a document of JSON."""
    from bolaco.settings import json_text

    print(json_text(value), end="")  # noqa: T201 - it is the output


def check_json_file(args: argparse.Namespace) -> None:
    """Refuses ``--json`` in a folder that is not there, before anything is computed."""
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise RecipeError(f"--json {args.json}: there is no such folder")


def write_json(args: argparse.Namespace, value: Any) -> None:
    """The result where ``--json`` says, if it says something."""
    from bolaco.settings import json_text

    if args.json == "-":
        print_json(value)
    elif args.json:
        Path(args.json).write_text(json_text(value), encoding="utf-8")
