"""The modelling code that a checkpoint carries, so that it loads where bolaco is not installed."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from bolaco.layers import BUILDERS, Entry, LowRankMixin

_DOCSTRING = '"""Layers and model classes of a low-rank model, as written by bolaco."""\n\n'
# Modules that it is joined from may name classes in annotations before these are there.
_FUTURE = "from __future__ import annotations\n\n"
_CLASSES = {
    "config": '''

class {config}({dense_config}):
    """Configuration of a {model_type} model with factored projections."""

    model_type = "{compressed_type}"
    base_model_tp_plan = None
''',
    "base": '''

class {base}(LowRankMixin, {dense_base}):
    """{dense_base} with factored projections."""

    config_class = {config}
''',
    "causal": '''

class {causal}(LowRankMixin, {dense_causal}):
    """{dense_causal} with factored projections."""

    config_class = {config}
''',
}


def kinds_in(entry: Entry) -> Iterator[str]:
    """Kinds of the layers that an entry of the configuration describes: its own, and those inside it.

    Raises:
        AttributeError, KeyError, TypeError: it is no entry.
    """
    yield entry["kind"]
    for inner in (*entry.get("parts", ()), *([entry["layer"]] if "layer" in entry else ())):
        yield from kinds_in(inner)


def modelling_code(
    compressed_type: str, model_type: str, classes: dict[str, tuple[str, Any]], matrices: Iterable[Entry]
) -> str:
    """Source of the modelling file of a checkpoint.

    Args:
        compressed_type: the model type of the checkpoint.
        model_type: that of the dense model.
        classes: for ``config``, ``base`` and ``causal`` the name of the class, and the class of transformers it is of.
        matrices: entries of the configuration; the layers of their kinds are carried.
    """
    code = _Code()
    for kind in sorted({kind for entry in matrices for kind in kinds_in(entry)}):
        code.need(BUILDERS[kind].__module__, BUILDERS[kind].__name__)
    code.need(LowRankMixin.__module__, LowRankMixin.__name__)
    imports = code.imports | {f"from {dense.__module__} import {dense.__name__}" for _, dense in classes.values()}
    names = {key: name for key, (name, _) in classes.items()}
    dense = {f"dense_{key}": cls.__name__ for key, (_, cls) in classes.items()}
    known = {"compressed_type": compressed_type, "model_type": model_type} | names | dense
    tail = "".join(part.format(**known) for key, part in _CLASSES.items() if key in classes)
    return _DOCSTRING + _FUTURE + "\n".join(sorted(imports)) + "\n\n\n" + code.text() + "\n" + tail


class _Code:
    """Definitions of several modules, with all that they refer to: ours are included, others are imported."""

    def __init__(self) -> None:
        self.imports: set[str] = set()
        # By module: its statements that are needed, other modules that these use, and all of it.
        self._needed: dict[str, set[ast.stmt]] = {}
        self._uses: dict[str, set[str]] = {}
        self._trees: dict[str, ast.Module] = {}

    def need(self, module: str, name: str) -> None:
        """Includes what a module calls ``name``, and whatever that refers to."""
        if module not in self._trees:
            self._trees[module] = _parsed(_source(module))
        for node in self._trees[module].body:
            if name in _bound(node) and node not in self._needed.get(module, ()):
                self._include(module, node, name)

    def _include(self, module: str, node: ast.stmt, name: str) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            alias = next(alias for alias in node.names if (alias.asname or alias.name).split(".")[0] == name)
            source = node.module if isinstance(node, ast.ImportFrom) else None
            if source is not None and source.split(".")[0] == "bolaco":
                self._uses.setdefault(module, set()).add(source)
                self.need(source, alias.name)
            elif source != "__future__":
                kept = ast.Import([alias]) if source is None else ast.ImportFrom(source, [alias], 0)
                self.imports.add(ast.unparse(kept))
            return
        self._needed.setdefault(module, set()).add(node)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name):
                self.need(module, inner.id)

    def _order(self) -> list[str]:
        """The modules, each behind those it uses."""
        order: list[str] = []

        def visit(module: str) -> None:
            if module not in order:
                for other in sorted(self._uses.get(module, ())):
                    visit(other)
                order.append(module)

        for module in self._trees:
            visit(module)
        return order

    def text(self) -> str:
        """The definitions, in the order of their modules and in them."""
        parts = []
        for module in self._order():
            lines = _source(module).splitlines()
            for node in sorted(self._needed.get(module, ()), key=lambda node: node.lineno):
                decorators = getattr(node, "decorator_list", ())
                first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
                parts.append("\n".join(lines[first - 1 : node.end_lineno]))
        return "\n\n\n".join(parts)


def _source(module: str) -> str:
    return inspect.getsource(sys.modules[module])


@functools.cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _bound(node: ast.stmt) -> set[str]:
    """Names that a statement of a module gives a meaning."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}
