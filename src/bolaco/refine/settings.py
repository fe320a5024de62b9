"""The section of a recipe about what is done after the ranks are known."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from bolaco.settings import Section

# What an amount of effort stands for; fields that are given beside it are kept.
EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"steps": 0},
    "default": {},
    "best": {"sequences": None, "held_out": 16, "steps": 80, "logit_steps": 400},
}


class Refinement(Section):
    """Fitting and training of the blocks, once the ranks are known."""

    effort: Literal["fast", "default", "best"] = Field(
        "default", description="fast: nothing of it; best: until what is held out gets no better; sets the others"
    )
    fit: bool = Field(False, description="fit every matrix again, on the inputs it has in the compressed model")
    drift: float = Field(1.0, ge=0, le=1, description="share of the change of its inputs that the fit makes up for")
    damping: float = Field(1e-2, ge=0, description="share of the inputs' mean eigenvalue added in that fit")
    sequences: int | None = Field(
        None, gt=0, description="of the calibration sequences, how many fit and training see; null: all"
    )
    held_out: int = Field(
        16,
        ge=0,
        description="of these, how many are not trained on, a third at most: what is trained stays as it was best on "
        "them",
    )
    steps: int = Field(20, ge=0, description="AdamW steps of each block towards the original block's output, at most")
    patience: int = Field(
        3, gt=0, description="of at most ten looks at what is held out, how many in a row may find no better"
    )
    learning_rate: float = Field(3e-4, gt=0)
    autocast: bool = Field(
        True, description="bfloat16 products in these steps where the machine has them; parameters stay as they are"
    )
    weight_decay: float = Field(0.01, ge=0)
    curvature: float = Field(
        0.0, ge=0, le=1, description="share of the error in nats in what is minimised, where the method knows it"
    )
    window: int = Field(1, gt=0, description="blocks that are trained together, towards the output of the last of them")
    logit_steps: int | None = Field(
        None,
        ge=0,
        description="steps, at most, of the last blocks towards the original's next-token distribution, then; null: "
        "three for each of a block",
    )
    logits: int | None = Field(
        None, ge=0, description="how many blocks that are; by default as many as hold at most logit_parameters"
    )
    logit_parameters: int = Field(
        300_000_000, gt=0, description="parameters at most that are trained so; each takes 20 bytes while it is"
    )
    logit_rate: float = Field(1e-5, gt=0, description="learning rate of that")
    scale_steps: int = Field(
        0, ge=0, description="steps, at most, of the scales of all rows and columns towards the same, in the end"
    )
    scale_rate: float = Field(1e-3, gt=0, description="learning rate of that")

    @property
    def active(self) -> bool:
        """Whether blocks are changed at all."""
        return self.fit or self.steps > 0 or self.trains_end

    @property
    def end_steps(self) -> int:
        """Steps on next tokens."""
        return 3 * self.steps if self.logit_steps is None else self.logit_steps

    @property
    def on_logits(self) -> bool:
        """Whether blocks are trained on next tokens."""
        return self.end_steps > 0 and self.logits != 0

    @property
    def trains_end(self) -> bool:
        """Whether anything is trained on next tokens."""
        return self.on_logits or self.scale_steps > 0

    @model_validator(mode="before")
    @classmethod
    def _effort(cls, values: Any) -> Any:
        """Values that an effort stands for, below those that are given."""
        effort = values.get("effort") if isinstance(values, dict) else None
        return EFFORTS[effort] | values if isinstance(effort, str) and effort in EFFORTS else values

    @model_validator(mode="after")
    def _possible(self) -> Refinement:
        if self.fit and self.window > 1:
            raise ValueError("fit is of one block at a time; it does not go with a window of several")
        return self
