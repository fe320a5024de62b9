"""The recipe: everything a run depends on, in frozen, validated sections; YAML in and out.

A recipe is versioned, unknown keys are refused, and the same recipe on the same machine gives the same ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
import yaml
from pydantic import (
    ByteSize,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from bolaco.allocate.allocator import ALLOCATORS, Allocator
from bolaco.data.settings import Calibration, Evaluation, Validation
from bolaco.errors import RecipeError
from bolaco.factorize.method import METHODS, ChosenMethod
from bolaco.models.structure import Structure, with_offers
from bolaco.quantize.settings import Quantization
from bolaco.recipe.presets import OPTIMIZED, PRESETS, SYSTEMS, one_shot
from bolaco.recipe.upgrade import preset_before, renamed, upgraded
from bolaco.recipe.words import SIZES, flat_values
from bolaco.refine.settings import Refinement
from bolaco.settings import NO_FIELD, Section, Values, meant, merge, parsed_yaml, problems, unflatten
from bolaco.storage.coded import CodedStorage
from bolaco.storage.storage import STORAGES, TWO_FACTORS, Storage
from bolaco.transform.base import TRANSFORMS, Transform

# What a recipe that factors matrices has and one of a transform has not.
_FACTORING = ("storage", "search", "refinement", "quantization")
# What a recipe says nothing of where it is not asked for.
_UNSAID = (*SIZES, "stream", "tuning", "quantization")


class _HasOptions(Protocol):
    @property
    def options(self) -> type[Section]: ...


class Choice(Section):
    """A name, and the options of what it names beside it: ``{name: kfac, shrinkage: 0.1}``, or the name alone."""

    model_config = ConfigDict(extra="allow")
    kind: ClassVar[str]

    name: str

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def options_of(self, chosen: _HasOptions) -> Section:
        """The options, as those of what was chosen."""
        return chosen.options.model_validate(self.model_extra or {})


class MethodChoice(Choice):
    """Which low-rank approximation is computed for each matrix, or which transform is applied."""

    kind = "method"


class SearchChoice(Choice):
    """How ranks are found, and what all ways to find them have in common."""

    kind = "search"

    rank_multiple: int = Field(8, gt=0, description="ranks are multiples of it")
    dense_types: tuple[str, ...] | None = Field(
        None, description="matrix types that are never factored; default: what storage and search say"
    )
    warm_start: str | None = Field(None, description="folder of an earlier result whose allocation is started from")


class BaseRecipe(Section):
    """What all recipes have."""

    version: Literal[2] = 2
    model: str
    keep: float | None = Field(None, gt=0, le=1, description="share of the decoder linears' parameters to keep")
    keep_model: float | None = Field(None, gt=0, le=1, description="share of all the model's parameters to keep")
    target_size: ByteSize | None = Field(None, gt=0, description="bytes of all the weights of the result")
    seed: int = Field(0, ge=0, lt=2**32)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    stream: bool | None = Field(
        None, description="weights in memory for their block's turn only; default: where they leave too little room"
    )
    bos: Literal["auto", "text", "window"] = "auto"
    method: MethodChoice
    calibration: Calibration = Calibration()
    validation: Validation = Validation()
    evaluation: Evaluation = Evaluation()
    tuning: Values | None = Field(
        None, description="settings of `bolaco tune` that the result is tuned with: its mode, and what else is given"
    )

    @field_validator("tuning")
    @classmethod
    def _with_mode(cls, value: Values | None) -> Values | None:
        if value is not None and not isinstance(value.get("mode"), str):
            raise ValueError("mode is missing: what is trained (--tune MODE)")
        return value

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        given = [name for name in SIZES if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            raise ValueError(f"exactly one of {', '.join(SIZES)} says how small the result is; {found}")
        return self

    @model_serializer(mode="wrap")
    def _without_the_unsaid(self, dump: SerializerFunctionWrapHandler) -> Values:
        """A recipe does not speak of sizes, tuning and quantization that it does not ask for."""
        values: Values = dump(self)
        return {name: value for name, value in values.items() if name not in _UNSAID or value is not None}

    @property
    def share(self) -> float:
        """The keep ratio; only a recipe that asks for one, or was settled for a model, has it."""
        assert self.keep is not None  # see bolaco.runs.size.settled
        return self.keep

    @property
    def searches(self) -> bool:
        """Whether allocations are compared by evaluating them."""
        return False

    @property
    def asked(self) -> str:
        """The size that was asked for, in words."""
        if self.target_size is not None:
            return f"target size {self.target_size.human_readable(decimal=True)}"
        return f"keep {self.keep:g}" if self.keep is not None else f"keep {self.keep_model:g} of all parameters"

    def to_yaml(self) -> str:
        """The recipe as YAML that :func:`load_recipe` reads back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class TransformRecipe(BaseRecipe):
    """A run that makes a smaller model without factors."""

    @property
    def refinement(self) -> None:
        """Nothing is done afterwards."""

    @property
    def calibrates(self) -> bool:
        """No text is read but that of the evaluation."""
        return False

    @property
    def transform(self) -> Transform:
        """What is applied."""
        return TRANSFORMS.get(self.method.name)

    @property
    def options(self) -> Section:
        """Options of the transform."""
        return self.method.options_of(self.transform)


