"""A delta and its base as one stock model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bolaco.delta.record import read_record
from bolaco.models.load import load_model, load_tokenizer
from bolaco.models.quiet import quiet
from bolaco.models.weights import named_dtype
from bolaco.work.output import new_folder, refuse_existing


def apply_delta(folder: str, out: Path) -> None:
    """Writes the base with a delta: a model of the fine-tuned one's architecture and number format, without bolaco.

    Raises:
        OutputExistsError: ``out`` exists.
        CheckpointError: no delta, damaged, or its base has other weights.
        UnsupportedModelError: its base is not there.
    """
    refuse_existing(out)
    info = read_record(folder)
    place = str(Path(folder).expanduser())
    model: Any = load_model(place)
    tokenizer = load_tokenizer(place)
    dtype: torch.dtype = named_dtype(info.dtype)
    model.to(dtype)
    with new_folder(out) as partial, quiet():
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
