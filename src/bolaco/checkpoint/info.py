"""``bolaco.json``: everything measured about a folder that bolaco wrote; ``curves.json``: what its report draws.

Both are read into the models below, once, so that whoever uses them knows what is there.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version as _version_of
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from bolaco.errors import CheckpointError
from bolaco.settings import Values, first_problem
from bolaco.work.files import read_json

INFO_FILE = "bolaco.json"
CURVES_FILE = "curves.json"
FORMAT = 1
_PACKAGES = ("bolaco", "torch", "transformers", "safetensors", "botorch", "optuna")
# Of one model; more is damage, and would be drawn.
_MOST_LAYERS = 100_000

M = TypeVar("M", bound="Record")


def _positive(value: float) -> float:
    """A perplexity; infinity and NaN are those of a model that broke."""
    if value <= 0:
        raise ValueError(f"must be above 0, not {value:g}")
    return value


def _known(value: int) -> int:
    if value != FORMAT:
        raise ValueError(f"of format {value}, known is {FORMAT}; take a newer bolaco")
    return value


Format = Annotated[int, AfterValidator(_known)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Total = Annotated[int, Field(gt=0, lt=2**63)]  # what others are a share of
Size = Annotated[int, Field(gt=0, lt=2**31)]
RankOf = Annotated[int, Field(ge=0, lt=2**31)] | None
Share = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Perplexity = Annotated[float, AfterValidator(_positive)]


def check_layers(names: Iterable[str], layers: int = _MOST_LAYERS) -> None:
    """Raises ValueError for a matrix whose name has no number of one of so many decoder blocks."""
    for name in names:
        number = next((part for part in name.split(".") if part.isdecimal()), "")
        if not number or len(number) > len(str(_MOST_LAYERS)) or int(number) >= layers:
            raise ValueError(f"{name!r:.80} names no matrix of {layers:,} decoder blocks")


class Record(BaseModel):
    """A part of a file. What a later version adds is passed over."""

    # JSON has no number that is not finite; written as a string it is read again as one.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")

    def __getitem__(self, name: str) -> Any:
        """A value by its name in the file."""
        if name not in type(self).model_fields:
            raise KeyError(name)
        return getattr(self, name)


class Perplexities(Record):
    """Before and after compression, on ``windows`` x ``seq_len`` tokens of ``data``; ``tokens`` are predicted."""

    dense: Perplexity
    compressed: Perplexity
    data: str
    seq_len: Count
    windows: Count
    tokens: Count


class TrialRecord(Record):
    """An allocation that a search evaluated; see :class:`bolaco.allocate.allocator.Trial`."""

    keep: dict[str, Share]
    ranks: dict[str, list[int | None]]
    objective: float
    perplexity: float
    kl: float
    seconds: Seconds


class TuningPerplexities(Record):
    """Before and after tuning, on ``windows`` blocks of ``data``; ``tokens`` are predicted.

    ``start`` is what training begins with, where the mode has changed the model by then (``sketch``: coded, not yet
    tuned).
    """

    before: Perplexity
    start: Perplexity | None = None
    after: Perplexity
    data: str
    windows: Count
    tokens: Count


class CurvePoint(Record):
    """Mean training loss of the steps up to this one."""

    step: Count
    loss: float


class Unchanged(Record):
    """What of the input is in the result bit by bit: how many tensors, and a hash of them."""

    tensors: Count
    sha256: str


class TuningRecord(Record):
    """What ``bolaco tune`` did to a model.

    ``best_step`` is the step whose weights were kept, where there was early stopping. ``adapter_of`` is the model that
    was tuned where the folder holds an adapter for it and nothing else; then ``bytes`` is the adapter's. ``earlier`` is
    what was done to the model before.
    """

    mode: str
    paper: str
    model: str
    result_type: str
    trainable_parameters: Count
    parameters: Count
    bytes: Count
    frozen_sha256: dict[str, str]
    unchanged: Unchanged
    steps: Count
    of_steps: Count
    out_of_time: bool
    best_step: Count | None = None
    examples: Count
    kind: str
    note: str
    adapter_of: str | None = None
    perplexity: TuningPerplexities
    curve: list[CurvePoint]
    seconds: dict[str, Seconds]
    settings: Values
    versions: dict[str, str]
    earlier: TuningRecord | None = None


class Info(Record):
    """What ``bolaco.json`` says of a folder."""

    format: Format
    model_type: str
    tuning: TuningRecord | None = None


class TunedInfo(Info):
    """Of a model that was tuned and not compressed."""

    tuning: TuningRecord


class KeptRecord(Record):
    """What of the decoder blocks stays dense whatever the recipe says, and why."""

    name: str
    parameters: Count
    reason: str


class CompressedInfo(Info):
    """Of a compressed model, tuned afterwards or not.

    Attributes:
        model: what was compressed.
        method, keep: how, and to which share of the decoder linears' parameters; the recipe says what was asked for.
        storage: of the factored matrices; None where nothing is factored.
        keep_linears, keep_model: the shares that were reached, of the decoder linears and of the whole model.
        parameters, parameters_dense: of the whole model.
        parameters_linears, parameters_linears_dense: of the decoder linears.
        bytes, bytes_dense: of the weights on disk, of the original as it was found.
        bytes_dense_here: of the original's weights in the result's number format; None where that is not known.
        dtype, dtype_dense: number formats of the weights; of a quantized original such as ``Q4_1``.
        layers, layers_dense: the decoder blocks that are there, and how many the original has.
        ranks: of every matrix by name; None is dense.
        stacks: names of matrices that have one input factor.
        pivot_growth: of matrices whose stored form lets rounding errors grow, the factor.
        parameters_active, parameters_active_dense: of those, what one token uses; less where there are experts.
        kept: what of the decoder blocks is dense by nature.
        walk: why blocks could not be run one by one; empty where they could.
        tokens_per_expert: calibration tokens of the experts, by matrix.
        perplexity: before and after.
        dimensions: of the search.
        trials: of the search, in order.
        allocation: what else the rule for ranks came to; of ``welore`` its threshold and the effective rank reduction.
        bits: of every quantized matrix by name; 16 has no codes. Empty where nothing is quantized.
        bits_group: numbers that share a scale.
        seconds: of each stage.
        recipe: everything the run depended on.
        versions: of the packages that it ran with.
    """

    model: str
    method: str
    storage: str | None
    keep: Share
    keep_linears: Share
    keep_model: Share
    parameters: Count
    parameters_dense: Total
    parameters_active: Count | None = None
    parameters_active_dense: Total | None = None
    parameters_linears: Count
    parameters_linears_dense: Total
    bytes: Count
    bytes_dense: Total
    bytes_dense_here: Count | None = None
    dtype: str
    dtype_dense: str | None = None
    layers: list[Count]
    layers_dense: Annotated[int, Field(gt=0, lt=_MOST_LAYERS)]
    ranks: dict[str, RankOf]
    stacks: list[list[str]] = []
    pivot_growth: dict[str, float] = {}
    kept: list[KeptRecord] = []
    walk: str = ""
    tokens_per_expert: dict[str, Count] = {}
    perplexity: Perplexities
    dimensions: list[str] = []
    trials: list[TrialRecord]
    allocation: dict[str, float] = {}
    bits: dict[str, Annotated[int, Field(ge=1, le=16)]] = {}
    bits_group: Count | None = None
    seconds: dict[str, Seconds]
    recipe: Values
    versions: dict[str, str]

    @field_validator("storage")
    @classmethod
    def _none(cls, value: str | None) -> str | None:
        """Format 1 said "dense" where nothing is factored."""
        return None if value == "dense" else value

    @field_validator("ranks", "tokens_per_expert", "bits")
    @classmethod
    def _of_a_layer(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        check_layers(value, info.data.get("layers_dense", _MOST_LAYERS))
        return value

    @field_validator("trials")
    @classmethod
    def _of_one_search(cls, value: list[TrialRecord]) -> list[TrialRecord]:
        return alike(value)


class MatrixCurve(Record):
    """Shape ``[out, in]`` of a matrix; of a factored one, see :func:`bolaco.report.curves.matrix_curves`."""

    shape: tuple[Size, Size]
    energy: list[Annotated[float, Field(ge=-1, le=2, allow_inf_nan=False)]] | None = None
    kept: Annotated[float, Field(ge=-1, le=2, allow_inf_nan=False)] | None = None


class EndCurve(Record):
    """KL(original || compressed) of the next token in nats: of the steps, thinned, and at looks at held-out text."""

    losses: list[float]
    held_out: list[float] = []


class Curves(Record):
    """Spectra of the matrices by name, by layer the losses of a block's training, thinned, and those of the training
    on next tokens, by what was trained (``logits``, ``scales``)."""

    format: Format = FORMAT
    matrices: dict[str, MatrixCurve]
    refinement: dict[str, list[float]]
    ends: dict[str, EndCurve] | None = None

    @field_validator("matrices")
    @classmethod
    def _as_long(cls, value: dict[str, MatrixCurve]) -> dict[str, MatrixCurve]:
        """All spectra have as many points: they are drawn over each other."""
        points = {name: len(curve.energy) for name, curve in value.items() if curve.energy is not None}
        for name, count in points.items():
            if count != max(points.values()):
                raise ValueError(f"{name!r:.80} has {count} points of its energy, others have {max(points.values())}")
        return value

    @field_validator("ends")
    @classmethod
    def _of_an_end(cls, value: dict[str, EndCurve] | None) -> dict[str, EndCurve] | None:
        unknown = sorted((value or {}).keys() - {"logits", "scales"})
        if unknown:
            raise ValueError(f"{unknown[0]!r:.80} is neither logits nor scales")
        return value

    @field_validator("refinement")
    @classmethod
    def _of_a_layer(cls, value: dict[str, list[float]]) -> dict[str, list[float]]:
        check_layers(value)
        for name in value:
            if not name.isdecimal():
                raise ValueError(f"{name!r:.80} is no number of a decoder block")
        return value


version = cache(_version_of)  # reads files


def versions(*more: str) -> dict[str, str]:
    """Versions of what produced a result; ``more`` names further packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in (*_PACKAGES, *more)}