class LowRankRecipe(BaseRecipe):
    """A run that factors matrices: everything `bolaco compress` does, as data."""

    storage: str = Field(description="how factored matrices are stored; a name that `bolaco methods` lists")
    search: SearchChoice
    refinement: Refinement = Refinement()
    quantization: Quantization | None = Field(None, description="bits of matrices; without it they are not quantized")

    @property
    def counts_bits(self) -> bool:
        """Whether the keep ratio is a share of bits, not of parameters: for a target size that codes are to meet."""
        return self.quantization is not None and self.target_size is not None

    def priced(self, dtype: torch.dtype) -> Storage:
        """The storage, in the unit that the budget is counted in; ``dtype`` is of what has no codes."""
        if self.quantization is None or not self.counts_bits:
            return self.form
        return CodedStorage(self.form, self.quantization.options, self.quantization.group, dtype)

    @property
    def chosen(self) -> ChosenMethod:
        """The method with its options."""
        method = METHODS.get(self.method.name)
        return ChosenMethod(method, self.method.options_of(method))

    @property
    def form(self) -> Storage:
        """The storage."""
        return STORAGES.get(self.storage)

    @property
    def allocator(self) -> Allocator:
        """What finds the ranks."""
        return ALLOCATORS.get(self.search.name)

    @property
    def allocator_options(self) -> Section:
        """Its options."""
        return self.search.options_of(self.allocator)

    def units(self, structure: Structure) -> Structure:
        """The decoder as the storage divides it, with what the allocator may take instead."""
        units = self.form.units(structure, self.dense_types)
        # Errors that are relative to a matrix say nothing of a stack beside its matrices.
        if self.form.stacks or not self.chosen.method.comparable or not self.allocator.offers(self.allocator_options):
            return units
        return with_offers(units, self.dense_types)

    @property
    def dense_types(self) -> tuple[str, ...]:
        """Matrix types that are never factored."""
        if self.search.dense_types is not None:
            return self.search.dense_types
        of_storage = self.form.dense_types
        return self.allocator.dense_types if of_storage is None else of_storage

    @property
    def searches(self) -> bool:
        """Whether allocations are compared by evaluating them."""
        return self.allocator.searches

    @property
    def calibrates(self) -> bool:
        """Whether any stage reads the calibration text."""
        return self.refinement.active or self.chosen.method.reads_text


Recipe = LowRankRecipe | TransformRecipe


