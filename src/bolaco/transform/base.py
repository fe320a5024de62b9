"""What a transform is: a plan made from shapes alone, and a model that follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from bolaco.models.structure import Structure
from bolaco.plugins import Registry
from bolaco.settings import Section

# plan(structure, keep, limit, options) -> indices of the decoder blocks that stay, ascending; shapes are all it needs.
Plan = Callable[[Structure, float, int, Any], tuple[int, ...]]
# apply(model, structure, blocks) -> a model with these blocks only; the first one is not changed.
Apply = Callable[[PreTrainedModel, Structure, tuple[int, ...]], PreTrainedModel]


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A model to a smaller model that stock transformers loads.

    Attributes:
        name: what ``--method`` takes.
        paper: where it is from.
        summary: one line for ``bolaco methods``.
        plan: which blocks stay, for a keep ratio and the number of parameters that comes to.
        apply: the model with only those.
        options: what ``--set method.NAME=VALUE`` can change.
    """

    name: str
    paper: str
    summary: str
    plan: Plan
    apply: Apply
    options: type[Section]


TRANSFORMS = Registry("method", "method.name", Transform, {"chop": "bolaco.transform.chop:TRANSFORM"})
