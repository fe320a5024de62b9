"""The texts of a run: disjoint token blocks for calibration, validation and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bolaco.data.memory import BlockStream, InMemory
from bolaco.data.settings import Calibration, Evaluation, Validation
from bolaco.data.sources import TokenStream, fingerprint, is_self, on_hub
from bolaco.errors import DataError
from bolaco.models.structure import positions_of


@dataclass(frozen=True)
class Texts:
    """Token blocks ``[sequences, length]``.

    Attributes:
        calibration: for statistics and refinement; without sequences where none of that reads text and nothing else
            comes from its source.
        candidates: for comparing allocations; None where nothing is searched.
        evaluation: what perplexity is reported on.
        evaluation_source: where that is from.
        others: further texts to report on, by source.
    """

    calibration: Tensor
    candidates: Tensor | None
    evaluation: Tensor
    evaluation_source: str
    others: tuple[tuple[str, Tensor], ...] = ()

    @property
    def measured(self) -> str:
        """A hash of everything that is reported on."""
        return fingerprint(self.evaluation, *(blocks for _, blocks in self.others))


def prepare_texts(
    calibration: Calibration,
    validation: Validation,
    evaluation: Evaluation,
    tokenizer: Any,
    config: Any,
    *,
    calibrates: bool = True,
    searches: bool = False,
    bos: str = "auto",
    more: Sequence[str] = (),
    given: Mapping[str, InMemory] | None = None,
    local: bool = False,
) -> Texts:
    """Reads the sources; those that are the same source share one stream, so no token serves two purposes.

    Args:
        calibration, validation, evaluation: which text, and how much of it.
        tokenizer: of the model.
        config: of the model.
        calibrates: whether anything reads the calibration text. Where nothing does its source is left alone, unless
            other text comes from the same source: that is then the same text as in a run that calibrates.
        searches: whether allocations are compared.
        bos: see :class:`TokenStream`.
        more: sources of further texts to report on, each as long as the evaluation text.
        given: texts in memory by the name that stands for a source.
        local: leaves what is on the hub there, and what the model would write unwritten; it then has no sequences.

    Raises:
        DataError: unreadable or too short text, sequences longer than the model's positions, or nothing to report on
            but what the model has written itself.
    """
    streams: dict[tuple[str, str | None], TokenStream | BlockStream] = {}
    validation_source = validation.source or calibration.source
    evaluation_source = evaluation.source or validation_source
    validation_column = validation.text_column or calibration.text_column
    evaluation_column = evaluation.text_column or validation_column
    for reported_on in (evaluation_source, *more):
        if is_self(reported_on):
            raise DataError(
                "evaluation: a model's perplexity on its own text says little of what was lost; name another text "
                "with --eval"
            )

    def take(source: str, column: str | None, count: int | None, length: int, purpose: str) -> Tensor:
        positions = positions_of(config)
        if positions is not None and length > positions:
            raise DataError(
                f"{purpose}: sequences of {length} tokens, but the model has {positions} positions; lower seq_len"
            )
        if local and (on_hub(source) or is_self(source)):
            return torch.empty(0, length, dtype=torch.int64)
        stream = streams.get((source, column))
        if stream is None:
            text = (given or {}).get(source, source)
            stream = streams[source, column] = stream_of(text, tokenizer, bos, config.model_type, column)
        return stream.take(count, length, purpose)

    length = calibration.seq_len
    others = {evaluation_source} | ({validation_source} if searches else set())
    if calibrates or calibration.source in others:
        tokens = take(calibration.source, calibration.text_column, calibration.sequences, length, "calibration")
    else:
        tokens = torch.empty(0, length, dtype=torch.int64)
    candidates = None
    if searches:
        candidates = take(
            validation_source, validation_column, validation.candidates, validation.seq_len or length, "validation"
        )
    windows, window = evaluation.windows, evaluation.seq_len or length
    reported = take(evaluation_source, evaluation_column, windows, window, "evaluation")
    further = tuple((source, take(source, evaluation_column, windows, window, "evaluation")) for source in more)
    return Texts(tokens, candidates, reported, evaluation_source, further)


def stream_of(
    source: str | InMemory, tokenizer: Any, bos: str, model_type: str, column: str | None = None
) -> TokenStream | BlockStream:
    """What hands out the blocks of a source, or of a text in memory."""
    if isinstance(source, InMemory) and source.tokens is not None:
        return BlockStream(source)
    return TokenStream(source, tokenizer, bos, model_type, column)
