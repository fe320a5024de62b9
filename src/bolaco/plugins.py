"""Registries: what is found by a name, built in or brought by installed packages.

A package brings something through an entry point of the registry's group, which has the thing's name and resolves to
it. An entry point that cannot be used is named in listings and stands in nobody's way. Ours are one file each in a
folder, which is their list.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, Protocol, TypeVar

from bolaco.errors import RecipeError
from bolaco.settings import meant


class Named(Protocol):
    """What a registry holds: it has a name, and says what it is."""

    @property
    def name(self) -> str:
        """As users write it."""

    @property
    def paper(self) -> str:
        """Where it is from."""

    @property
    def summary(self) -> str:
        """One line for ``bolaco methods``."""


T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class Listing(Generic[T]):
    """Everything a registry has, by name; the package each comes with; a line for each entry point that is unusable."""

    items: Mapping[str, T]
    packages: Mapping[str, str]
    refused: tuple[str, ...]


def package_of(point: EntryPoint) -> str:
    """The distribution an entry point is of, with its version."""
    assert point.dist is not None  # entry_points() reads distributions
    return f"{point.dist.name} {point.dist.version}"


def in_folder(package: str, attribute: str) -> dict[str, str]:
    """What a folder of one file each holds: name -> ``module:attribute``; ``a_b.py`` has what is called ``a-b``."""
    spec = importlib.util.find_spec(package)
    assert spec is not None  # a folder of ours
    modules = pkgutil.iter_modules(spec.submodule_search_locations)
    return {m.name.replace("_", "-"): f"{package}.{m.name}:{attribute}" for m in modules}


class Registry(Generic[T]):
    """Things of one kind by name.

    Args:
        kind: what one of them is called in messages, such as ``method``.
        field: the setting that names one, such as ``method.name``.
        of: their type.
        built_in: name -> ``module:attribute``, imported when it is used.
        group: entry points of installed packages; None where packages cannot bring any.
        reserved: names that packages must not take beside those of the built-in ones.
    """

    def __init__(
        self,
        kind: str,
        field: str,
        of: type[T],
        built_in: Mapping[str, str],
        group: str | None = None,
        reserved: Sequence[str] = (),
    ) -> None:
        self.kind, self.field, self.of = kind, field, of
        self.built_in, self.group, self.reserved = dict(built_in), group, tuple(reserved)

    def get(self, name: str) -> T:
        """The thing called ``name``.

        Raises:
            RecipeError: unknown, with what was probably meant; or brought by a package in a way that cannot be used.
        """
        if name in self.built_in:
            module, _, attribute = self.built_in[name].partition(":")
            found: T = getattr(importlib.import_module(module), attribute)
            return found
        points = self._points()
        if name in points:
            return self._brought(name, points[name])
        raise RecipeError(f"{self.field}: unknown {self.kind} {name!r}{meant(name, self.names())}")

    def __contains__(self, name: str) -> bool:
        return name in self.built_in or name in self._points()

    def names(self) -> list[str]:
        """All names, the built-in ones first, without importing the packages that bring some."""
        return [*self.built_in, *(name for name in self._points() if name not in self.built_in)]

    def package(self, name: str) -> str:
        """The distribution that the thing of this name comes with."""
        point = None if name in self.built_in else next(iter(self._points().get(name, [])), None)
        return "bolaco" if point is None or point.dist is None else point.dist.name

    def listing(self) -> Listing[T]:
        """Everything; imports the packages that bring some."""
        items = {name: self.get(name) for name in self.built_in}
        refused = []
        for name, points in self._points().items():
            try:
                items[name] = self._brought(name, points)
            except RecipeError as error:
                refused.append(str(error))
        return Listing(items, {name: self.package(name) for name in items}, tuple(refused))

    def _points(self) -> dict[str, list[EntryPoint]]:
        """Entry points of the group by name, in an order that does not depend on the file system."""
        if self.group is None:
            return {}
        found: dict[str, list[EntryPoint]] = {}
        for point in sorted(entry_points(group=self.group), key=lambda p: (p.name, package_of(p))):
            found.setdefault(point.name, []).append(point)
        return found

    def _brought(self, name: str, points: Sequence[EntryPoint]) -> T:
        """What the entry points called ``name`` bring, of which there must be one.

        Raises:
            RecipeError: it cannot be used, in one line with the package's name.
        """
        packages = " and ".join(package_of(point) for point in points)
        if name in self.built_in or name in self.reserved:
            raise RecipeError(f"{self.kind} {name!r} of {packages} is refused: bolaco has one of that name")
        if len(points) > 1:
            raise RecipeError(f"{self.kind} {name!r} is refused: {packages} bring one of that name each")
        point = points[0]
        try:
            found = point.load()
        except (Exception, SystemExit) as error:  # the code of others
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise RecipeError(
                f"{self.kind} {name!r} of {packages} cannot be loaded from {point.value}: {why}"
            ) from error
        if not isinstance(found, self.of):
            raise RecipeError(
                f"{self.kind} {name!r} of {packages}: {point.value} is a {type(found).__name__}, "
                f"not a bolaco {self.of.__name__}"
            )
        lacking = [key for key in ("name", "paper", "summary") if not isinstance(getattr(found, key, None), str)]
        if lacking:
            raise RecipeError(f"{self.kind} {name!r} of {packages}: {point.value} has no {lacking[0]}")
        if found.name != name:
            raise RecipeError(f"{self.kind} {name!r} of {packages} calls itself {found.name!r}")
        return found