def info_values(info: Info) -> Values:
    """The content of ``bolaco.json``."""
    values: Values = json.loads(info.model_dump_json())
    for record in (values, values.get("tuning") or {}):
        for name in ("tuning", "earlier"):
            if record.get(name, 0) is None:
                del record[name]
    return values


def write_info(folder: Path, info: Info) -> None:
    """Writes ``bolaco.json``."""
    (folder / INFO_FILE).write_text(json.dumps(info_values(info), indent=1) + "\n", encoding="utf-8")


def alike(trials: list[TrialRecord]) -> list[TrialRecord]:
    """Trials of one search: they give a keep ratio to the same things. Raises ValueError for others."""
    for number, trial in enumerate(trials):
        if trial.keep.keys() != trials[0].keep.keys() or not trial.keep:
            raise ValueError(f"trial {number} has keep ratios of other things than trial 0")
    return trials


def read_info(folder: str | Path) -> CompressedInfo:
    """Reads ``bolaco.json`` of a compressed folder.

    Raises:
        CheckpointError: the folder has none, it is damaged, or it is of a model that was not compressed.
    """
    info = read_any_info(folder)
    if not isinstance(info, CompressedInfo):
        raise CheckpointError(f"{Path(folder) / INFO_FILE}: of a model that was tuned, not compressed")
    return info


