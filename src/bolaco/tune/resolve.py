"""Settings with nothing left open: what the user did not say, the mode does."""

from __future__ import annotations

import textwrap
from contextlib import suppress
from dataclasses import fields
from typing import Any

from pydantic import ValidationError
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from bolaco.errors import RecipeError
from bolaco.settings import meant, problems
from bolaco.tune.mode import Mode, Options
from bolaco.tune.settings import TuneSettings


def resolve(settings: TuneSettings, mode: Mode) -> tuple[TuneSettings, Options]:
    """The settings with the mode's defaults where they were open, and the mode's options by themselves.

    Raises:
        RecipeError: an option that the mode does not have or that is out of range, or a field that
            ``TrainingArguments`` does not have.
    """
    options = _options(settings, mode)
    given, defaults = settings.training, mode.defaults
    rate = defaults.distill_rate if settings.distillation.weight > 0 else None
    filled = {
        "learning_rate": rate or defaults.learning_rate,
        "warmup": defaults.warmup,
        "schedule": defaults.schedule,
        "final_rate": defaults.final_rate,
        "weight_decay": defaults.weight_decay,
    }
    if given.max_steps is None:
        filled["epochs"] = defaults.epochs
    training = given.model_copy(update={name: v for name, v in filled.items() if getattr(given, name) is None})
    values = options.model_dump(mode="json")
    trainer = {"adam_beta1": defaults.betas[0], "adam_beta2": defaults.betas[1]} | trainer_fields(settings.trainer)
    return settings.model_copy(update={"training": training, "options": values, "trainer": trainer}), options


def _options(settings: TuneSettings, mode: Mode) -> Options:
    known = mode.options.model_fields
    for name in settings.options:
        if name not in known:
            raise RecipeError(f"options.{name}: mode {mode.name!r} has no such option{meant(name, known)}")
    try:
        return mode.options.model_validate(settings.options)
    except ValidationError as error:
        raise RecipeError(problems(error, "options", "options.")) from None


# Fields of TrainingArguments that must not be set directly -> the setting to use instead; "" where there is none
# because the engine needs the field as it is.
OWNED = {
    "max_steps": "training.max_steps",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "learning_rate": "training.learning_rate",
    "warmup_steps": "training.warmup",
    "lr_scheduler_type": "training.schedule",
    "lr_scheduler_kwargs": "training.final_rate",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "bf16": "training.autocast",
    "save_steps": "training.save_steps",
    "seed": "seed",
    "data_seed": "seed",
    "use_cpu": "device",
    "output_dir": "",
    "save_strategy": "",
    "logging_steps": "",
    "logging_strategy": "",
    "remove_unused_columns": "",
    "disable_tqdm": "",
}


def trainer_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Checks values of ``TrainingArguments`` by field; makes numbers of those that YAML reads as text (``1e-7``).

    Raises:
        RecipeError: there is no such field, it must not be set directly, or it names what is not installed.
    """
    known = {field.name: str(field.type) for field in fields(TrainingArguments) if field.name not in OWNED}
    found = {}
    for name, value in values.items():
        if name in OWNED:
            instead = f"use {OWNED[name]}" if OWNED[name] else "it has to be as it is"
            raise RecipeError(f"trainer.{name}: cannot be set there; {instead}")
        if name not in known:
            hint = meant(name, known)
            raise RecipeError(f"trainer.{name}: transformers.TrainingArguments has no such field{hint}")
        if name == "report_to":
            _check_reporters(value)
        found[name] = value
        if isinstance(value, str) and "float" in known[name]:
            with suppress(ValueError):
                found[name] = float(value)
    return found


def _check_reporters(value: Any) -> None:
    """Raises RecipeError for a place of reports that is unknown, or whose package is not here: not after hours."""
    names = [value] if isinstance(value, str) else value
    try:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("expected a name, or a list of names")
        for callback in get_reporting_integration_callbacks([name for name in names if name not in ("all", "none")]):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise RecipeError(f"trainer.report_to: {textwrap.shorten(str(error), 300)}") from error