def recipe_values(*, options: dict[str, Any] | None = None, optimize: str | None = None, **words: Any) -> Values:
    """Nested recipe values from the words of :mod:`bolaco.recipe.words`; what is None is left to the preset.

    ``options`` holds further fields by dotted name, such as ``{"search.rank_multiple": 4}``. ``optimize`` is a key of
    :data:`bolaco.recipe.presets.OPTIMIZED`.

    Raises:
        RecipeError: ``optimize`` is unknown, or chooses what another word chooses otherwise.
    """
    values = flat_values(words) | (options or {})
    if optimize is not None and optimize not in OPTIMIZED:
        raise RecipeError(f"optimize {optimize!r}: must be one of {', '.join(OPTIMIZED)}")
    for field, value in OPTIMIZED.get(optimize or "", {}).items():
        if values.setdefault(field, value) != value:
            raise RecipeError(
                f"optimize {optimize} means {field} {value}, and {field} {values[field]} was asked for; leave out one"
            )
    return unflatten(values)


def _choices(values: Values) -> Values:
    """Values in which a choice that is only a name is a mapping."""
    short = {key: {"name": values[key]} for key in ("method", "search") if isinstance(values.get(key), str)}
    return values | short


def laid_over(base: Values, update: Values) -> Values:
    """``update`` over ``base``; where it chooses something else, the options of what ``base`` chose are dropped.

    An effort takes the place of all that ``base`` says of refinement.
    """
    base, update = _choices(base), _choices(update)
    for key, common in (("method", ()), ("search", tuple(SearchChoice.model_fields))):
        section, other = base.get(key), update.get(key)
        name = other.get("name") if isinstance(other, dict) else None
        if isinstance(section, dict) and name not in (None, section.get("name")):
            base = base | {key: {k: v for k, v in section.items() if k in common and k != "name"}}
    refinement = update.get("refinement")
    if isinstance(refinement, dict) and "effort" in refinement:  # it says what all of the section is
        base = {key: value for key, value in base.items() if key != "refinement"}
    return merge(base, update)


def resolved(values: Values, preset: str | None = None) -> Values:
    """``values`` over the preset.

    Without a preset, the name of a method is that of a whole recipe, as in a comparison (see :func:`preset_of`); with
    one, the method takes the place of the preset's. The default is meant where there is neither.

    Raises:
        RecipeError: an unknown preset, or values that contradict the system or the preset that the method names.
    """
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise RecipeError(f"unknown preset {preset!r}{meant(str(preset), PRESETS)}")
    values = _choices(values)
    section = values.get("method", {})
    name = section.get("name") if isinstance(section, dict) else None
    if preset is None:
        preset, own = preset_of(name) if isinstance(name, str) and _is_known(name) else ("default", {})
        values = laid_over(own, values)
    of_preset = PRESETS[preset]["method"]["name"]
    if name is None and isinstance(section, dict) and of_preset in TRANSFORMS:
        name = of_preset
    system = SYSTEMS.get(name) if isinstance(name, str) else None
    if isinstance(name, str) and (system is not None or (name in PRESETS and name not in METHODS)):
        if preset not in (system.presets if system is not None else (name,)):
            raise RecipeError(
                f"method {name} is a recipe of its own and so is the preset {preset}; leave out one of the two"
            )
        values = values | {"method": {**section, "name": of_preset}}
    merged = laid_over(PRESETS[preset], values)
    if values.get("quantization") is not None and values.get("storage") is None:
        stored = merged.get("storage")
        if isinstance(stored, str) and stored in STORAGES and STORAGES.get(stored).fragile:
            merged["storage"] = TWO_FACTORS
    if system is None:
        if of_preset in TRANSFORMS and not {"storage", "search"} <= merged.keys():
            raise RecipeError(
                f"method {name} contradicts the preset {preset}, which factors nothing; leave out one of the two"
            )
        return merged
    given = [field for field in _FACTORING if values.get(field) is not None] if system.kind == "transform" else []
    for field in (*given, *system.fixed):
        value = _field(merged, field)
        if field in given or value not in [_field(PRESETS[p], field) for p in system.presets]:
            shown = "" if isinstance(value, dict) else f" {value}"
            raise RecipeError(
                f"{field}{shown} contradicts method {name}: {system.because}; leave it out, or take another method"
            )
    return merged


