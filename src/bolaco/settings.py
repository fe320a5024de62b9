"""Settings as frozen, validated data: the base class of all sections, and what is done with nested values."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import to_json

from bolaco.errors import RecipeError, printable

# Nested values before they are validated, and dumped ones: what JSON can hold.
Values = dict[str, Any]
# Levels of lists and mappings in a file, and parts of a dotted name; what we write has fewer than ten.
DEEPEST = 50
_TOO_DEEP = f"nested too deeply (more than {DEEPEST} levels)"
_SHOWN = 80  # letters of a wrong value that an error quotes


class Section(BaseModel):
    """A part of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, str_min_length=1)

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads ``yes`` and ``on`` as true, which would pass for the number 1."""
        allowed = (bool, bool | None)
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in allowed:
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
    """Nested values from dotted names: ``{"search.trials": 3}`` is ``{"search": {"trials": 3}}``.

    Raises:
        RecipeError: a name of more parts than any field has.
    """
    values: Values = {}
    for name, value in flat.items():
        nested: Any = value
        if name.count(".") > DEEPEST:
            raise RecipeError(f"{printable(name[:_SHOWN])}...: {NO_FIELD}")
        for part in reversed(name.split(".")):
            nested = {part: nested}
        values = merge(values, nested)
    return values


NO_FIELD = "there is no such field"


def parsed_json(text: str) -> Any:
    """Nested values from JSON.

    Raises:
        ValueError: it is none, is nested too deeply, or has texts that no file can hold; in one line.
    """
    try:
        values = json.loads(text.removeprefix("\ufeff"))
        _check_depth(values, DEEPEST)
        json.dumps(values, ensure_ascii=False).encode()  # for what it raises
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except UnicodeEncodeError:
        raise ValueError("a text in it has half a character (a surrogate)") from None
    return values


def json_text(value: Any) -> str:
    """Values, records or dataclasses as JSON that any parser reads: Infinity and NaN, which it has not, are strings."""
    return to_json(value, indent=1, inf_nan_mode="strings").decode() + "\n"


def _check_depth(values: Any, left: int) -> None:
    """Raises ValueError if nested values have more levels than are left."""
    if not isinstance(values, dict | list):
        return
    if not left:
        raise ValueError(_TOO_DEEP)
    for value in values.values() if isinstance(values, dict) else values:
        _check_depth(value, left - 1)


class _PlainLoader(yaml.SafeLoader):
    """YAML as far as it is nested values: no aliases, which can stand for more than memory holds, and no tags."""

    # Dates stay text.
    yaml_implicit_resolvers = {  # noqa: RUF012 - as in the class above
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {line}: aliases (*{event.anchor}) are not read; write it out")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"line {line}: tags ({event.tag}) are not read")
        if self._depth >= DEEPEST:
            raise ValueError(_TOO_DEEP)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        known: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                raise ValueError(f"line {line}: a key is a name in quotes or without, not {key.value!r:.40}")
            if key.value in known:
                raise ValueError(f"line {line}: {key.value} is there twice")
            known.add(key.value)
        return super().construct_mapping(node, deep)


def parsed_yaml(text: str) -> Any:
    """Nested values from YAML that is no more than those.

    Raises:
        ValueError: it is no YAML, has aliases, tags or names that are none, or is nested too deeply; in one line.
    """
    try:
        values = yaml.load(text, _PlainLoader)  # a safe loader that takes less
        json.dumps(values, ensure_ascii=False).encode()  # for what it raises
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except UnicodeEncodeError:
        raise ValueError("a text in it has half a character (a surrogate)") from None
    return values


def problems(
    error: ValidationError, whole: str = "recipe", prefix: str = "", section: type[BaseModel] | None = None
) -> str:
    """What is wrong, in one line: the dotted name of each field and the value it got.

    For fields that there are not, ``section`` knows what was probably meant.
    """
    return "; ".join(_problems(error, whole, prefix, section))


def first_problem(error: ValidationError, whole: str) -> str:
    """The first of the :func:`problems`."""
    return next(_problems(error, whole, "", None))


def _problems(error: ValidationError, whole: str, prefix: str, section: type[BaseModel] | None) -> Iterator[str]:
    for item in error.errors():
        name = prefix + ".".join(map(_part, item["loc"])) if item["loc"] else whole
        if item["type"] == "extra_forbidden":
            owner = _section_at(section, item["loc"][:-1])
            hint = "" if owner is None else meant(str(item["loc"][-1]), owner.model_fields)
            yield f"{name}: {NO_FIELD}{hint}"
            continue
        given = "" if item["type"] in ("missing", "value_error") else f" (got {_shown(item['input'])})"
        yield f"{name}: {item['msg'].removeprefix('Value error, ')}{given}"


def _part(name: str | int) -> str:
    """A part of a field's name, which can be any text, in one line."""
    return printable(" ".join(str(name).split())[:_SHOWN]) or "''"


def _shown(value: Any) -> str:
    """A value as an error quotes it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


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
