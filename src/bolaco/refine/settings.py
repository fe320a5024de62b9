"""The section of a recipe about what is done after the ranks are known."""

from __future__ import annotations

from pydantic import Field, model_validator

from bolaco.settings import Section


class Refinement(Section):
    """Fitting and training of the blocks, once the ranks are known."""

    fit: bool = Field(False, description="fit every matrix again, on the inputs it has in the compressed model")
    drift: float = Field(1.0, ge=0, le=1, description="share of the change of its inputs that the fit makes up for")
    damping: float = Field(1e-2, ge=0, description="share of the inputs' mean eigenvalue added in that fit")
    sequences: int = Field(32, gt=0, description="of the calibration sequences, how many fit and training see")
    held_out: int = Field(
        0, ge=0, description="of these, how many are not trained on: a block stays as it was best on them"
    )
    steps: int = Field(20, ge=0, description="AdamW steps of each block towards the original block's output, at most")
    patience: int = Field(3, gt=0, description="of ten looks at what is held out, how many in a row may find no better")
    learning_rate: float = Field(3e-4, gt=0)
    autocast: bool = Field(
        True, description="bfloat16 products in these steps where the machine has them; parameters stay as they are"
    )
    weight_decay: float = Field(0.01, ge=0)
    curvature: float = Field(
        0.0, ge=0, le=1, description="share of the error in nats in what is minimised, where the method knows it"
    )
    window: int = Field(1, gt=0, description="blocks that are trained together, towards the output of the last of them")
    logit_steps: int = Field(
        0, ge=0, description="steps, at most, of the last blocks towards the original's next-token distribution, then"
    )
    logits: int | None = Field(
        None, ge=0, description="how many blocks that are; by default as many as hold at most logit_parameters"
    )
    logit_parameters: int = Field(
        300_000_000, gt=0, description="parameters at most that are trained so; each takes 20 bytes while it is"
    )
    logit_rate: float = Field(1e-4, gt=0, description="learning rate of that")
    scale_steps: int = Field(
        0, ge=0, description="steps, at most, of the scales of all rows and columns towards the same, in the end"
    )
    scale_rate: float = Field(1e-3, gt=0, description="learning rate of that")

    @property
    def active(self) -> bool:
        """Whether blocks are changed at all."""
        return self.fit or self.steps + self.logit_steps + self.scale_steps > 0

    @model_validator(mode="after")
    def _possible(self) -> Refinement:
        if self.held_out >= self.sequences:
            raise ValueError(f"held_out ({self.held_out}) must be less than sequences ({self.sequences})")
        if self.fit and self.window > 1:
            raise ValueError("fit is of one block at a time; it does not go with a window of several")
        return self