def _is_known(name: str) -> bool:
    return name in PRESETS or name in SYSTEMS or name in METHODS


def _field(values: Values, name: str) -> Any:
    section, _, key = name.partition(".")
    found = values.get(section)
    return (found.get(key) if isinstance(found, dict) else None) if key else found


def make_recipe(values: Values, preset: str | None = None) -> Recipe:
    """Validates ``values`` over a preset; without one, over the recipe that their method names, or the default.

    Raises:
        RecipeError: an unknown preset or key, or a value of the wrong type or out of range, by its dotted name.
    """
    old = renamed(values)
    if old is not None:
        raise RecipeError(old)
    return _made(resolved(values, preset))


def _made(values: Values) -> Recipe:
    """The recipe of complete values.

    Raises:
        RecipeError: everything that is wrong with them, in one line.
    """
    section = values.get("method")
    name = section.get("name") if isinstance(section, dict) else None
    transforms = isinstance(name, str) and name in TRANSFORMS
    if isinstance(name, str) and not transforms and name not in METHODS:
        known = dict.fromkeys([*METHODS.names(), *SYSTEMS, *PRESETS])
        raise RecipeError(f"method.name: unknown method {name!r}{meant(name, known)}")
    found: list[str] = []
    values = dict(values)
    for key, registry in (("method", TRANSFORMS if transforms else METHODS), ("search", ALLOCATORS)):
        section = values.get(key)
        if isinstance(section, dict) and isinstance(section.get("name"), str):
            common = SearchChoice.model_fields if key == "search" else {"name": None}
            options = {k: v for k, v in section.items() if k not in common}
            chosen: _HasOptions = registry.get(section["name"])
            try:
                checked = chosen.options.model_validate(options).model_dump(mode="json")
                values[key] = {k: v for k, v in section.items() if k in common} | checked
            except ValidationError as error:
                found += _option_problems(error, key, section["name"], chosen.options)
                values[key] = {k: v for k, v in section.items() if k in common}
    kind = TransformRecipe if transforms else LowRankRecipe
    try:
        recipe = kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError("; ".join([problems(error, section=kind), *found])) from None
    if found:
        raise RecipeError("; ".join(found))
    if isinstance(recipe, LowRankRecipe):
        _check(recipe)
    return recipe


def _option_problems(error: ValidationError, section: str, name: str, options: type[Section]) -> list[str]:
    found = []
    for item in error.errors():
        if item["type"] == "extra_forbidden":
            field = str(item["loc"][0])
            hint = meant(field, options.model_fields)
            found.append(f"{section}.{field}: {section} {name!r} has no such option{hint}")
    others = [item for item in error.errors() if item["type"] != "extra_forbidden"]
    if others:
        lines = problems(error, section, f"{section}.").split("; ")
        found += [line for line in lines if NO_FIELD not in line]
    return found


def _check(recipe: LowRankRecipe) -> None:
    """Raises RecipeError for parts that cannot go together, whatever the words were that they came from."""
    storage, allocator = recipe.form, recipe.allocator
    if storage.stacks and not allocator.stacks:
        known = ", ".join(name for name in ALLOCATORS.names() if ALLOCATORS.get(name).stacks)
        raise RecipeError(f"search.name {allocator.name} is not possible with {storage.name} storage; there is {known}")
    if recipe.quantization is not None:
        _check_quantization(recipe, recipe.quantization)
    if storage.stacks and recipe.refinement.fit:
        raise RecipeError(f"refinement.fit is not possible with {storage.name} storage; leave it out")
    if recipe.search.warm_start is not None and (storage.stacks or not allocator.warms):
        what = f"{storage.name} storage" if storage.stacks else f"search {allocator.name}"
        raise RecipeError(f"search.warm_start is not possible with {what}; leave it out")


