"""The texts of a run: disjoint token blocks for calibration, validation and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bolaco.data import TokenStream, fingerprint
from bolaco.errors import DataError
from bolaco.recipe import Recipe


@dataclass(frozen=True)
class Texts:
    """Token blocks ``[sequences, length]``.

    ``candidates`` is None when nothing is searched; ``calibration`` has no sequences where nothing reads any and
    nothing else is taken from its source; ``others`` are further texts to report on, by source.
    """

    calibration: Tensor
    candidates: Tensor | None
    evaluation: Tensor
    evaluation_source: str
    others: tuple[tuple[str, Tensor], ...] = ()

    @property
    def fingerprint(self) -> str:
        """Changes with any token."""
        return fingerprint(*[t for t in (self.calibration, self.candidates, self.evaluation) if t is not None])


def prepare_texts(
    recipe: Recipe, tokenizer: Any, config: Any, calibrates: bool = True, *, more: Sequence[str] = ()
) -> Texts:
    """Reads the sources; those that are the same source share one stream, so no token serves two purposes.

    Without ``calibrates`` the calibration source is left alone, unless other text comes from it: that is then the same
    text as in a run that calibrates. ``more`` are sources of further texts to report on, as long as the evaluation
    text.

    Raises:
        DataError: unreadable or too short text, or sequences longer than the model's positions.
    """
    streams: dict[str, TokenStream] = {}
    calibration_source = recipe.calibration.source
    validation_source = recipe.validation.source or calibration_source
    evaluation_source = recipe.evaluation.source or validation_source

    def take(source: str, count: int | None, length: int, purpose: str) -> Tensor:
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and length > positions:
            raise DataError(
                f"{purpose}: sequences of {length} tokens, but the model has {positions} positions; lower seq_len"
            )
        if source not in streams:
            streams[source] = TokenStream(source, tokenizer, recipe.bos, config.model_type)
        return streams[source].take(count, length, purpose)

    length = recipe.calibration.seq_len
    others = {evaluation_source} | ({validation_source} if recipe.searches else set())
    if calibrates or calibration_source in others:
        calibration = take(calibration_source, recipe.calibration.sequences, length, "calibration")
    else:
        calibration = torch.empty(0, length, dtype=torch.int64)
    candidates = None
    if recipe.searches:
        candidates = take(
            validation_source, recipe.validation.candidates, recipe.validation.seq_len or length, "validation"
        )
    windows, window = recipe.evaluation.windows, recipe.evaluation.seq_len or length
    evaluation = take(evaluation_source, windows, window, "evaluation")
    further = tuple((source, take(source, windows, window, "evaluation")) for source in more)
    return Texts(calibration, candidates, evaluation, evaluation_source, further)
