"""The recipe: everything a run depends on, in frozen, validated dataclass-like models; YAML in and out.

A recipe is versioned, unknown keys are refused, and the same recipe on the same machine gives the same ranks.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from bolaco.errors import RecipeError
from bolaco.systems import SYSTEMS
from bolaco.transform import TRANSFORMS


class Section(BaseModel):
    """A part of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, str_min_length=1)

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads ``yes`` and ``on`` as true, which would pass for the number 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"expected a value, not {str(value).lower()}")
        return value


class Calibration(Section):
    """Text and estimator of the input statistics."""

    source: str = Field("allenai/c4", description="text the covariances are estimated on")
    sequences: int = Field(128, gt=0)
    seq_len: int = Field(1024, ge=2)
    groups: int = Field(32, gt=0, description="groups of the pooled covariance (the paper: 32)")
    batch: int = Field(4, gt=0, description="sequences per forward pass")
    gradient_sequences: int = Field(
        32, gt=0, description="of these, how many the loss gradients are estimated on, for methods that use them"
    )
    cache: Literal["memory", "disk"] = Field("memory", description="where the hidden states between blocks live")


class Validation(Section):
    """Text on which allocations are compared."""

    source: str | None = Field(None, description="default: the calibration source, after the calibration text")
    seq_len: int | None = Field(None, ge=2, description="default: that of the calibration")
    sequences: int = Field(16, gt=0, description="sequences the objective is computed on")
    candidates: int = Field(32, gt=0, description="sequences these are selected from")
    allocations: int = Field(6, ge=0, description="random allocations of the selection; 0 takes the first sequences")
    batch: int = Field(4, gt=0)

    @model_validator(mode="after")
    def _enough(self) -> Validation:
        if self.candidates < self.sequences:
            raise ValueError(f"candidates ({self.candidates}) must be at least sequences ({self.sequences})")
        return self


class Factorization(Section):
    """Which low-rank approximation is computed for each matrix."""

    method: str = Field("kfac", description="a name that `bolaco methods` lists")
    storage: Literal["two-factor", "pivoted", "shared", "dense"] = Field(
        "pivoted",
        description="pivoted: the same product in r^2 fewer parameters; shared: q and k, gate and up have one input "
        "factor; dense: nothing is factored (chop)",
    )


class Search(Section):
    """Space, budget slack and optimiser of the rank allocation."""

    space: Literal["spectral", "5x1", "5x4", "uniform", "welore", "none"] = Field(
        "spectral",
        description="spectral: closed form, from the errors of all matrices; uniform: one ratio for all; "
        "welore: one threshold on all singular values; none: the hand allocation",
    )
    trials: int = Field(50, gt=0)
    initial: int = Field(5, ge=0, description="random allocations between the hand allocation and the model-based ones")
    min_keep: float = Field(0.2, gt=0, lt=1)
    slack: float = Field(
        0.02, ge=0, lt=1, description="proposals may use this share of the linears less than the budget"
    )
    fill: bool = Field(True, description="raise ranks until no affordable multiple is left")
    rank_multiple: int = Field(8, gt=0)
    dense_types: tuple[str, ...] | None = Field(
        None,
        description="matrix types that are never factored; default: v, but none for spectral, uniform and welore, "
        "and v, o, down with shared storage",
    )
    min_ratio: float = Field(
        0.0, ge=0, lt=1, description="welore: a matrix that would lose no more of its rank than this share stays dense"
    )
    objective: Literal["ppl+kl", "ppl"] = "ppl+kl"
    kl_weight: float = Field(1e-3, ge=0)
    surrogate: Literal["fitted", "paper"] = Field(
        "fitted",
        description="fitted: log objective, learnt length scales; paper: raw objective, fixed length scales",
    )
    warm_start: str | None = Field(None, description="folder of an earlier result whose allocation is tried first")


