"""Other models beside the one that is tuned: its teacher, and the original it was compressed from."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from bolaco.checkpoint.info import INFO_FILE, CompressedInfo, TunedInfo
from bolaco.errors import RecipeError, UnsupportedModelError
from bolaco.models.load import load_config, load_model, load_tokenizer
from bolaco.tune.settings import TuneSettings

AnyInfo = CompressedInfo | TunedInfo | None


def as_trained(model: PreTrainedModel, settings: TuneSettings) -> None:
    """Brings a model into the number format of the run.

    Raises:
        RecipeError: half precision without autocast.
    """
    if settings.dtype == "float32":
        model.float()
    elif model.dtype != torch.float32 and not settings.training.autocast:
        raise RecipeError(
            f"dtype auto: {settings.model} is stored in {str(model.dtype).removeprefix('torch.')}, and what "
            "is trained is in float32; they meet with training.autocast only"
        )


def _named(info: AnyInfo) -> str | None:
    """The original that ``bolaco.json`` names."""
    return info.model if isinstance(info, CompressedInfo) else None


def teacher_name(settings: TuneSettings, info: AnyInfo) -> str:
    """The teacher: the one asked for, or the original.

    Raises:
        RecipeError: there is none.
    """
    name = settings.distillation.teacher or _named(info)
    if name is None:
        raise RecipeError(
            f"distillation.teacher is missing: {settings.model} has no {INFO_FILE} that names its original; "
            "--teacher MODEL"
        )
    return name


def check_teacher(settings: TuneSettings, info: AnyInfo, config: Any, tokenizer: Any) -> None:
    """Raises RecipeError or UnsupportedModelError if a teacher is needed and none of this vocabulary is there."""
    if settings.distillation.weight == 0:
        return
    name = teacher_name(settings, info)
    theirs = load_config(name)
    if theirs.vocab_size != config.vocab_size:
        raise RecipeError(
            f"distillation.teacher: {name} has a vocabulary of {theirs.vocab_size} tokens, {settings.model} "
            f"one of {config.vocab_size}"
        )
    if load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
        raise RecipeError(
            f"distillation.teacher: {name} has another vocabulary than {settings.model}; its probabilities "
            "are of other tokens"
        )


def load_other(name: str, settings: TuneSettings) -> PreTrainedModel:
    """Another model, on the same device and in the same number format as the one that is tuned; not trained."""
    model = load_model(name, device=settings.device)
    as_trained(model, settings)
    return model.requires_grad_(False)


def load_original(name: str | None, settings: TuneSettings, info: AnyInfo) -> PreTrainedModel:
    """The model of this name, or the original.

    Raises:
        UnsupportedModelError: there is none.
    """
    name = name or _named(info)
    if name is None:
        raise UnsupportedModelError(
            f"{settings.model}: mode {settings.mode!r} needs the model that was compressed, and there is no "
            f"{INFO_FILE} that names it"
        )
    return load_other(name, settings)
