"""The house: no import circles, no room that imports from one above it, names of storages and allocators in one place.

All imports count, those inside functions and those for type checkers too.
"""

from __future__ import annotations

import ast
import functools
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import bolaco

SOURCE = Path(bolaco.__file__).parent
# Bottom to top; a room may import from those before it and from itself.
ROOMS = (
    "version",
    "errors",
    "settings",
    "plugins",
    "progress",
    "parallel",
    "quantize",
    "work",
    "layers",
    "models",
    "runtime",
    "data",
    "evaluation",
    "statistics",
    "transform",
    "factorize",
    "storage",
    "allocate",
    "refine",
    "checkpoint",
    "recipe",
    "report",
    "tune",
    "runs",
    "distill",
    "comparison",
    "delta",
    "testing",
    "listing",
    "api",
    "parser",
    "commands",
    "cli",
    "__main__",
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            # A name of a module in the package, or a name in a module.
            names = [names[0]] if len(names) == 2 and names[0] in MODULES else names
        else:
            continue
        yield from (name for name in names if name in MODULES)


GRAPH = {name: set(imported(path)) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    """The room of a module; the package itself is above all."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of modules, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                found = visit(other, [*path, name])
                if found:
                    return found
            done.add(name)
        return []

    for name in sorted(graph):
        found = visit(name, [])
        if found:
            return found
    return []


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_there_are_no_import_circles() -> None:
    assert circle(GRAPH) == []


def test_every_module_is_in_a_room() -> None:
    assert {room(name) for name in MODULES} - {""} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_no_room_imports_from_a_room_above_it(name: str) -> None:
    below = {"", *ROOMS[: ROOMS.index(name) + 1]}
    upward = {
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        if room(module) == name
        for other in others
        if room(other) not in below
    }
    assert upward == set()


# What each name may stand in besides presets: the files that define it, and help.
NAMES = {
    "pivoted": {"layers/pivoted.py"},
    "shared": {"storage/storages/shared.py"},
    "two-factor": {"layers/low_rank.py"},
    "spectral": {"allocate/allocators/spectral.py"},
    "welore": {"allocate/allocators/welore.py"},
}
PRESETS = "recipe/presets.py"


@functools.cache
def literals(path: Path) -> frozenset[str]:
    """String literals of a file."""
    return frozenset(_literals(path))


def _literals(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for token in tokenize.tokenize(io.BytesIO(file.read()).readline):
            if token.type == tokenize.STRING:
                yield str(ast.literal_eval(token.string)) if not token.string.startswith(("f", "rf", "b")) else ""


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_literal_where_it_is_defined_and_in_presets_only(name: str) -> None:
    found = {str(path.relative_to(SOURCE)) for path in MODULES.values() if name in literals(path)}
    assert found - {PRESETS} == NAMES[name]


def test_files_are_small() -> None:
    long = {str(path): n for path in MODULES.values() if (n := len(path.read_text().splitlines())) > 600}
    assert long == {}