class Refinement(Section):
    """What is done after the ranks are known."""

    fit: bool = Field(False, description="fit every matrix again, on the inputs it has in the compressed model")
    drift: float = Field(1.0, ge=0, le=1, description="share of the change of its inputs that the fit makes up for")
    damping: float = Field(1e-2, ge=0, description="share of the inputs' mean eigenvalue added in that fit")
    sequences: int = Field(32, gt=0, description="of the calibration sequences, how many these two see")
    steps: int = Field(20, ge=0, description="AdamW steps of each block towards the original block's output")
    learning_rate: float = Field(3e-4, gt=0)
    autocast: bool = Field(True, description="bfloat16 products in these steps; parameters stay as they are")
    weight_decay: float = Field(0.01, ge=0)


class Chop(Section):
    """Which blocks go, with ``--method chop``."""

    pattern: Literal["max-gap", "input", "output", "middle", "both"] = Field(
        "middle", description="where the removed blocks were; max-gap: evenly spread; both: half at either end"
    )


class Pruning(Section):
    """Gradual pruning before the factorization, with ``--method lpaf``."""

    sparsity: float | None = Field(None, gt=0, lt=1, description="share of zeros at the end; default: 1 - keep")
    steps: int = Field(64, gt=0, description="AdamW steps on the calibration text")
    batch: int = Field(4, gt=0, description="sequences a step")
    learning_rate: float = Field(2e-5, gt=0)
    score: Literal["sensitivity", "movement"] = Field(
        "sensitivity", description="what elements are kept by: the sum over steps of |dL/dW W|, or of -(dL/dW) W"
    )
    keep_sparse: bool = Field(False, description="write the pruned matrices to sparse.safetensors in the result")


class Evaluation(Section):
    """Text of the final before/after perplexity."""

    source: str | None = Field(None, description="default: the validation source, after the validation text")
    seq_len: int | None = Field(None, ge=2)
    windows: int | None = Field(16, gt=0, description="null: all of the source")


class Recipe(Section):
    """Everything `bolaco compress` does, as data."""

    version: Literal[1] = 1
    model: str
    keep: float = Field(gt=0, le=1, description="parameters of the decoder linears kept")
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    bos: Literal["auto", "text", "window"] = "auto"
    factorization: Factorization = Factorization()
    calibration: Calibration = Calibration()
    validation: Validation = Validation()
    search: Search = Search()
    refinement: Refinement = Refinement()
    chop: Chop = Chop()
    pruning: Pruning = Pruning()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        """What cannot go together, whatever the words were that it came from."""
        storage, space = self.factorization.storage, self.search.space
        if (storage == "dense") != (self.transform is not None):
            raise ValueError(
                f"factorization.storage {storage} with method {self.factorization.method}: dense storage is for "
                f"methods that factor nothing ({', '.join(TRANSFORMS)}), and for them only"
            )
        if storage not in ("shared", "dense"):
            return self
        what = "shared storage" if storage == "shared" else f"method {self.factorization.method}"
        spaces = ("uniform", "spectral", "welore") if storage == "shared" else ("none",)
        if space not in spaces:
            raise ValueError(f"search.space {space} is not possible with {what}; there is {', '.join(spaces)}")
        if self.refinement.fit or (storage == "dense" and self.refines):
            field = "fit" if self.refinement.fit else "steps"
            raise ValueError(f"refinement.{field} is not possible with {what}; leave it out")
        if self.search.warm_start is not None:
            raise ValueError(f"search.warm_start is not possible with {what}; leave it out")
        return self

    @property
    def transform(self) -> str | None:
        """Name of the transform that is this recipe's method; None if matrices are factored."""
        return self.factorization.method if self.factorization.method in TRANSFORMS else None

    @property
    def dense_types(self) -> tuple[str, ...]:
        """Matrix types that are never factored."""
        if self.search.dense_types is not None:
            return self.search.dense_types
        if self.factorization.storage == "shared":
            return ("v", "o", "down")
        return () if self.search.space in ("spectral", "uniform", "welore") else ("v",)

    @property
    def refines(self) -> bool:
        """Whether the blocks are changed once more after the ranks are known."""
        return self.refinement.fit or self.refinement.steps > 0

    @property
    def searches(self) -> bool:
        """Whether allocations are compared by evaluating them."""
        return self.search.space in ("5x1", "5x4")

    def to_yaml(self) -> str:
        """The recipe as YAML that :func:`load_recipe` reads back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the nested keys of ``update`` laid over it; neither is changed."""
    result = dict(base)
    for key, value in update.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


