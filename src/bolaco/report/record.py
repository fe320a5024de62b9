"""``results.json`` of a comparison: every number behind its tables, charts and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_serializer,
)

from bolaco.checkpoint.info import (
    Count,
    Curves,
    Format,
    RankOf,
    Record,
    Seconds,
    Share,
    TrialRecord,
    alike,
    check_layers,
    validated,
)
from bolaco.settings import Values
from bolaco.work.files import read_json

# A share, or bytes.
Size = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _counted(scores: dict[str, int | float | None]) -> dict[str, int | float | None]:
    if not isinstance(scores.get("examples"), int):
        raise ValueError("has no number of examples")
    return scores


# Of one task: ``examples``, ``shots``, every metric, and its standard error as ``<metric>_stderr``; see
# bolaco.evaluation.tasks.TaskResult.record. None is a value that the task does not define.
Scores = Annotated[
    dict[str, Annotated[int, Field(ge=-(2**63), lt=2**63)] | float | None],
    AfterValidator(_counted),
]


class _Later(Record):
    """A part that has got fields since its first version; where one is not known, it is left out."""

    later: ClassVar[tuple[str, ...]]

    @model_serializer(mode="wrap")
    def _without_unknown(self, dump: SerializerFunctionWrapHandler) -> Values:
        values: Values = dump(self)
        return {name: value for name, value in values.items() if name not in self.later or value is not None}


class TextRecord(Record):
    """A text that perplexity is measured on: ``windows`` of ``seq_len`` tokens, of which ``tokens`` are predicted."""

    source: str
    windows: Count
    seq_len: Count
    tokens: Count


class DenseRecord(_Later):
    """The original model.

    Attributes:
        perplexity: on each text; None where it is not finite.
        tasks: scores by task; empty without tasks.
        parameters, parameters_linears: of the whole model, of the decoder linears.
        bytes: of the weights on disk, as they were found.
        format: number format of most of these.
    """

    later: ClassVar[tuple[str, ...]] = ("format",)

    perplexity: list[float | None]
    tasks: dict[str, Scores]
    parameters: Count
    parameters_linears: Count
    bytes: Count
    format: str | None = None


class QuantizedRecord(Record):
    """The original with its decoder linears rounded to nearest, in groups; what else it has is as it was.

    Attributes:
        name: such as ``int4``.
        bits: that a weight of these takes as it is stored, scales and zero points included.
        bytes: of the whole model, what is not rounded in the number format of the results.
        perplexity, gap: as in :class:`RowResult`.
    """

    name: str
    bits: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    bytes: Count
    perplexity: list[float | None]
    gap: list[float | None]


class RowRecord(Record):
    """What every row has: its name in the comparison, the method as the user named it, and the size asked for.

    The size is a keep ratio unless :attr:`ComparisonRecord.size` says that it is another one.
    """

    failed: ClassVar[bool]

    name: str
    method: str
    keep: Size


class RowResult(RowRecord, _Later):
    """A row that was measured.

    Attributes:
        keep_linears, keep_model: the shares of parameters reached, of the decoder linears and of the whole model.
        parameters, parameters_linears: of the whole compressed model, of its decoder linears.
        bytes: of the weights on disk.
        storage: of the factored matrices; None where nothing is factored.
        ranks: of every matrix by name; None is dense.
        stacks: names of matrices that have one input factor.
        trials: of the search, in order; empty without a search.
        versions: of the packages that the row ran with.
        perplexity: on each text; None where it is not finite.
        gap: log-perplexity minus that of the original on each text, in nats a token; None where it is not finite.
        tasks: scores by task; empty at keep ratios that no tasks are run at.
        seconds: of each stage of the row's own.
        peak_bytes: the largest resident memory of the process, see :attr:`ComparisonRecord.memory`; None if not known.
        curves: what the report draws.
        recipe, recipe_yaml: what the row ran, as values and as a file.
    """

    later: ClassVar[tuple[str, ...]] = ("stacks",)
    failed: ClassVar[bool] = False

    keep_linears: Share
    keep_model: Share
    parameters: Count
    parameters_linears: Count
    bytes: Count
    storage: str | None
    ranks: dict[str, RankOf]
    stacks: list[list[str]] | None = None
    trials: list[TrialRecord]
    versions: dict[str, str]
    perplexity: list[float | None]
    gap: list[float | None]
    tasks: dict[str, Scores]
    seconds: dict[str, Seconds]
    peak_bytes: Count | None
    curves: Curves
    recipe: Values
    recipe_yaml: str

    @field_validator("storage")
    @classmethod
    def _none(cls, value: str | None) -> str | None:
        """As in :class:`bolaco.checkpoint.info.CompressedInfo`: format 1 said "dense" where nothing is factored."""
        return None if value == "dense" else value

    @field_validator("ranks")
    @classmethod
    def _of_a_layer(cls, value: dict[str, RankOf]) -> dict[str, RankOf]:
        check_layers(value)
        return value

    @field_validator("trials")
    @classmethod
    def _of_one_search(cls, value: list[TrialRecord]) -> list[TrialRecord]:
        return alike(value)

    @field_serializer("curves")
    def _without_none(self, curves: Curves) -> dict[str, Any]:
        """As in ``curves.json``, where a dense matrix has a shape and nothing else."""
        return curves.model_dump(mode="json", exclude_none=True)


class FailedRow(RowRecord):
    """A row that has no result; ``error`` says why, in one line. The recipe is as in :class:`RowResult`."""

    failed: ClassVar[bool] = True

    error: str
    recipe: Values
    recipe_yaml: str


Row = RowResult | FailedRow


class ComparisonRecord(_Later):
    """The content of ``results.json``.

    Attributes:
        format: of the file.
        model: the original, as the user named it.
        methods, keep: what was asked for; there is a row for each method at each keep ratio.
        size: what the numbers of ``keep`` are where they are no keep ratios: shares of all parameters, or bytes.
        task_keep: the keep ratio that tasks were run at; None without tasks.
        calibration: descriptions of the texts that methods were calibrated on; empty where none of them reads text.
        texts: in the order of all lists of perplexities and gaps.
        dense: the original.
        quantized: the original in few bits.
        rows: those that are finished, by keep ratio and then by method, in the order asked for.
        seconds: of each stage that all rows share.
        dtype: number format of the results.
        memory: what ``peak_bytes`` of a row covers: ``row`` only itself, ``process`` everything up to its end.
        versions: of the packages that the rows ran with.
    """

    later: ClassVar[tuple[str, ...]] = ("dtype", "size", "quantized")

    format: Format
    model: str
    methods: list[str]
    size: Literal["keep_model", "target_size"] | None = None
    keep: list[Size]
    task_keep: Size | None
    calibration: list[str]
    texts: list[TextRecord]
    dense: DenseRecord
    quantized: list[QuantizedRecord] | None = None
    rows: list[Row]
    seconds: dict[str, Seconds]
    dtype: str | None = None
    memory: Literal["row", "process"]
    versions: dict[str, str]

    @field_validator("dense")
    @classmethod
    def _measured(cls, value: DenseRecord, info: ValidationInfo) -> DenseRecord:
        _check_texts("perplexity", value.perplexity, info)
        if value.tasks and info.data.get("task_keep", 0.0) is None:
            raise ValueError("has tasks, but task_keep does not say which rows have")
        return value

    @field_validator("quantized")
    @classmethod
    def _on_all(cls, value: list[QuantizedRecord] | None, info: ValidationInfo) -> list[QuantizedRecord] | None:
        for row in value or ():
            _check_texts(f"{row.name!r:.80}: perplexity", row.perplexity, info)
            _check_texts(f"{row.name!r:.80}: gap", row.gap, info)
        return value

    @field_validator("rows")
    @classmethod
    def _as_many(cls, value: list[Row], info: ValidationInfo) -> list[Row]:
        for row in value:
            if isinstance(row, RowResult):
                _check_texts(f"{row.name!r:.80}: perplexity", row.perplexity, info)
                _check_texts(f"{row.name!r:.80}: gap", row.gap, info)
        return value

    @property
    def results(self) -> list[RowResult]:
        """The rows that did not fail."""
        return [row for row in self.rows if isinstance(row, RowResult)]


def _check_texts(what: str, found: list[float | None], info: ValidationInfo) -> None:
    texts = info.data.get("texts")
    if texts is not None and len(found) != len(texts):
        raise ValueError(f"{what} of {len(found)} texts, there are {len(texts)}")


def write_record(path: Path, record: ComparisonRecord) -> None:
    """Writes ``results.json``."""
    path.write_text(json.dumps(json.loads(record.model_dump_json()), indent=1) + "\n", encoding="utf-8")


def read_record(path: str | Path) -> ComparisonRecord:
    """Reads ``results.json``.

    Raises:
        CheckpointError: it cannot be read, or is damaged; in one line.
    """
    path = Path(path).expanduser()
    return validated(ComparisonRecord, read_json(path), path)
