"""Settings as frozen, validated data: the base class of all sections, and what is done with nested values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

# Nested values before they are validated, and dumped ones: what JSON can hold.
Values = dict[str, Any]


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


def merge(base: Values, update: Values) -> Values:
    """``base`` with the nested keys of ``update`` laid over it; neither is changed."""
    result = dict(base)
    for key, value in update.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def unflatten(flat: Mapping[str, Any]) -> Values:
    """Nested values from dotted names: ``{"search.trials": 3}`` is ``{"search": {"trials": 3}}``."""
    values: Values = {}
    for name, value in flat.items():
        nested: Any = value
        for part in reversed(name.split(".")):
            nested = {part: nested}
        values = merge(values, nested)
    return values


NO_FIELD = "there is no such field"


def problems(
    error: ValidationError, whole: str = "recipe", prefix: str = "", section: type[BaseModel] | None = None
) -> str:
    """What is wrong, in one line: the dotted name of each field and the value it got.

    For fields that there are not, ``section`` knows what was probably meant.
    """
    found = []
    for item in error.errors():
        name = prefix + ".".join(str(part) for part in item["loc"]) if item["loc"] else whole
        if item["type"] == "extra_forbidden":
            owner = _section_at(section, item["loc"][:-1])
            hint = "" if owner is None else meant(str(item["loc"][-1]), owner.model_fields)
            found.append(f"{name}: {NO_FIELD}{hint}")
            continue
        given = "" if item["type"] in ("missing", "value_error") else f" (got {item['input']!r})"
        found.append(f"{name}: {item['msg'].removeprefix('Value error, ')}{given}")
    return "; ".join(found)


def _section_at(section: type[BaseModel] | None, place: Sequence[str | int]) -> type[BaseModel] | None:
    """The section that is a field of a section, of that, and so on; None if one of them is none."""
    for name in place:
        field = None if section is None else section.model_fields.get(str(name))
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return section


def meant(name: str, known: Iterable[str], limit: int = 20) -> str:
    """The end of an error about an unknown name: what was probably meant, or what there is if that is not too long."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(names)}" if 0 < len(names) < limit else ""


def described(options: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """Name, default and meaning of every field of some options, for a listing."""
    rows = []
    for name, field in options.model_fields.items():
        default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
        rows.append((prefix + name, default, field.description or ""))
    return rows
