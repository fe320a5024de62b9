"""What a recipe says of the tuning of its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bolaco.data.sources import is_self
from bolaco.errors import RecipeError
from bolaco.recipe.recipe import Recipe
from bolaco.settings import merge
from bolaco.tune.settings import TuneSettings, make_settings


def tuning_settings(recipe: Recipe, place: Path) -> TuneSettings:
    """The settings of the tuning, of the compressed model in a folder.

    Text, its length, seed and device are those of the recipe unless they are given.

    Raises:
        RecipeError: there is no such mode, or no such setting or option of it.
    """
    from bolaco.tune.mode import MODES
    from bolaco.tune.resolve import resolve

    given = dict(recipe.tuning or {})
    text = {"source": recipe.calibration.source, "seq_len": recipe.calibration.seq_len}
    defaults: dict[str, Any] = {"data": text, "seed": recipe.seed, "device": recipe.device, "bos": recipe.bos}
    if recipe.evaluation.source is not None:
        defaults["evaluation"] = {"source": recipe.evaluation.source}
    if "model" in given:
        raise RecipeError("tuning.model: it is what was compressed; leave it out")
    try:
        settings = make_settings(str(place), {}, {"data.source": text["source"]} | merge(defaults, given))
        mode = MODES.get(settings.mode)
        if "whole" in mode.options.model_fields:  # the model that an adapter would name does not stay
            settings = settings.model_copy(update={"options": settings.options | {"whole": True}})
        resolve(settings, mode)
        if is_self(settings.data.source):
            raise RecipeError("data.source: text of the model itself calibrates only; name a source to train on")
    except RecipeError as error:
        raise RecipeError(f"tuning: {error}") from None
    return settings