def read_any_info(folder: str | Path) -> CompressedInfo | TunedInfo:
    """Reads ``bolaco.json`` of any folder that bolaco wrote.

    Raises:
        CheckpointError: the folder has none, or it is damaged.
    """
    path = Path(folder).expanduser() / INFO_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {INFO_FILE} in it; not a folder that `bolaco compress` wrote")
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: damaged (a {type(values).__name__}, not an object)")
    if "tuning" in values and "ranks" not in values:
        return validated(TunedInfo, values, path)
    return validated(CompressedInfo, values, path)


def write_curves(folder: Path, curves: Curves) -> None:
    """Writes ``curves.json``."""
    values = json.loads(curves.model_dump_json(exclude_none=True))
    (folder / CURVES_FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")


def read_curves(folder: str | Path) -> Curves:
    """Reads ``curves.json``; a folder without one has no curves.

    Raises:
        CheckpointError: damaged.
    """
    path = Path(folder).expanduser() / CURVES_FILE
    if not path.exists():
        return Curves(matrices={}, refinement={})
    return validated(Curves, read_json(path), path)


def validated(kind: type[M], values: Any, path: Path) -> M:
    """The record that the values of a file are.

    Raises:
        CheckpointError: they are not; names the file and the first field that is wrong.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"{path}: damaged ({first_problem(error, 'the file')})") from None


def weight_bytes(folder: Path, files: str = "model*.safetensors") -> int:
    """Bytes of the model's weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob(files))
