"""Models beside the one that is tuned: the teacher, and the model that it was compressed from."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from bolaco.checkpoint.info import INFO_FILE, CompressedInfo, TunedInfo
from bolaco.errors import RecipeError, UnsupportedModelError
from bolaco.models.load import load_config, load_model, load_tokenizer
from bolaco.tune.settings import TuneSettings


def to_run_dtype(model: PreTrainedModel, settings: TuneSettings) -> None:
    """Brings a model into the number format of the run, in place.

    Raises:
        RecipeError: the model would stay in half precision, which cannot be multiplied with trained weights in float32
            unless autocast is on.
    """
    if settings.dtype == "float32":
        model.float()
    elif model.dtype != torch.float32 and not settings.training.autocast:
        raise RecipeError(
            f"dtype auto: {settings.model} is stored in {str(model.dtype).removeprefix('torch.')}, and what "
            "is trained is in float32; they meet with training.autocast only"
        )


def original_name(info: CompressedInfo | TunedInfo | None) -> str | None:
    """The model that was compressed, if ``bolaco.json`` names it."""
    return info.model if isinstance(info, CompressedInfo) else None


def load_original(
    settings: TuneSettings, info: CompressedInfo | TunedInfo | None, name: str | None = None
) -> PreTrainedModel:
    """The model of this name, or without one the model that was compressed.

    Raises:
        UnsupportedModelError: there is no name, or it cannot be loaded.
    """
    name = name or original_name(info)
    if name is None:
        raise UnsupportedModelError(
            f"{settings.model}: mode {settings.mode!r} needs the model that was compressed, and there is no "
            f"{INFO_FILE} that names it"
        )
    return _load_frozen(name, settings)


def load_teacher(settings: TuneSettings, info: CompressedInfo | TunedInfo | None) -> PreTrainedModel | None:
    """The teacher, or None if the settings do not ask for distillation.

    Raises:
        RecipeError: no teacher is named.
        UnsupportedModelError: it cannot be loaded.
    """
    return _load_frozen(_teacher_name(settings, info), settings) if settings.distillation.weight > 0 else None


def check_teacher(settings: TuneSettings, info: CompressedInfo | TunedInfo | None, config: Any, tokenizer: Any) -> None:
    """Checks, without reading weights, that there is a teacher if one is needed, and that it has the same vocabulary.

    Args:
        settings: settings of the run.
        info: content of the ``bolaco.json`` beside the model that is tuned.
        config: configuration of that model.
        tokenizer: its tokenizer.

    Raises:
        RecipeError: no teacher is named, or its vocabulary is another one.
        UnsupportedModelError: its configuration or tokenizer cannot be read.
    """
    if settings.distillation.weight == 0:
        return
    name = _teacher_name(settings, info)
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


def _teacher_name(settings: TuneSettings, info: CompressedInfo | TunedInfo | None) -> str:
    name = settings.distillation.teacher or original_name(info)
    if name is None:
        raise RecipeError(
            f"distillation.teacher is missing: {settings.model} has no {INFO_FILE} that names its original; "
            "--teacher MODEL"
        )
    return name


def _load_frozen(name: str, settings: TuneSettings) -> PreTrainedModel:
    model = load_model(name, device=settings.device)
    to_run_dtype(model, settings)
    return model.requires_grad_(False)
