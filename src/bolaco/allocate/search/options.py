"""Options of Bolaco's search."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bolaco.allocate.space import SpaceOptions


class BolacoOptions(SpaceOptions):
    """Trials, budget slack and optimiser of the search."""

    trials: int = Field(50, gt=0, description="allocations to evaluate")
    initial: int = Field(5, ge=0, description="random allocations between the hand allocation and the model-based ones")
    slack: float = Field(
        0.02, ge=0, lt=1, description="proposals may use this share of the linears less than the budget"
    )
    objective: Literal["ppl+kl", "ppl"] = Field("ppl+kl", description="what is minimised")
    kl_weight: float = Field(1e-3, ge=0, description="weight of the KL divergence from the original")
    surrogate: Literal["fitted", "paper"] = Field(
        "fitted",
        description="fitted: log objective, learnt length scales; paper: raw objective, fixed length scales",
    )