# The settings of arXiv 2405.10616. The pool the 100 validation sequences are chosen from is not published;
# 400 is ours. Constrained proposals are kept as they are there: no filling up, a tenth of slack.
PAPER: dict[str, Any] = {
    "calibration": {"source": "allenai/c4", "sequences": 1024, "seq_len": 4096, "groups": 32},
    "validation": {
        "source": "wikimedia/wikipedia:20231101.en",
        "sequences": 100,
        "candidates": 400,
        "seq_len": 4096,
        "allocations": 20,
    },
    "search": {
        "space": "5x1",
        "trials": 50,
        "initial": 0,
        "slack": 0.1,
        "fill": False,
        "surrogate": "paper",
        "objective": "ppl+kl",
        "kl_weight": 1e-3,
        "dense_types": ("v",),
        "rank_multiple": 8,
        "min_keep": 0.2,
    },
    "factorization": {"method": "afm", "storage": "two-factor"},
    "refinement": {"fit": False, "steps": 0},
    "evaluation": {"source": "Salesforce/wikitext:wikitext-2-raw-v1:test", "seq_len": 4096, "windows": None},
}
_PLAIN = {"fit": False, "steps": 0}
# Other published recipes, on the default's text. Where they deviate from their papers is said in docs/methods.md.
_BOLACO: dict[str, Any] = {"factorization": {"method": "afm", "storage": "two-factor"}, "refinement": _PLAIN}


def _one_shot(method: str, space: str = "uniform") -> dict[str, Any]:
    """A method as its paper has it: two factors, one ratio for all unless it says otherwise, nothing afterwards."""
    return {
        "factorization": {"method": method, "storage": "two-factor"},
        "search": {"space": space},
        "refinement": _PLAIN,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": PAPER,
    "bolaco-5x1": _BOLACO | {"search": {"space": "5x1"}},
    "bolaco-5x4": _BOLACO | {"search": {"space": "5x4"}},
    "svd-llm": _one_shot("svd-llm"),
    "kfac-svd": _one_shot("kfac", "spectral"),
    "asvd": _one_shot("asvd"),
    "fwsvd": _one_shot("fwsvd"),
    "welore": _one_shot("svd", "welore"),
    "aa-svd": {
        "factorization": {"method": "svd-llm", "storage": "two-factor"},
        "search": {"space": "uniform"},
        "refinement": {"fit": True, "drift": 1.0, "steps": 200, "learning_rate": 1e-4, "weight_decay": 0.01},
    },
    "mpifa": {
        "factorization": {"method": "svd-llm", "storage": "pivoted"},
        "search": {"space": "uniform"},
        "refinement": {"fit": True, "drift": 0.25, "steps": 0},
    },
    "lpaf": _one_shot("lpaf"),
    "joint": merge(_one_shot("svd"), {"factorization": {"storage": "shared"}}),
    "chop": merge(_one_shot("chop", "none"), {"factorization": {"storage": "dense"}}),
}


def _resolved(values: dict[str, Any], preset: str) -> dict[str, Any]:
    """``values`` over the preset; a method that is the name of a system becomes that system's recipe.

    Raises:
        RecipeError: another value contradicts the system.
    """
    section = values.get("factorization")
    name = section.get("method") if isinstance(section, dict) else None
    system = SYSTEMS.get(name) if isinstance(name, str) else None
    if system is None:
        return merge(PRESETS[preset], values)
    if preset == "default":
        preset = system.presets[0]
    if preset not in system.presets:
        raise RecipeError(
            f"method {name} is a recipe of its own and so is the preset {preset}; leave out one of the two"
        )
    method = {"factorization": {"method": PRESETS[preset]["factorization"]["method"]}}
    merged = merge(merge(PRESETS[preset], values), method)
    for field, allowed in system.fixed.items():
        part, _, key = field.partition(".")
        given = merged[part].get(key) if isinstance(merged[part], dict) else None
        if given not in allowed:
            raise RecipeError(
                f"{field} {given} contradicts method {name}: {system.because}; leave it out, or take another method"
            )
    return merged


