"""``bolaco.json`` of a delta: which base it is for, what is stored of each matrix, what it costs and what it does."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from bolaco.checkpoint.info import (
    INFO_FILE,
    Count,
    Format,
    Perplexity,
    Record,
    Seconds,
    Size,
    Total,
    check_layers,
    validated,
)
from bolaco.errors import CheckpointError
from bolaco.settings import Values
from bolaco.work.files import read_json


def _digest(value: str) -> str:
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError("is no SHA-256")
    return value


Digest = Annotated[str, AfterValidator(_digest)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Divergence = Annotated[float, Field(ge=-1e-3)]


class MatrixRecord(Record):
    """The delta of one matrix.

    Attributes:
        shape: ``[out, in]``.
        form: see :mod:`bolaco.delta.forms`.
        entry: what the form must know beside its tensors.
        plan: how the bits are spent, in words.
        bits: of codes, scales and all else that is stored.
        error: squared Frobenius norm of what is lost, as a share of that of the delta.
        rank: of a product; None of a form that is none.
        energy: see :func:`bolaco.report.curves.retained_energy`, of the singular values of the delta; for the report.
    """

    shape: tuple[Size, Size]
    form: str
    entry: Values
    plan: str
    bits: Count
    error: Share
    rank: Count | None = None
    energy: list[Annotated[float, Field(ge=-1e-3, le=1.001)]] | None = None


class Bits(Record):
    """What is stored, in bits.

    Attributes:
        matrices: of the decoder's matrices.
        others: of norms, biases and what else differs, as it is in the fine-tuned model.
        embeddings: of embeddings and head, likewise; none where they do not differ.
        budget: what the matrices may take.
        dense: of the decoder's matrices in 16 bits.
        model: of the whole fine-tuned model in 16 bits.
    """

    matrices: Count
    others: Count
    embeddings: Count
    budget: Count
    dense: Total
    model: Total

    @property
    def total(self) -> int:
        """All that is stored."""
        return self.matrices + self.others + self.embeddings

    @property
    def ratio(self) -> float:
        """Of the matrices to their 16 bits."""
        return self.matrices / self.dense

    @property
    def ratio_model(self) -> float:
        """Of all that is stored to the whole model in 16 bits."""
        return self.total / self.model


class Quality(Record):
    """Perplexities on ``windows`` x ``seq_len`` tokens of ``data``, and KL(result || tuned) in nats a token."""

    base: Perplexity
    tuned: Perplexity
    result: Perplexity
    divergence: Divergence
    divergence_base: Divergence
    data: str
    seq_len: Count
    windows: Count
    tokens: Count


class DeltaInfo(Record):
    """Content of ``bolaco.json``.

    Attributes:
        kind: tells a delta from other folders.
        base: the model it is for, as it was named.
        base_sha256: see :func:`bolaco.delta.pair.base_digest`.
        tuned: what it was made from.
        model_type: of both.
        dtype: number format of the fine-tuned model.
        method, paper: how it was made.
        ratio: as it was asked for.
        parameters: of the model.
        matrices: by name; those that did not change have none.
        rest: names of the tensors that are stored as they are.
        bits: what is stored.
        quality: None where there was no text to measure it on.
        seconds: of each stage.
        settings: everything the run depended on.
        versions: of the packages that it ran with.
    """

    format: Format
    kind: Literal["delta"]
    base: str
    base_sha256: Digest
    tuned: str
    model_type: str
    dtype: str
    method: str
    paper: str
    ratio: str
    parameters: Count
    matrices: dict[str, MatrixRecord]
    rest: list[str]
    bits: Bits
    quality: Quality | None = None
    seconds: dict[str, Seconds]
    settings: Values
    versions: dict[str, str]

    @field_validator("matrices")
    @classmethod
    def _can_be_shown(cls, value: dict[str, MatrixRecord]) -> dict[str, MatrixRecord]:
        """Each is of a layer, and all spectra have as many points: they are drawn over each other."""
        check_layers(value)
        points = {len(record.energy) for record in value.values() if record.energy is not None}
        if len(points) > 1:
            raise ValueError(f"some have {min(points)} points of their energy, others have {max(points)}")
        return value


def write_record(folder: Path, info: DeltaInfo) -> None:
    """Writes ``bolaco.json``."""
    text = json.dumps(json.loads(info.model_dump_json()), indent=1)
    (folder / INFO_FILE).write_text(text + "\n", encoding="utf-8")


def read_record(folder: str | Path) -> DeltaInfo:
    """Reads ``bolaco.json`` of a delta.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of something else.
    """
    path = Path(folder).expanduser() / INFO_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {INFO_FILE} in it; not a folder that `bolaco delta` wrote")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("kind") != "delta":
        raise CheckpointError(f"{path}: not of a delta; `bolaco delta BASE TUNED -o DELTA` makes one")
    return validated(DeltaInfo, values, path)


def parsed_ratio(text: str) -> Fraction:
    """``1/16`` or ``0.0625`` as a number above 0 and at most 1.

    Raises:
        ValueError: it is none.
    """
    try:
        found = Fraction(text.replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r:.40} is no ratio; expected a number such as 1/16 or 0.0625") from None
    if not 0 < found <= 1:
        raise ValueError(f"{text}: a ratio is above 0 and at most 1, such as 1/16")
    return found
