"""``bolaco compress`` and ``bolaco run``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bolaco.commands.words import print_json, reporter_of, settings_given
from bolaco.errors import RecipeError
from bolaco.recipe.words import WORDS

if TYPE_CHECKING:
    from bolaco.recipe.recipe import Recipe


def _recipes(args: argparse.Namespace) -> dict[str, Recipe]:
    """What is to be run: one recipe without a name, or one for each keep ratio by the name of its folder."""
    from bolaco.recipe.recipe import load_recipe, make_recipe, recipe_values
    from bolaco.settings import merge

    if args.command == "run":
        return {"": load_recipe(args.recipe)}
    words = {word: getattr(args, word) for word in WORDS} | {"keep": args.keep and args.keep[0]}
    words["optimize"] = args.optimize
    values = recipe_values(**words, options=settings_given(args.set))
    recipe = make_recipe(merge({"model": args.model}, values), args.preset)
    if args.keep is None or len(args.keep) == 1:
        return {"": recipe}
    from bolaco.runs.several import at_ratios

    for option in ("print_recipe", "push_to_hub"):
        if getattr(args, option):
            raise RecipeError(f"--{option.replace('_', '-')} is about one result; give one --keep")
    return dict(at_ratios(recipe, args.keep))


def compress_command(args: argparse.Namespace, console: Console) -> None:
    """Compresses, once or at several keep ratios, or says what would be done."""
    recipes = _recipes(args)
    if args.command == "compress" and args.print_recipe:
        print(recipes[""].to_yaml(), end="")  # noqa: T201 - the recipe is the output
        return
    if args.dry_run:
        _dry_run(args, console, recipes)
        return
    if not args.out:
        raise RecipeError("-o OUT is missing: the folder to write")
    if args.push_to_hub is not None:
        from bolaco.checkpoint.hub import check_hub

        check_hub(args.push_to_hub)
    if "" not in recipes:
        _compress_several(args, console, recipes)
        return
    from bolaco.api import run
    from bolaco.report.document import result_document
    from bolaco.report.tables import seconds_line, size_notes, summary_table, tuning_table

    reporter = reporter_of(args)
    result = run(recipes[""], args.out, work=args.work, keep_work=args.keep_work, reporter=reporter)
    if args.json:
        print_json(result_document(result.path, result.info))
    else:
        console.print(summary_table(result.info))
        for line in size_notes(result.info):
            console.print(line)
        console.print(seconds_line(result.info))
        if result.info.tuning is not None:
            console.print(tuning_table(result.info.tuning))
            console.print(seconds_line(result.info.tuning))
        console.print(f"written to {result.path}")
    if args.push_to_hub is not None:
        from bolaco.checkpoint.hub import push

        reporter.say(f"uploading to {args.push_to_hub}")
        address = push(result.path, args.push_to_hub)
        reporter.say(f"uploaded to {address}")


def _dry_run(args: argparse.Namespace, console: Console, recipes: Mapping[str, Recipe]) -> None:
    from bolaco.runs.dry_run import described, values

    places = [None if place is None else Path(place).expanduser() for place in (args.out, args.work)]
    if args.json:
        found = {name: values(recipe, *places) for name, recipe in recipes.items()}
        print_json(found.get("", found))
        return
    for name, recipe in recipes.items():
        if name:
            console.print(f"{name}:")
        for part in described(recipe, *places):
            console.print(part)


def _compress_several(args: argparse.Namespace, console: Console, recipes: Mapping[str, Recipe]) -> None:
    from bolaco.report.document import result_document
    from bolaco.report.tables import size_notes, sizes_table
    from bolaco.runs.several import compress_several

    work = None if args.work is None else Path(args.work).expanduser()
    found = compress_several(recipes, Path(args.out).expanduser(), reporter_of(args), work, args.keep_work)
    infos = {name: result.info for name, result in found.results.items()}
    if args.json:
        results = {name: result_document(result.path, result.info) for name, result in found.results.items()}
        print_json({"path": str(found.path), "results": results})
        return
    console.print(sizes_table(infos))
    for line in dict.fromkeys(line for info in infos.values() for line in size_notes(info)):
        console.print(line)
    console.print(f"written to {', '.join(str(result.path) for result in found.results.values())}")
