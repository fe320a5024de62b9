"""bolaco: low-rank compression of large language models.

>>> import bolaco
>>> result = bolaco.compress("smollm2-135m", keep=0.8, calibration="text.txt", out="small")  # doctest: +SKIP

Importing the package also teaches transformers' auto classes to load compressed checkpoints; torch and transformers
themselves are imported only when something of theirs is used.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bolaco.models.lowrank import register_when_imported
from bolaco.version import __version__

if TYPE_CHECKING:
    from bolaco.api import (
        DeltaModel,
        compare,
        compress,
        delta,
        distill,
        evaluate,
        evaluate_tasks,
        export,
        fuse,
        generate_text,
        load,
        tune,
        unfuse,
    )

_LAZY = (
    "DeltaModel",
    "compare",
    "compress",
    "delta",
    "distill",
    "evaluate",
    "evaluate_tasks",
    "export",
    "fuse",
    "generate_text",
    "load",
    "tune",
    "unfuse",
)
__all__ = [
    "DeltaModel",
    "__version__",
    "compare",
    "compress",
    "delta",
    "distill",
    "evaluate",
    "evaluate_tasks",
    "export",
    "fuse",
    "generate_text",
    "load",
    "tune",
    "unfuse",
]

register_when_imported()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from bolaco import api

        return getattr(api, name)
    raise AttributeError(f"module 'bolaco' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Folder(ModuleType):
    """The folder of a function's name, which can be called like the function."""

    def __call__(self, *args: Any, **words: Any) -> Any:
        from bolaco import api

        return getattr(api, self.__name__.rpartition(".")[2])(*args, **words)


class _Package(ModuleType):
    """This package. Importing from its folder ``tune``, say, puts that in the place of the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _LAZY and type(value) is ModuleType:
            value.__class__ = _Folder
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
