"""Everything a tuning run depends on, frozen and validated."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from bolaco.errors import RecipeError
from bolaco.models.structure import TYPES
from bolaco.settings import Section, meant, problems, unflatten

Schedule = Literal["cosine", "linear", "constant"]


class Data(Section):
    """What is trained on."""

    source: str = Field(description="a text source, or a .jsonl file of instructions")
    seq_len: int = Field(1024, ge=2, description="tokens of a text block; instructions are cut behind it")
    sequences: int | None = Field(None, gt=0, description="the first so many blocks or instructions; default: all")
    train_on: Literal["responses", "all"] = Field("responses", description="which tokens of instructions carry loss")


class Evaluation(Section):
    """What perplexity is measured on, before and after."""

    source: str | None = Field(None, description="default: the beginning of the data, which is not trained on then")
    windows: int = Field(16, gt=0, description="blocks or instructions of it")


class Training(Section):
    """Steps, batches and the optimiser (AdamW). None is the mode's default."""

    max_steps: int | None = Field(None, gt=0, description="optimiser steps; default: as many as the epochs have")
    epochs: float | None = Field(None, gt=0)
    minutes: float | None = Field(None, gt=0, description="training stops at the step after so many")
    batch: int = Field(4, gt=0, description="sequences of a forward pass, on each device")
    gradient_accumulation: int = Field(1, gt=0, description="forward passes of a step")
    learning_rate: float | None = Field(None, gt=0)
    warmup: float | None = Field(None, ge=0, description="below 1 a share of the steps, else steps")
    schedule: Schedule | None = Field(None, description="after the warm-up; cosine and linear fall to final_rate")
    final_rate: float | None = Field(None, ge=0, le=1, description="share of the learning rate at the end (cosine)")
    weight_decay: float | None = Field(None, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0: gradients are not clipped")
    autocast: bool = Field(True, description="products in bfloat16; what is trained stays in float32")
    save_steps: int = Field(100, gt=0, description="steps between two checkpoints in the work folder")


class Distillation(Section):
    """The loss is (1 - weight) x language-model loss + weight x KL(teacher || model), a token."""

    weight: float = Field(0.0, ge=0, le=1)
    teacher: str | None = Field(None, description="default: the original that bolaco.json names")


class TuneSettings(Section):
    """Everything `bolaco tune` does, as data."""

    version: Literal[1] = 1
    model: str
    mode: str
    types: tuple[str, ...] | None = Field(None, description="matrix types that are tuned; default: all")
    seed: int = 0
    dtype: Literal["float32", "auto"] = Field(
        "float32", description="of the frozen weights in memory; auto: as stored. The result is stored as the input was"
    )
    device: str = "auto"
    bos: Literal["auto", "text", "window"] = "auto"
    chunk: int | None = Field(None, gt=0, description="positions whose logits exist at once; default: 24 MiB of them")
    data: Data
    evaluation: Evaluation = Evaluation()
    training: Training = Training()
    distillation: Distillation = Distillation()
    options: dict[str, Any] = Field(default_factory=dict, description="options of the mode")
    trainer: dict[str, Any] = Field(default_factory=dict, description="further transformers.TrainingArguments")

    @field_validator("types")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in value or ():
            if name not in TYPES:
                raise ValueError(f"unknown type {name!r}; known are {', '.join(TYPES)}")
        return value


# Words of the command line and of bolaco.tune -> fields.
WORDS = {
    "mode": "mode",
    "data": "data.source",
    "evaluation": "evaluation.source",
    "seq_len": "data.seq_len",
    "max_steps": "training.max_steps",
    "epochs": "training.epochs",
    "minutes": "training.minutes",
    "batch": "training.batch",
    "learning_rate": "training.learning_rate",
    "distill": "distillation.weight",
    "teacher": "distillation.teacher",
    "types": "types",
    "seed": "seed",
    "dtype": "dtype",
    "device": "device",
}


def make_settings(model: str, words: dict[str, Any], options: dict[str, Any] | None = None) -> TuneSettings:
    """Validates settings.

    Args:
        model: what is tuned.
        words: by the names in :data:`WORDS`; None is left to the defaults.
        options: further fields by dotted name, such as ``{"training.warmup": 0.1}``.

    Raises:
        RecipeError: an unknown word or key, or a value of the wrong type or out of range, by its dotted name.
    """
    for word in words:
        if word not in WORDS:
            raise RecipeError(f"unknown word {word!r}{meant(word, WORDS)}")
    if words.get("data") is None and "data.source" not in (options or {}):
        raise RecipeError("data.source is missing: the text or the instructions to tune on (--data SRC)")
    flat = {"model": model} | {WORDS[word]: value for word, value in words.items() if value is not None}
    try:
        return TuneSettings.model_validate(unflatten(flat | (options or {})))
    except ValidationError as error:
        raise RecipeError(problems(error, "settings")) from None
