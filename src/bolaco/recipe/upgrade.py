"""Recipes of version 1 as recipes of version 2.

Version 1 had the method and the storage in a section ``factorization``, options of methods in sections of their own
(``chop``, ``pruning``), and called the search its space, with ``none`` for the hand allocation as well as for nothing.
"""

from __future__ import annotations

from typing import Any

from bolaco.allocate.allocator import ALLOCATORS
from bolaco.recipe.presets import PRESETS, SYSTEMS
from bolaco.settings import Values

# Old dotted name -> new one. A section stands for all its fields.
RENAMED = {
    "factorization.method": "method.name",
    "factorization.storage": "storage",
    "search.space": "search.name",
    "chop.pattern": "method.pattern",
    "pruning": "method",
}


# What version 1 did where it refined and nothing was said.
_REFINEMENT = {"sequences": 32, "held_out": 0, "logit_steps": 0}


def renamed(values: Values) -> str | None:
    """An old name among nested values, and what it is called now: one line, or None."""
    for old, new in RENAMED.items():
        section, _, field = old.partition(".")
        found = values.get(section)
        if isinstance(found, dict) and (not field or field in found):
            return f"{old}: is called {new} now"
    return None


def upgraded(values: Values, preset: str | None = None) -> Values:
    """Nested values of version 1 in version 2; fields that their search or method does not read are left out.

    Values that are not as they were in version 1 are left for the validation to find.

    Args:
        values: of version 1, whole or over a preset.
        preset: says which method and search that is where the values do not; :func:`preset_before` by default.
    """
    preset = preset_before(values) if preset is None else preset
    result = {key: value for key, value in values.items() if key not in ("factorization", "chop", "pruning")}
    result["version"] = 2
    factorization = _section(values, "factorization")
    base = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    name = factorization.get("method", base.get("method", {}).get("name"))
    method: Values = {"name": name} if "method" in factorization else {}
    if name == "chop":
        method |= _section(values, "chop")
        for section in ("search", "refinement"):
            result.pop(section, None)
    elif name == "lpaf":
        method |= _section(values, "pruning")
    if method:
        result["method"] = method
    if "storage" in factorization and name != "chop":
        result["storage"] = factorization["storage"]
    if isinstance(result.get("search"), dict):
        result["search"] = _search(result["search"], base.get("search", {}).get("name"))
    calibration = _section(values, "calibration")
    if calibration.get("cache") == "memory":  # the default then, which whole recipes spell out; results do not tell
        result["calibration"] = calibration | {"cache": "auto"}
    if name != "chop":
        result["refinement"] = _REFINEMENT | _section(result, "refinement")
    return result


def preset_before(values: Values) -> str:
    """What values of version 1 without a preset were laid over: the system their method names, else the default."""
    method = _section(values, "factorization").get("method")
    system = SYSTEMS.get(method) if isinstance(method, str) else None
    return "default" if system is None else system.presets[0]


def _section(values: Values, name: str) -> dict[str, Any]:
    found = values.get(name)
    return dict(found) if isinstance(found, dict) else {}


def _search(old: Values, default: str | None) -> Values:
    """The section of the search; of its fields those that the allocator has, as version 1 had one list for all."""
    search = {"name": "hand" if old["space"] == "none" else old["space"]} if "space" in old else {}
    name = search.get("name", default)
    known: set[str] = set()
    if isinstance(name, str) and name in ALLOCATORS:
        known = set().union(*(ALLOCATORS.get(other).options.model_fields for other in ALLOCATORS.built_in))
        known -= ALLOCATORS.get(name).options.model_fields.keys()
    return search | {key: value for key, value in old.items() if key != "space" and key not in known}
