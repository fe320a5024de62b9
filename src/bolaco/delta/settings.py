"""Everything that ``bolaco delta`` depends on, frozen and validated."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from pydantic import Field, ValidationError, field_validator

from bolaco.data.settings import Calibration, Evaluation
from bolaco.delta.method import DELTA_METHODS, DeltaMethod
from bolaco.delta.record import parsed_ratio
from bolaco.errors import RecipeError
from bolaco.settings import Section, Values, problems, unflatten


class DeltaCalibration(Calibration):
    """Text that the statistics are estimated on: general text does, it need not be that of the fine-tuning."""

    sequences: int = Field(64, gt=0)
    seq_len: int = Field(512, ge=2)
    gradient_sequences: int = Field(16, gt=0, description="of these, how many the loss gradients are estimated on")


class DeltaEvaluation(Evaluation):
    """Text of the perplexities; of methods that read no text, measured only where a source is given."""

    source: str | None = Field(None, description="default: the calibration source, after the calibration text")
    windows: int | None = Field(8, gt=0, description="null: all of the source")


class DeltaSettings(Section):
    """A run of ``bolaco delta``."""

    version: int = Field(1, ge=1, le=1)
    base: str
    tuned: str
    ratio: str = Field("1/16", description="bits as a share of 16 for every number of the decoder's matrices")
    method: str = "default"
    options: dict[str, Any] = Field(default_factory=dict, description="of the method")
    calibration: DeltaCalibration = DeltaCalibration()
    evaluation: DeltaEvaluation = DeltaEvaluation()
    seed: int = Field(0, ge=0, lt=2**32)
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16|float16)$", description="of the models in memory")
    device: str = "auto"
    bos: str = Field("auto", pattern="^(auto|text|window)$")

    @field_validator("ratio")
    @classmethod
    def _a_ratio(cls, value: str) -> str:
        parsed_ratio(value)
        return value

    @property
    def share(self) -> Fraction:
        """The ratio as a number."""
        return parsed_ratio(self.ratio)

    @property
    def chosen(self) -> tuple[DeltaMethod, Section]:
        """The method, and its options.

        Raises:
            RecipeError: there is no such method, or no such option of it.
        """
        method = DELTA_METHODS.get(self.method)
        try:
            return method, method.options.model_validate(self.options)
        except ValidationError as error:
            raise RecipeError(problems(error, "options", "options.", method.options)) from None


# Words of the command line and of bolaco.delta.run -> the fields they set.
WORDS = {
    "ratio": "ratio",
    "method": "method",
    "calibration": "calibration.source",
    "text_column": "calibration.text_column",
    "seq_len": "calibration.seq_len",
    "evaluation": "evaluation.source",
    "seed": "seed",
    "dtype": "dtype",
    "device": "device",
    "bos": "bos",
}


def make_settings(base: str, tuned: str, words: Values, options: Values | None = None) -> DeltaSettings:
    """Validates the settings of a run.

    Args:
        base, tuned: the models.
        words: values by the names in :data:`WORDS`; one that is None is left to the defaults.
        options: values of further fields by dotted name, such as ``{"options.group": 64}``.

    Raises:
        RecipeError: an unknown field, or a value of the wrong type or out of range.
    """
    flat = {"base": base, "tuned": tuned} | {WORDS[word]: value for word, value in words.items() if value is not None}
    try:
        settings = DeltaSettings.model_validate(unflatten(flat | (options or {})))
    except ValidationError as error:
        raise RecipeError(problems(error, "settings", "", DeltaSettings)) from None
    settings.chosen  # noqa: B018 - for what it raises
    return settings
