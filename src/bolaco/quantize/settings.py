"""The section of a recipe about the bits of matrices."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from bolaco.quantize.grid import GridSpec, Levels
from bolaco.settings import Section

# Of a matrix that is not quantized, in the closed form's choice.
WHOLE = 16


class Quantization(Section):
    """Codes of few bits for the factors, and for the matrices that stay dense; embeddings and vectors keep theirs."""

    format: Literal["int2", "int3", "int4", "int5", "int6", "int8", "auto"] = Field(
        description="of all matrices of the decoder; auto: bits of each matrix by the closed form, for a target size"
    )
    group: int = Field(32, gt=0, description="numbers of a row that share a 16-bit scale")
    choices: tuple[int, ...] = Field((3, 4, 5, 6, 8, WHOLE), description="bits that auto chooses from; 16: no codes")
    sequences: int = Field(64, gt=0, description="of the calibration sequences, how many inputs are looked at on")
    damping: float = Field(0.01, gt=0, description="share of the mean of a Hessian's diagonal that is added to it")
    steps: int = Field(
        40, ge=0, description="steps of a block's scales, norms and biases towards the original block's output, then"
    )
    learning_rate: float = Field(1e-3, gt=0, description="of these steps, relative to a scale")

    @field_validator("choices")
    @classmethod
    def _possible(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        known = (*range(1, 9), WHOLE)
        wrong = [bits for bits in value if bits not in known]
        if wrong or not value:
            raise ValueError(f"bits are 1 to 8, or {WHOLE}, not {wrong[0] if wrong else 'none'}")
        return tuple(sorted(set(value)))

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, value: Any) -> Any:
        return {"format": value} if isinstance(value, str) else value

    @property
    def bits(self) -> int | None:
        """Of every matrix; None where each has its own."""
        return None if self.format == "auto" else int(self.format.removeprefix("int"))

    @property
    def options(self) -> tuple[int, ...]:
        """What a matrix can have."""
        return self.choices if self.bits is None else (self.bits,)


def grid_spec(bits: int, group: int) -> GridSpec:
    """The levels of a quantized matrix of a model, such as :class:`bolaco.layers.QuantizedLinear` has them."""
    return GridSpec(bits=bits, group=group, levels=Levels.MIDRISE, fitted=True)