def recipe_values(
    *,
    keep: float | None = None,
    search: str | None = None,
    trials: int | None = None,
    method: str | None = None,
    storage: str | None = None,
    calibration: str | None = None,
    validation: str | None = None,
    evaluation: str | None = None,
    seq_len: int | None = None,
    warm_start: str | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Nested recipe values from the flat words of the command line; what is None is left to the preset.

    ``options`` holds further fields by dotted name, such as ``{"search.rank_multiple": 4}``.
    """
    flat: dict[str, Any] = {
        "keep": keep,
        "search.space": search,
        "search.trials": trials,
        "search.warm_start": warm_start,
        "factorization.method": method,
        "factorization.storage": storage,
        "calibration.source": calibration,
        "calibration.seq_len": seq_len,
        "validation.source": validation,
        "evaluation.source": evaluation,
        "seed": seed,
        "dtype": dtype,
        "device": device,
    }
    given = {name: value for name, value in flat.items() if value is not None}
    return unflatten(given | (options or {}))


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Nested values from dotted names: ``{"search.trials": 3}`` is ``{"search": {"trials": 3}}``."""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        values = merge(values, nested)
    return values


def problems(error: ValidationError, whole: str = "recipe", prefix: str = "") -> str:
    """What is wrong, in one line: the dotted name of each field and the value it got."""
    found = []
    for item in error.errors():
        name = prefix + ".".join(str(part) for part in item["loc"]) if item["loc"] else whole
        given = "" if item["type"] in ("missing", "value_error") else f" (got {item['input']!r})"
        found.append(f"{name}: {item['msg'].removeprefix('Value error, ')}{given}")
    return "; ".join(found)


def make_recipe(values: dict[str, Any], preset: str = "default") -> Recipe:
    """Validates ``values`` over a preset.

    Raises:
        RecipeError: an unknown preset or key, or a value of the wrong type or out of range, by its dotted name.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RecipeError(f"unknown preset {preset!r}; there is {', '.join(PRESETS)}")
    try:
        return Recipe.model_validate(_resolved(values, preset))
    except ValidationError as error:
        raise RecipeError(problems(error)) from None


def recipe_of(name: str, values: dict[str, Any]) -> Recipe:
    """The recipe that ``name`` stands for in a comparison, with ``values`` over it.

    A preset, a system by its name, or else a factorization method: then in two factors, one ratio for all matrices and
    nothing afterwards, as the one-shot presets.

    Raises:
        RecipeError: neither, with what was probably meant; or as :func:`make_recipe`.
    """
    if name in PRESETS:
        return make_recipe(values, name)
    if name in SYSTEMS:
        return make_recipe(values, SYSTEMS[name].presets[0])
    from bolaco.factorize.registry import method_names

    methods = method_names()
    if name in methods:
        return make_recipe(merge(_one_shot(name), values))
    known = list(dict.fromkeys([*PRESETS, *SYSTEMS, *methods]))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    raise RecipeError(f"unknown method or preset {name!r}; {hint}")


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe file.

    Raises:
        RecipeError: the file is unreadable, is no YAML mapping, or fails validation.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not a readable recipe: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a YAML mapping (key: value), found {type(values).__name__}")
    preset = values.pop("preset", "default")
    try:
        return make_recipe(values, preset)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def differing_fields(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names, with both values, of the fields in which two dumped recipes differ."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differing_fields(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key} ({left!r} there, {right!r} here)")
    return found
