"""Transforms: a model to a smaller model of the same architecture, without factors; torch comes in with their use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bolaco.transform.base import Transform

# Name -> the module with its TRANSFORM, imported when it is used.
TRANSFORMS: dict[str, str] = {"chop": "bolaco.transform.chop"}


def get_transform(name: str) -> Transform:
    """The transform called ``name``, a key of :data:`TRANSFORMS`."""
    transform: Transform = importlib.import_module(TRANSFORMS[name]).TRANSFORM
    return transform
