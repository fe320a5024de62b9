"""What is registered, for ``bolaco methods``: everything by kind, or one of it with its options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from rich.table import Table

from bolaco.allocate.allocator import ALLOCATORS
from bolaco.delta.method import DELTA_METHODS
from bolaco.errors import RecipeError
from bolaco.factorize.method import METHODS
from bolaco.plugins import Listing
from bolaco.recipe.presets import PRESETS, SYSTEMS
from bolaco.settings import described, meant
from bolaco.storage.storage import STORAGES
from bolaco.transform.base import TRANSFORMS
from bolaco.tune.mode import MODES


def _table(kind: str, title: str) -> Table:
    return Table(kind, "source", "what it does", "package", title=title, title_justify="left")


def _rows(table: Table, listing: Listing[Any], without: tuple[str, ...] = ()) -> Table:
    for name, item in listing.items.items():
        if name not in without:
            table.add_row(name, item.paper, item.summary, listing.packages[name])
    return table


def tables() -> Iterator[Table | str]:
    """Everything by kind, then a line for each entry point that cannot be used."""
    methods, storages, allocators, modes = METHODS.listing(), STORAGES.listing(), ALLOCATORS.listing(), MODES.listing()
    kinds: dict[str, Table] = {"factorization": _rows(_table("method", "factorization"), methods, tuple(SYSTEMS))}
    for name, system in SYSTEMS.items():
        table = kinds.setdefault(system.kind, _table("method", system.kind))
        table.add_row(name, system.paper, system.summary, "bolaco")
    yield from kinds.values()
    yield _rows(_table("search", "ways to find ranks"), allocators)
    yield _rows(_table("storage", "forms of a factored matrix"), storages)
    yield _rows(_table("mode of tune", "what is trained"), modes)
    deltas = DELTA_METHODS.listing()
    yield _rows(_table("method of delta", "what a fine-tune adds, in few bits"), deltas)
    yield from (line for listing in (methods, storages, allocators, modes, deltas) for line in listing.refused)


def one_of_it(name: str) -> Iterator[Table | str]:
    """Everything of this name, with its options.

    Raises:
        RecipeError: there is nothing of this name.
    """
    found = False
    registries: tuple[tuple[Any, str], ...] = (
        (METHODS, "method."),
        (TRANSFORMS, "method."),
        (ALLOCATORS, "search."),
        (STORAGES, ""),
        (MODES, "options."),
        (DELTA_METHODS, "options."),
    )
    for registry, prefix in registries:
        if name not in registry:
            continue
        found = True
        item = registry.get(name)
        source = f" ({item.paper})" if item.paper else ""
        yield f"{registry.kind} {name}{source}: {item.summary}"
        rows = described(item.options, prefix) if prefix else []
        if rows:
            table = Table("--set", "default", "", title_justify="left")
            for row in rows:
                table.add_row(*row)
            yield table
    if name in SYSTEMS and not found:
        yield f"method {name} ({SYSTEMS[name].paper}): {SYSTEMS[name].summary}"
    if name in METHODS and name not in PRESETS:
        yield (
            f"--method {name}: in two factors, one ratio for all matrices, not refined; "
            f"--preset default --method {name}: in our recipe"
        )
    if name in PRESETS:
        yield f"preset {name}, beside the defaults:"
        yield yaml.safe_dump(PRESETS[name], sort_keys=False, default_flow_style=None)
    elif not found and name not in SYSTEMS:
        known = [*PRESETS, *SYSTEMS, *(n for registry, _ in registries for n in registry.names())]
        raise RecipeError(f"nothing is called {name!r}{meant(name, dict.fromkeys(known), limit=100)}")
