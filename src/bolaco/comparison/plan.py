"""What is compared: a recipe for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, TypeAdapter, ValidationError

from bolaco.errors import RecipeError
from bolaco.recipe.recipe import Recipe, applicable, laid_over, make_recipe, preset_of, recipe_values
from bolaco.settings import merge, problems, unflatten


class Comparison(BaseModel):
    """What a comparison depends on: a recipe for each row, by name, and what is measured beside perplexity.

    ``size`` is the field of the recipes that has the values of ``keep``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    model: str
    methods: tuple[str, ...]
    size: Literal["keep", "keep_model", "target_size"] = "keep"
    keep: tuple[float, ...]
    recipes: dict[str, Recipe]
    others: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    task_keep: float | None = None
    keep_models: bool = False
    quantized: tuple[str, ...] = ()


def row_name(method: str, keep: float) -> str:
    """Name of a row, of its recipe and its model."""
    return f"{method}-{int(keep) if keep > 1 else keep}"


def make_comparison(
    model: str,
    methods: Sequence[str],
    keep: Sequence[float] = (),
    *,
    keep_model: Sequence[float] = (),
    target_size: Sequence[int | str] = (),
    evaluation: Sequence[str] = (),
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    task_keep: float | None = None,
    keep_models: bool = False,
    quantized: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    **words: Any,
) -> Comparison:
    """The comparison that the words of the command line ask for.

    Args:
        model: as for :func:`bolaco.compress`.
        methods: presets and factorization methods (see :func:`bolaco.recipe.recipe.preset_of`).
        keep: keep ratios; or else ``keep_model``, shares of all parameters, or ``target_size``, bytes of all weights.
        evaluation: sources perplexity is reported on; the first one is the recipes'.
        tasks: see :func:`bolaco.evaluation.tasks.read_tasks`.
        task_limit: examples of each task.
        task_keep: the keep ratio tasks are run at; the first one by default.
        keep_models: the checkpoints are part of the result.
        quantized: forms that the original is rounded to as well, see :data:`bolaco.comparison.plain.FORMS`.
        options: further fields by dotted name, of all recipes that have them, or of one method as ``method:field``.
        words: further fields of all recipes, see :func:`bolaco.recipe.recipe.recipe_values`.

    Raises:
        RecipeError: in one line.
    """
    sizes = {"keep": keep, "keep_model": keep_model, "target_size": target_size}
    given = {name: values for name, values in sizes.items() if values}
    methods = tuple(dict.fromkeys(methods))
    if not methods or not given:
        raise RecipeError("a comparison needs at least one method and one keep ratio")
    if len(given) > 1:
        raise RecipeError(f"exactly one of {', '.join(sizes)} is needed; {' and '.join(given)} are given")
    ((size, values),) = given.items()
    keep = tuple(dict.fromkeys(_number(size, value) for value in values))
    if task_keep is not None and task_keep not in keep:
        raise RecipeError(f"--task-keep {task_keep:g}: not one of the keep ratios {', '.join(f'{k:g}' for k in keep)}")
    if task_limit is not None and task_limit < 1:
        raise RecipeError(f"--task-limit {task_limit}: must be at least 1")
    general: dict[str, Any] = {}
    special: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for field, value in (options or {}).items():
        method, colon, name = field.partition(":")
        if colon and method not in special:
            raise RecipeError(f"--set {field}: {method!r} is not one of the methods compared")
        (special[method] if colon else general)[name if colon else field] = value
    first = evaluation[0] if evaluation else None
    common = merge({"model": model}, recipe_values(evaluation=first, **words))
    recipes: dict[str, Recipe] = {}
    used: set[str] = set()
    for ratio in keep:
        for method in methods:
            preset, own = preset_of(method)
            mine = laid_over(own, unflatten(special[method]))
            # What is said for all is said to those that have such a field.
            fitting = applicable(general, laid_over(common, mine), preset)
            used |= fitting.keys()
            row = laid_over(laid_over(laid_over(own, common), unflatten(fitting)), unflatten(special[method]))
            recipes[row_name(method, ratio)] = make_recipe(row | {size: _asked(size, ratio)}, preset)
    if any(recipe.tuning is not None for recipe in recipes.values()):
        raise RecipeError("tuning: a comparison trains nothing end to end; leave it out")
    unused = [field for field in general if field not in used]
    if unused:
        raise RecipeError(f"--set {unused[0]}: none of the methods compared has such a field")
    if len({(recipe.model, recipe.dtype, recipe.device) for recipe in recipes.values()}) > 1:
        raise RecipeError("model, dtype and device must be the same for all methods compared")
    return Comparison(
        model=model,
        methods=methods,
        size=size,
        keep=keep,
        recipes=recipes,
        others=tuple(dict.fromkeys(evaluation[1:])),
        tasks=tuple(tasks),
        task_limit=task_limit,
        task_keep=(keep[0] if task_keep is None else task_keep) if tasks else None,
        keep_models=keep_models,
        quantized=tuple(dict.fromkeys(quantized)),
    )


def _number(size: str, value: float | str) -> float:
    """A size as a number, bytes with or without a unit.

    Raises:
        RecipeError: it is none.
    """
    if size != "target_size":
        return float(value)
    try:
        return float(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError as error:
        raise RecipeError(problems(error, "target_size")) from None


def _asked(size: str, value: float) -> float | int:
    """The value of a recipe's field."""
    return int(value) if size == "target_size" else value
