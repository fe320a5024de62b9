"""What a transform is: a plan made from shapes alone, and a model that follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from bolaco.allocate.budget import Budget
from bolaco.models.structure import Structure
from bolaco.recipe import Recipe

# plan(structure, budget, recipe) -> indices of the decoder blocks that stay, ascending; shapes are all it needs.
Plan = Callable[[Structure, Budget, Recipe], tuple[int, ...]]
# apply(model, structure, blocks) -> a model with these blocks only; the first one is not changed.
Apply = Callable[[PreTrainedModel, Structure, tuple[int, ...]], PreTrainedModel]


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A model to a smaller model that stock transformers loads; what it is called and from is in ``systems.py``.

    Attributes:
        plan: which blocks stay.
        apply: the model with only those.
    """

    plan: Plan
    apply: Apply
