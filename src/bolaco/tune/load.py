"""What a tuning run reads: the model with all that is beside it, and the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bolaco.checkpoint.info import INFO_FILE, CompressedInfo, TunedInfo, read_any_info
from bolaco.checkpoint.write import check_savable
from bolaco.evaluation.objective import check_tokens
from bolaco.models.load import (
    check_finite,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    weights_fingerprint,
)
from bolaco.tune.data import TuneData, prepare_data
from bolaco.tune.settings import TuneSettings
from bolaco.tune.teacher import check_teacher, to_run_dtype


@dataclass(frozen=True)
class Loaded:
    """What a run starts from.

    Attributes:
        model: the model to tune, in the number format of the run; none of its parameters requires a gradient.
        stored_dtype: the number format in which it is stored, and in which the result will be.
        tokenizer: its tokenizer.
        info: content of the ``bolaco.json`` beside it; None if there is none.
        data: what it is trained and evaluated on.
        identity: changes with any weight, and with the kind of device, on which rounding depends.
    """

    model: PreTrainedModel
    stored_dtype: torch.dtype
    tokenizer: Any
    info: CompressedInfo | TunedInfo | None
    data: TuneData
    identity: str


def load(settings: TuneSettings, processes: int) -> Loaded:
    """Reads everything, the weights last: most mistakes show before that.

    Args:
        settings: settings of the run.
        processes: how many processes train together; how much text is read depends on it.

    Raises:
        BolacoError: something cannot be read or is damaged, the text is too short, or the teacher does not fit.
    """
    info_file = Path(resolve(settings.model).path) / INFO_FILE
    info = read_any_info(info_file.parent) if info_file.is_file() else None
    config = load_config(settings.model)
    tokenizer = load_tokenizer(settings.model)
    data = prepare_data(settings, tokenizer, config, processes)
    check_teacher(settings, info, config, tokenizer)
    model = load_model(settings.model, device=settings.device, adapters="refuse")
    check_savable(model, tokenizer, compressed=False)
    stored_dtype = model.dtype
    to_run_dtype(model, settings)
    check_finite(model)
    for example in (*data.train, *data.evaluation):
        check_tokens(model, example["input_ids"])
    model.requires_grad_(False)
    identity = f"{weights_fingerprint(model)} {model.device.type}"
    return Loaded(model, stored_dtype, tokenizer, info, data, identity)
