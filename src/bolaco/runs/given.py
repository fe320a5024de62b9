"""Texts in memory where functions take the name of a source: their names, and the sizes they bring along."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from bolaco.data.memory import Data, InMemory, in_memory
from bolaco.recipe.recipe import BaseRecipe
from bolaco.settings import Section

R = TypeVar("R", bound=BaseRecipe)

# Words that name a source.
SOURCES = ("calibration", "validation", "evaluation")


def named(data: Data, purpose: str, given: dict[str, InMemory]) -> str:
    """The name of a source; that of a text in memory is put into ``given``.

    Raises:
        DataError: it is neither.
    """
    if isinstance(data, str):
        return data
    found = in_memory(data, purpose)
    given[found.name] = found
    return found.name


def named_words(words: Mapping[str, Any], given: dict[str, InMemory]) -> dict[str, Any]:
    """Words of a recipe in which every source has a name; blocks of tokens say how long sequences are.

    Raises:
        DataError: a source is neither a name nor a text.
    """
    found = dict(words)
    for word in SOURCES:
        if found.get(word) is not None:
            found[word] = named(found[word], word, given)
    blocks = given.get(found.get("calibration") or "")
    if found.get("seq_len") is None and blocks is not None and blocks.tokens is not None:
        found["seq_len"] = blocks.tokens.shape[1]
    return found


def fitted(recipe: R, given: Mapping[str, InMemory], asked: Collection[str] = ()) -> R:
    """The recipe with as many sequences as the blocks of tokens that it reads can give.

    Args:
        recipe: as the words and the preset say.
        given: texts in memory by name.
        asked: fields by dotted name that were asked for, and stay.
    """
    calibration, validation, evaluation = recipe.calibration, recipe.validation, recipe.evaluation
    searched = validation.source or calibration.source
    reported = evaluation.source or searched
    update: dict[str, Section] = {}
    blocks = _blocks(given, reported)
    if blocks is not None and reported != calibration.source and not any(f.startswith("evaluation.") for f in asked):
        count, length = blocks
        windows = None if evaluation.windows is None else min(evaluation.windows, count)
        update["evaluation"] = evaluation.model_copy(update={"windows": windows, "seq_len": length})
    blocks = _blocks(given, calibration.source)
    if blocks is not None and "calibration.sequences" not in asked:
        others = validation.candidates if recipe.searches and searched == calibration.source else 0
        others += (evaluation.windows or 1) if reported == calibration.source else 0
        if 0 < blocks[0] - others < calibration.sequences:
            update["calibration"] = calibration.model_copy(update={"sequences": blocks[0] - others})
    return recipe.model_copy(update=update)


def _blocks(given: Mapping[str, InMemory], source: str) -> tuple[int, int] | None:
    """How many blocks of tokens a source is, and their length; None for text."""
    found = given.get(source)
    return None if found is None or found.tokens is None else (found.tokens.shape[0], found.tokens.shape[1])
