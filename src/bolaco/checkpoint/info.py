"""``bolaco.json``: everything measured about a folder that bolaco wrote; ``curves.json``: what its report draws.

Both are read into the models below, once, so that whoever uses them knows what is there.
"""

from __future__ import annotations

import json
import platform
from functools import cache
from importlib.metadata import version as _version_of
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from bolaco.errors import CheckpointError
from bolaco.settings import Values, problems
from bolaco.storage.budget import Ranks

INFO_FILE = "bolaco.json"
CURVES_FILE = "curves.json"
_PACKAGES = ("bolaco", "torch", "transformers", "safetensors", "botorch", "optuna")

M = TypeVar("M", bound="Record")


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

    dense: float
    compressed: float
    data: str
    seq_len: int
    windows: int
    tokens: int


class TrialRecord(Record):
    """An allocation that a search evaluated; see :class:`bolaco.allocate.allocator.Trial`."""

    keep: dict[str, float]
    ranks: dict[str, list[int | None]]
    objective: float
    perplexity: float
    kl: float
    seconds: float


class TuningPerplexities(Record):
    """Before and after tuning, on ``windows`` blocks of ``data``; ``tokens`` are predicted.

    ``start`` is what training begins with, where the mode has changed the model by then (``sketch``: coded, not yet
    tuned).
    """

    before: float
    start: float | None = None
    after: float
    data: str
    windows: int
    tokens: int


class CurvePoint(Record):
    """Mean training loss of the steps up to this one."""

    step: int
    loss: float


class Unchanged(Record):
    """What of the input is in the result bit by bit: how many tensors, and a hash of them."""

    tensors: int
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
    trainable_parameters: int
    parameters: int
    bytes: int
    frozen_sha256: dict[str, str]
    unchanged: Unchanged
    steps: int
    of_steps: int
    out_of_time: bool
    best_step: int | None = None
    examples: int
    kind: str
    note: str
    adapter_of: str | None = None
    perplexity: TuningPerplexities
    curve: list[CurvePoint]
    seconds: dict[str, float]
    settings: Values
    versions: dict[str, str]
    earlier: TuningRecord | None = None


class Info(Record):
    """What ``bolaco.json`` says of a folder."""

    format: int
    model_type: str
    tuning: TuningRecord | None = None


class TunedInfo(Info):
    """Of a model that was tuned and not compressed."""

    tuning: TuningRecord


class KeptRecord(Record):
    """What of the decoder blocks stays dense whatever the recipe says, and why."""

    name: str
    parameters: int
    reason: str


class CompressedInfo(Info):
    """Of a compressed model, tuned afterwards or not.

    Attributes:
        model: what was compressed.
        method, keep: how, and to which share of the decoder linears' parameters.
        storage: of the factored matrices; None where nothing is factored.
        keep_linears, keep_model: the shares that were reached, of the decoder linears and of the whole model.
        parameters, parameters_dense: of the whole model.
        parameters_linears, parameters_linears_dense: of the decoder linears.
        bytes, bytes_dense: of the weights on disk.
        dtype: of the weights.
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
        seconds: of each stage.
        recipe: everything the run depended on.
        versions: of the packages that it ran with.
    """

    model: str
    method: str
    storage: str | None
    keep: float
    keep_linears: float
    keep_model: float
    parameters: int
    parameters_dense: int
    parameters_active: int | None = None
    parameters_active_dense: int | None = None
    parameters_linears: int
    parameters_linears_dense: int
    bytes: int
    bytes_dense: int
    dtype: str
    layers: list[int]
    layers_dense: int
    ranks: Ranks
    stacks: list[list[str]] = []
    pivot_growth: dict[str, float] = {}
    kept: list[KeptRecord] = []
    walk: str = ""
    tokens_per_expert: dict[str, int] = {}
    perplexity: Perplexities
    dimensions: list[str] = []
    trials: list[TrialRecord]
    allocation: dict[str, float] = {}
    seconds: dict[str, float]
    recipe: Values
    versions: dict[str, str]

    @field_validator("storage")
    @classmethod
    def _none(cls, value: str | None) -> str | None:
        """Format 1 said "dense" where nothing is factored."""
        return None if value == "dense" else value


class MatrixCurve(Record):
    """Shape ``[out, in]`` of a matrix; of a factored one, see :func:`bolaco.report.curves.matrix_curves`."""

    shape: tuple[int, int]
    energy: list[float] | None = None
    kept: float | None = None


class Curves(Record):
    """Spectra of the matrices by name, and by layer the losses of a block's training, thinned."""

    format: int = 1
    matrices: dict[str, MatrixCurve]
    refinement: dict[str, list[float]]


version = cache(_version_of)  # reads files


def versions(*more: str) -> dict[str, str]:
    """Versions of what produced a result; ``more`` names further packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in (*_PACKAGES, *more)}


def write_info(folder: Path, info: Info) -> None:
    """Writes ``bolaco.json``."""
    values = json.loads(info.model_dump_json())
    for record in (values, values.get("tuning") or {}):
        for name in ("tuning", "earlier"):
            if record.get(name, 0) is None:
                del record[name]
    (folder / INFO_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


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
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{folder}: no {INFO_FILE} in it; not a folder that `bolaco compress` wrote") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: damaged (a {type(values).__name__}, not an object)")
    if "tuning" in values and "ranks" not in values:
        return _validated(TunedInfo, values, path)
    return _validated(CompressedInfo, values, path)


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
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    return _validated(Curves, values, path)


def _validated(kind: type[M], values: Any, path: Path) -> M:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = problems(error, "the file").split("; ")[0]
        raise CheckpointError(f"{path}: damaged ({first})") from None


def weight_bytes(folder: Path, files: str = "model*.safetensors") -> int:
    """Bytes of the model's weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob(files))