def _check_quantization(recipe: LowRankRecipe, settings: Quantization) -> None:
    """Raises RecipeError for what does not go with codes."""
    storage, auto = recipe.form, settings.bits is None
    if storage.fragile:
        raise RecipeError(
            f"storage {storage.name} does not go with quantization: {storage.fragile}; leave it out, which makes two "
            "factors"
        )
    if auto and recipe.target_size is None and not recipe.counts_bits:
        raise RecipeError("quantization auto needs a size in bytes to choose bits for: give --target-size")
    if auto and not recipe.allocator.chooses_bits:
        known = ", ".join(name for name in ALLOCATORS.names() if ALLOCATORS.get(name).chooses_bits)
        raise RecipeError(f"search {recipe.allocator.name} chooses no bits; take --search {known}, or one --quantize")
    if auto and storage.stacks:
        raise RecipeError(f"quantization auto is not possible with {storage.name} storage; take one --quantize")
    if recipe.tuning is not None:
        raise RecipeError("what is quantized cannot be tuned; leave out one of --quantize and --tune")


def applicable(options: dict[str, Any], values: Values, preset: str | None) -> dict[str, Any]:
    """Of fields by dotted name, those that the recipe of ``values`` over a preset has: in a comparison of several
    recipes, what is said for all of them is for those that have such a field.

    Raises:
        RecipeError: as :func:`resolved`.
    """
    merged = resolved(values, preset)
    names = {key: _field(merged, f"{key}.name") for key in ("method", "search")}
    transforms = names["method"] in TRANSFORMS
    found = {}
    for field, value in options.items():
        section, _, key = field.partition(".")
        if transforms and section in _FACTORING:
            continue
        if section in names and isinstance(names[section], str):
            registry = ALLOCATORS if section == "search" else TRANSFORMS if transforms else METHODS
            chosen: _HasOptions = registry.get(names[section])
            common = SearchChoice.model_fields if section == "search" else MethodChoice.model_fields
            if key and key not in common and key not in chosen.options.model_fields:
                continue
        found[field] = value
    return found


def preset_of(name: str) -> tuple[str, Values]:
    """The preset, and values over it, that ``name`` stands for in a comparison and as the method of a recipe.

    A preset, a system by its name, or else a factorization method: then in two factors, one ratio for all matrices and
    nothing afterwards, as the one-shot presets.

    Raises:
        RecipeError: neither, with what was probably meant.
    """
    if name in PRESETS:
        return name, {}
    if name in SYSTEMS:
        return SYSTEMS[name].presets[0], {}
    if name in METHODS:
        return "default", one_shot(name)
    known = list(dict.fromkeys([*PRESETS, *SYSTEMS, *METHODS.names()]))
    raise RecipeError(f"unknown method or preset {name!r}{meant(name, known, limit=100)}")


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe file, of this version or of version 1.

    Raises:
        RecipeError: the file is unreadable, is no YAML mapping, or fails validation.
    """
    try:
        values = parsed_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: not a readable recipe: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a YAML mapping (key: value), found {type(values).__name__}")
    preset = values.pop("preset", None)
    try:
        if values.get("version") == 1:
            preset = preset_before(values) if preset is None else preset
            values = upgraded(values, preset)
        return make_recipe(values, preset)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def read_recipe(values: Values) -> Recipe:
    """The recipe in a result of this version or an earlier one; what its method came from need not be installed.

    Raises:
        RecipeError: it is none.
    """
    values = upgraded(values) if values.get("version") == 1 else values
    kind = LowRankRecipe if "storage" in values else TransformRecipe
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(problems(error)) from None
