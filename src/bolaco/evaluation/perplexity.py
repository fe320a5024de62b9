"""Perplexity by the field's convention: non-overlapping windows, each scored from its own first token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from bolaco.evaluation.objective import Head, score


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity, on how many predicted tokens, in how many seconds."""

    perplexity: float
    tokens: int
    windows: int
    seq_len: int
    seconds: float


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
