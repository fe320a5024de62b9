"""The factorization methods by name: those in this package, and those that installed packages bring.

A package brings a method through an entry point of the group ``bolaco.methods``, which has the method's name and
resolves to a :class:`Method`. An entry point that cannot be used is named and stands in nobody's way.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points

from bolaco.errors import RecipeError
from bolaco.factorize.method import Method
from bolaco.systems import SYSTEMS

GROUP = "bolaco.methods"

# Name -> the module with its METHOD, imported when it is used.
METHODS: dict[str, str] = {
    "afm": "bolaco.factorize.afm",
    "kfac": "bolaco.factorize.kfac",
    "svd-llm": "bolaco.factorize.svd_llm",
    "asvd": "bolaco.factorize.asvd",
    "fwsvd": "bolaco.factorize.fwsvd",
    "svd": "bolaco.factorize.svd",
    "lpaf": "bolaco.factorize.lpaf",
}


@dataclass(frozen=True)
class Listing:
    """Everything that ``--method`` takes, and one line for each entry point that cannot be used."""

    methods: Mapping[str, Method]
    refused: tuple[str, ...]


def _built_in(name: str) -> Method:
    method: Method = importlib.import_module(METHODS[name]).METHOD
    return method


def _package(point: EntryPoint) -> str:
    """The distribution an entry point is of, with its version."""
    assert point.dist is not None  # entry_points() reads distributions
    return f"{point.dist.name} {point.dist.version}"


def _points() -> dict[str, list[EntryPoint]]:
    """Entry points of the group by name, in an order that does not depend on the file system."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, _package(p))):
        found.setdefault(point.name, []).append(point)
    return found


def _brought(name: str, points: list[EntryPoint]) -> Method:
    """The method of the entry points called ``name``, of which there must be one.

    Raises:
        RecipeError: it cannot be used, in one line with the package's name.
    """
    packages = " and ".join(_package(point) for point in points)
    if name in METHODS or name in SYSTEMS:
        raise RecipeError(f"method {name!r} of {packages} is refused: bolaco has one of that name")
    if len(points) > 1:
        raise RecipeError(f"method {name!r} is refused: {packages} bring one of that name each")
    point = points[0]
    try:
        method = point.load()
    except (Exception, SystemExit) as error:  # the code of others
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise RecipeError(f"method {name!r} of {packages} cannot be loaded from {point.value}: {why}") from error
    if not isinstance(method, Method):
        raise RecipeError(
            f"method {name!r} of {packages}: {point.value} is a {type(method).__name__}, not a bolaco.factorize.Method"
        )
    if method.name != name:
        raise RecipeError(f"method {name!r} of {packages} calls itself {method.name!r}")
    assert point.dist is not None
    return replace(method, package=point.dist.name)


def list_methods() -> Listing:
    """All methods, our own first; imports the packages that bring some."""
    methods = {name: _built_in(name) for name in METHODS}
    refused = []
    for name, points in _points().items():
        try:
            methods[name] = _brought(name, points)
        except RecipeError as error:
            refused.append(str(error))
    return Listing(methods, tuple(refused))


def method_names() -> list[str]:
    """Names of all methods, our own first, without importing the packages that bring some."""
    return [*METHODS, *(name for name in _points() if name not in METHODS)]


def get_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        RecipeError: unknown, with what was probably meant; a recipe rather than a method; or brought by a package in a
            way that cannot be used.
    """
    if name in METHODS:
        return _built_in(name)
    if name in SYSTEMS:
        raise RecipeError(f"factorization.method: {name} is a recipe; give it as --method {name} or in make_recipe")
    points = _points()
    if name in points:
        return _brought(name, points[name])
    known = list(dict.fromkeys([*method_names(), *SYSTEMS]))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
    raise RecipeError(f"factorization.method: unknown method {name!r}{hint}")
