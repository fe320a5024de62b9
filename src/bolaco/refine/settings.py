"""The section of a recipe about what is done after the ranks are known."""

from __future__ import annotations

from pydantic import Field

from bolaco.settings import Section


class Refinement(Section):
    """Fitting and training of the blocks, once the ranks are known."""

    fit: bool = Field(False, description="fit every matrix again, on the inputs it has in the compressed model")
    drift: float = Field(1.0, ge=0, le=1, description="share of the change of its inputs that the fit makes up for")
    damping: float = Field(1e-2, ge=0, description="share of the inputs' mean eigenvalue added in that fit")
    sequences: int = Field(32, gt=0, description="of the calibration sequences, how many these two see")
    steps: int = Field(20, ge=0, description="AdamW steps of each block towards the original block's output")
    learning_rate: float = Field(3e-4, gt=0)
    autocast: bool = Field(
        True, description="bfloat16 products in these steps where the machine has them; parameters stay as they are"
    )
    weight_decay: float = Field(0.01, ge=0)

    @property
    def active(self) -> bool:
        """Whether blocks are changed at all."""
        return self.fit or self.steps > 0
