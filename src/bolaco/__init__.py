"""bolaco: low-rank compression of large language models.

>>> import bolaco
>>> result = bolaco.compress("smollm2-135m", keep=0.8, calibration="text.txt", out="small")  # doctest: +SKIP

Importing the package also teaches transformers' auto classes to load compressed checkpoints; torch and transformers
themselves are imported only when something of theirs is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bolaco.models.lowrank import register_when_imported
from bolaco.version import __version__

if TYPE_CHECKING:
    from bolaco.api import compare, compress, evaluate, evaluate_tasks, load

_LAZY = ("compare", "compress", "evaluate", "evaluate_tasks", "load")
__all__ = ["__version__", "compare", "compress", "evaluate", "evaluate_tasks", "load"]

register_when_imported()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from bolaco import api

        return getattr(api, name)
    raise AttributeError(f"module 'bolaco' has no attribute {name!r}")
