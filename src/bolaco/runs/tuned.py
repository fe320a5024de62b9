"""A run whose result is tuned, as one: the model is compressed into the work folder, and tuned from there.

LPAF (arXiv 2306.14152) is such a run: matrices are pruned and factored, and their factors trained among pruned weights.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bolaco.checkpoint.info import CompressedInfo
from bolaco.checkpoint.result import Result
from bolaco.data.memory import IN_MEMORY, InMemory
from bolaco.errors import RecipeError
from bolaco.progress import Reporter
from bolaco.recipe.recipe import LowRankRecipe, Recipe
from bolaco.runs.chop import chop
from bolaco.runs.compress import compress
from bolaco.runs.tuning import tuning_settings
from bolaco.work.folder import WorkFolder, work_beside


def compress_and_tune(
    recipe: Recipe,
    out: Path,
    reporter: Reporter,
    work: Path | None = None,
    keep_work: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    given: Mapping[str, InMemory] | None = None,
) -> Result[CompressedInfo]:
    """Runs ``recipe``, tunes its result as ``recipe.tuning`` says, and writes ``out``.

    Arguments are as for :func:`bolaco.runs.compress.compress`. After an interruption the compression is gone through
    again from what it left in the work folder, and the tuning goes on from its last checkpoint.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    # transformers' Trainer takes seconds to import.
    from bolaco.tune.run import tune

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("--tune: a run that also compresses has one process; compress first, then `bolaco tune`")
    work = work_beside(out, work)
    place = work / "compressed"
    settings = tuning_settings(recipe, place)
    if settings.data.source.startswith(IN_MEMORY):
        raise RecipeError("tuning.data.source: a text in memory calibrates only; name a source to train on")
    with WorkFolder(work, recipe, out) as folder:
        shutil.rmtree(place, ignore_errors=True)
        first = _for_tuning(recipe, settings.mode)
        words = (place, reporter, work / "compress", True, model, tokenizer, given)
        if isinstance(first, LowRankRecipe):
            compress(first, *words)
        else:
            chop(first, *words)
        result = tune(settings, out, reporter, work / "tune", keep_work, named=recipe.model)
        assert result is not None  # this is the only process
        assert isinstance(result.info, CompressedInfo)  # it was compressed before
        folder.close(keep_work)
    return Result(result.path, result.info)


def _for_tuning(recipe: Recipe, mode: str) -> Recipe:
    """The recipe of the compression: where weights are pruned first, ``mixed-rank`` needs them."""
    options = recipe.method.model_extra or {}
    if mode != "mixed-rank" or "keep_sparse" not in options:
        return recipe
    method = recipe.method.model_copy(update={"keep_sparse": True})
    return recipe.model_copy(update={"method": method})
