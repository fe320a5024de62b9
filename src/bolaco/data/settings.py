"""The sections of a recipe that say which text is read for what."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bolaco.settings import Section


class Calibration(Section):
    """Text and estimator of the input statistics."""

    source: str = Field("allenai/c4", description="text the covariances are estimated on")
    text_column: str | None = Field(
        None, description="of rows, texts or conversations, for the other texts too; default: text, or else messages"
    )
    sequences: int = Field(128, gt=0)
    seq_len: int = Field(1024, ge=2)
    groups: int = Field(32, gt=0, description="groups of the pooled covariance (the paper: 32)")
    batch: int = Field(4, gt=0, description="sequences per forward pass")
    gradient_sequences: int = Field(
        32, gt=0, description="of these, how many the loss gradients are estimated on, for methods that use them"
    )
    cache: Literal["auto", "memory", "disk"] = Field(
        "auto",
        description="where the hidden states between blocks are; auto: in memory, unless they would take a quarter of "
        "what is free",
    )


class Validation(Section):
    """Text on which allocations are compared."""

    source: str | None = Field(None, description="default: the calibration source, after the calibration text")
    text_column: str | None = Field(None, description="default: that of the calibration")
    seq_len: int | None = Field(None, ge=2, description="default: that of the calibration")
    sequences: int = Field(16, gt=0, description="sequences the objective is computed on")
    candidates: int = Field(32, gt=0, description="sequences these are selected from")
    allocations: int = Field(6, ge=0, description="random allocations of the selection; 0 takes the first sequences")
    batch: int = Field(4, gt=0)

    @model_validator(mode="after")
    def _enough(self) -> Validation:
        if self.candidates < self.sequences:
            raise ValueError(f"candidates ({self.candidates}) must be at least sequences ({self.sequences})")
        return self


class Evaluation(Section):
    """Text of the final before/after perplexity."""

    source: str | None = Field(None, description="default: the validation source, after the validation text")
    text_column: str | None = Field(None, description="default: that of the validation")
    seq_len: int | None = Field(None, ge=2)
    windows: int | None = Field(16, gt=0, description="null: all of the source")
