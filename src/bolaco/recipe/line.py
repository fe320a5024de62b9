"""A recipe in one line: what it is called, and its parts."""

from __future__ import annotations

from bolaco.factorize.method import METHODS
from bolaco.recipe.presets import PRESETS
from bolaco.recipe.recipe import LowRankRecipe, Recipe, make_recipe
from bolaco.recipe.words import SIZES
from bolaco.refine.settings import Refinement
from bolaco.settings import Values


def recipe_line(recipe: Recipe) -> str:
    """Name, method, storage, search and refinement of what is run, for people."""
    name = recipe_name(recipe)
    parts = [f"method {recipe.method.name}"]
    if isinstance(recipe, LowRankRecipe):
        parts += [f"{recipe.storage} storage", f"search {recipe.search.name}", _refinement(recipe.refinement)]
        if recipe.quantization is not None:
            bits = recipe.quantization.format
            parts.append("bits of each matrix chosen" if bits == "auto" else f"matrices in {bits}")
    return f"recipe {name or 'of your own'}: {', '.join(parts)}"


def recipe_name(recipe: Recipe) -> str | None:
    """The preset, or the method that stands for a recipe, whose parts this one has; None if there is none.

    Of presets with the same parts it is the one that agrees in most fields: they differ in options and texts.
    """
    least = {"model": recipe.model} | {
        size: getattr(recipe, size) for size in SIZES if getattr(recipe, size) is not None
    }
    known = {name: make_recipe(least, name) for name in PRESETS}
    method = recipe.method.name
    if method in METHODS and method not in PRESETS:
        known[method] = make_recipe(least | {"method": method})
    fitting = {name: other for name, other in known.items() if _parts(other) == _parts(recipe)}
    return max(fitting, key=lambda name: _agreeing(fitting[name], recipe), default=None)


def _parts(recipe: Recipe) -> tuple[object, ...]:
    if not isinstance(recipe, LowRankRecipe):
        return (recipe.method.name,)
    refinement = recipe.refinement
    trained = refinement.steps > 0 or refinement.trains_end
    return recipe.method.name, recipe.storage, recipe.search.name, refinement.fit, trained


def _agreeing(one: Recipe, other: Recipe) -> int:
    """How many fields are the same."""
    return len(_fields(one.model_dump(mode="json")) & _fields(other.model_dump(mode="json")))


def _fields(values: Values, prefix: str = "") -> set[tuple[str, str]]:
    """Dotted names of fields, each with its value as text."""
    found = set()
    for key, value in values.items():
        found |= _fields(value, f"{prefix}{key}.") if isinstance(value, dict) else {(prefix + key, repr(value))}
    return found


def _refinement(settings: Refinement) -> str:
    done = ["fit to the inputs"] if settings.fit else []
    done += [f"{settings.steps} steps for each block"] if settings.steps else []
    done += [f"{settings.end_steps} steps on next tokens"] if settings.on_logits else []
    done += [f"{settings.scale_steps} of scales"] if settings.scale_steps else []
    return f"refinement: {' and '.join(done)}" if done else "no refinement"
