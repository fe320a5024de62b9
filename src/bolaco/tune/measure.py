"""Perplexity before and after training, checks of the result, and what ``bolaco.json`` says of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from bolaco.checkpoint.info import CompressedInfo, Record, TunedInfo, TuningRecord, weight_bytes
from bolaco.models.size import parameters_in
from bolaco.progress import Reporter
from bolaco.tune.data import TuneData
from bolaco.tune.factored import growth
from bolaco.tune.loss import mean_loss
from bolaco.tune.settings import TuneSettings


class Measured(Record):
    """Perplexity of a model on the evaluation text, and how many tokens of it were predicted."""

    perplexity: float
    tokens: int


def measure(model: PreTrainedModel, data: TuneData, settings: TuneSettings, reporter: Reporter, title: str) -> Measured:
    """Measures a model on the evaluation text; ``title`` names the stage in reports of progress.

    Raises:
        NonFiniteError: the result is NaN.
    """
    with reporter.stage(title, len(data.evaluation)) as tick:
        loss, tokens = mean_loss(model, data.evaluation, data.collate, settings.training.batch, settings.chunk, tick)
    return Measured(perplexity=math.exp(loss) if loss < 700 else math.inf, tokens=tokens)


@dataclass(frozen=True)
class Size:
    """How large a written model is.

    Attributes:
        parameters: of the whole model; see :func:`bolaco.models.size.parameters_in`.
        bytes: of its weight files; of the adapter's where that is all there is.
        dtype: of its weights, such as ``float32``.
        growth: by matrix, the factor by which rounding errors can grow in its stored form; empty if in none.
    """

    parameters: int
    bytes: int
    dtype: str
    growth: dict[str, float]


def size_of(model: nn.Module, folder: Path, stored: torch.dtype) -> Size:
    """Size of a model as loaded from a folder, where it is stored in this format, before any adapter is put on."""
    dtype = str(stored).removeprefix("torch.")
    # Where there is no model, there is an adapter.
    size = weight_bytes(folder) or weight_bytes(folder, "*.safetensors")
    return Size(parameters_in(model), size, dtype, growth(model))


def tuned_info(
    before: CompressedInfo | TunedInfo | None, model_type: str, size: Size, record: TuningRecord
) -> CompressedInfo | TunedInfo:
    """Content of the result's ``bolaco.json``.

    Args:
        before: that of the input; None if it had none.
        model_type: type of the input, for when it had none.
        size: size of the result.
        record: what was done.
    """
    if isinstance(before, CompressedInfo) and record.adapter_of is not None:
        return before.model_copy(update={"tuning": record})
    if isinstance(before, CompressedInfo):
        changed = {"parameters": size.parameters, "bytes": size.bytes, "dtype": size.dtype, "tuning": record}
        return before.model_copy(update=changed | ({"pivot_growth": size.growth} if size.growth else {}))
    return TunedInfo(format=1, model_type=model_type if before is None else before.model_type, tuning=record)
