"""Perplexity by the field's convention: non-overlapping windows, each scored from its own first token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from bolaco.data.memory import InMemory
from bolaco.data.texts import stream_of
from bolaco.errors import DataError
from bolaco.evaluation.objective import Head, score
from bolaco.models.structure import positions_of


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity, on how many predicted tokens, in how many seconds."""

    perplexity: float
    tokens: int
    windows: int
    seq_len: int
    seconds: float


def evaluation_windows(
    data: str | InMemory,
    tokenizer: Any,
    config: Any,
    seq_len: int = 1024,
    limit: int | None = None,
    bos: str = "auto",
    text_column: str | None = None,
) -> Tensor:
    """Token windows ``[windows, seq_len]`` of a text source, or of a text in memory; no weights are needed for them.

    Raises:
        DataError: unreadable or too short text, or windows that the model of ``config`` has no positions for.
    """
    if seq_len < 2:
        raise DataError(f"seq_len must be at least 2, got {seq_len}: the first token of a window is not predicted")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}")
    positions = positions_of(config)
    if positions is not None and seq_len > positions:
        raise DataError(f"seq_len {seq_len}: the model has {positions} positions")
    stream = stream_of(data, tokenizer, bos, config.model_type, text_column)
    return stream.take(limit, seq_len, "evaluation")


def perplexity(
    model: PreTrainedModel, blocks: Tensor, batch: int = 4, tick: Callable[[int], Any] | None = None
) -> PerplexityResult:
    """Perplexity of ``model`` on windows ``[windows, seq_len]``; each window predicts ``seq_len - 1`` tokens."""
    start = time.perf_counter()
    result = score(model, Head(model), blocks, batch, tick=tick)
    windows, seq_len = blocks.shape
    return PerplexityResult(
        result.perplexity, windows * result.predicted, windows, seq_len, time.perf_counter() - start
    )
