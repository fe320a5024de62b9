"""The settings of a tuning run, frozen and validated.

What a user leaves open, its mode fills in: :func:`bolaco.tune.resolve.resolve`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from bolaco.errors import RecipeError
from bolaco.models.labels import TYPES
from bolaco.settings import Section, Values, meant, problems, unflatten

Schedule = Literal["cosine", "linear", "constant"]


class Data(Section):
    """What the model is trained on."""

    source: str = Field(description="a text source, or a .jsonl file of instructions")
    text_column: str | None = Field(None, description="of rows of text, for the evaluation too; default: text")
    seq_len: int = Field(1024, ge=2, description="tokens of a text block; instructions are cut to this length")
    sequences: int | None = Field(None, gt=0, description="use only the first so many blocks or instructions")
    train_on: Literal["responses", "all"] = Field(
        "responses", description="which tokens of an instruction the loss is computed on"
    )


class Evaluation(Section):
    """What perplexity is measured on, before and after training."""

    source: str | None = Field(None, description="default: the beginning of the data, which is then not trained on")
    windows: int = Field(16, gt=0, description="how many text blocks or instructions of it")


class Training(Section):
    """Steps, batches and the optimiser (AdamW). Where None is not explained, it means the mode's default."""

    max_steps: int | None = Field(None, gt=0, description="optimiser steps; default: as many as the epochs have")
    epochs: float | None = Field(None, gt=0)
    minutes: float | None = Field(None, gt=0, description="training stops after the step in which they run out")
    batch: int = Field(4, gt=0, description="sequences in a forward pass, on each device")
    gradient_accumulation: int = Field(1, gt=0, description="forward passes in a step")
    learning_rate: float | None = Field(None, gt=0)
    warmup: float | None = Field(None, ge=0, description="below 1: a share of all steps; else a number of steps")
    schedule: Schedule | None = Field(
        None, description="of the learning rate after the warm-up; cosine falls to final_rate, linear to zero"
    )
    final_rate: float | None = Field(
        None, ge=0, le=1, description="where the cosine schedule ends, as a share of learning_rate"
    )
    weight_decay: float | None = Field(None, ge=0)
    max_grad_norm: float = Field(
        1.0, ge=0, description="longer gradients are shortened to it; 0 leaves all as they are"
    )
    autocast: bool = Field(True, description="multiply in bfloat16; the trained weights themselves are float32")
    patience: int | None = Field(
        None,
        gt=0,
        description="early stopping: training ends when the loss on the evaluation text, looked at every save_steps "
        "steps, has not been below its least for so many looks; the weights of the least are kept",
    )
    save_steps: int = Field(100, gt=0, description="steps between two checkpoints in the work folder")


class Distillation(Section):
    """A term of the loss: (1 - weight) x next-token loss + weight x KL(teacher || model), in nats a token."""

    weight: float = Field(0.0, ge=0, le=1)
    teacher: str | None = Field(None, description="default: the original model, if bolaco.json names it")


class TuneSettings(Section):
    """Everything that ``bolaco tune`` depends on."""

    version: Literal[1] = 1
    model: str
    mode: str
    types: tuple[str, ...] | None = Field(None, description="matrix types that are tuned; default: all")
    seed: int = Field(0, ge=0, lt=2**32)
    dtype: Literal["float32", "auto"] = Field(
        "float32",
        description="of the frozen weights in memory; auto: as they are stored. The result is stored like the input",
    )
    device: str = "auto"
    bos: Literal["auto", "text", "window"] = "auto"
    chunk: int | None = Field(
        None, gt=0, description="positions whose logits are in memory at once; default: as many as fit into 24 MiB"
    )
    data: Data
    evaluation: Evaluation = Evaluation()
    training: Training = Training()
    distillation: Distillation = Distillation()
    options: dict[str, Any] = Field(default_factory=dict, description="options of the mode")
    trainer: dict[str, Any] = Field(
        default_factory=dict, description="further fields of transformers.TrainingArguments"
    )

    @field_validator("types")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in value or ():
            if name not in TYPES:
                raise ValueError(f"unknown type {name!r}; known are {', '.join(TYPES)}")
        return value


# Words of the command line and of bolaco.tune -> the fields they set.
WORDS = {
    "mode": "mode",
    "data": "data.source",
    "evaluation": "evaluation.source",
    "text_column": "data.text_column",
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
    """Validates the settings of a run.

    Args:
        model: the model to tune.
        words: values by the names in :data:`WORDS`; one that is None is left to the defaults.
        options: values of further fields by dotted name, such as ``{"training.warmup": 0.1}``.

    Raises:
        RecipeError: an unknown word or field, or a value of the wrong type or out of range.
    """
    for word in words:
        if word not in WORDS:
            raise RecipeError(f"unknown word {word!r}{meant(word, WORDS)}")
    if words.get("data") is None and "data.source" not in (options or {}):
        raise RecipeError("data.source is missing: the text or the instructions to tune on (--data SRC)")
    flat = {"model": model} | {WORDS[word]: value for word, value in words.items() if value is not None}
    values = unflatten(flat | (options or {}))
    _refuse_unknown(values, TuneSettings)
    try:
        return TuneSettings.model_validate(values)
    except ValidationError as error:
        raise RecipeError(problems(error, "settings")) from None


def _refuse_unknown(values: Values, section: type[BaseModel], prefix: str = "") -> None:
    """Raises RecipeError for the first field that a section does not have, with what was probably meant."""
    for name, value in values.items():
        field = section.model_fields.get(name)
        if field is None:
            raise RecipeError(f"{prefix}{name}: there is no such setting{meant(name, section.model_fields)}")
        inner = field.annotation
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
            _refuse_unknown(value, inner, f"{prefix}{name}.")
