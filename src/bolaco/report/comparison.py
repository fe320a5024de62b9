"""The table of a comparison for the terminal, Markdown, CSV and HTML.

All of it is made from a :class:`bolaco.report.record.ComparisonRecord`, finished or not.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ByteSize
from rich.table import Table

from bolaco.report.markdown import plain
from bolaco.report.record import ComparisonRecord, DenseRecord, FailedRow, Row, RowResult, Scores
from bolaco.report.tables import mib

_FAILED = "failed: "
# Number formats whose weights are on no grid of a few levels.
_PLAIN_FORMATS = ("float32", "bfloat16", "float16")
# Of the table's columns, those that a terminal has no room for.
_NOT_IN_TERMINAL = ("model kept", "linears", "whole model", "peak memory")


def labels(sources: Sequence[str]) -> list[str]:
    """A short name for each text: its file's name, or the whole source where two files have the same name."""
    short = [Path(source).name or source for source in sources]
    return [name if short.count(name) == 1 else source for name, source in zip(short, sources, strict=True)]


def _labels(record: ComparisonRecord) -> list[str]:
    return labels([text.source for text in record.texts])


def size_cell(size: str | None, keep: float) -> str:
    """A size that was asked for, as a cell; ``size`` as in :class:`ComparisonRecord`."""
    return ByteSize(keep).human_readable(decimal=True) if size == "target_size" else f"{keep:g}"


def asked_words(size: str | None, keep: float) -> str:
    """The same in words, to stand behind "at"."""
    words = {"keep_model": "keep {} of all parameters", "target_size": "target size {}"}
    return words.get(size or "", "keep {}").format(size_cell(size, keep))


def columns_of(record: ComparisonRecord) -> list[str]:
    """Headings of the table: method, keep, a perplexity and a gap for each text, sizes, seconds and memory."""
    headings = {"keep_model": "keep of all", "target_size": "target size"}
    found = ["method", headings.get(record.size or "", "keep")]
    for label in _labels(record):
        found += [label, "gap"]
    return [*found, "linears kept", "model kept", "linears", "whole model", "on disk", "seconds", "peak memory"]


def seconds_of(row: RowResult) -> float:
    """Seconds of a row's own stages together; what rows share is not in them."""
    return float(sum(row.seconds.values()))


def _quality(perplexities: Sequence[float | None], gaps: Sequence[float | None]) -> list[str]:
    """A perplexity and a gap for each text."""
    cells = []
    for perplexity, gap in zip(perplexities, gaps, strict=True):
        cells += ["not finite" if perplexity is None else f"{perplexity:.4g}", "" if gap is None else f"{gap:.3f}"]
    return cells


def _sizes(sized: DenseRecord | RowResult) -> list[str]:
    return [f"{sized.parameters_linears:,}", f"{sized.parameters:,}", mib(sized.bytes)]


def dense_cells(record: ComparisonRecord) -> list[str]:
    """The original's row of the table, a cell for each of :func:`columns_of`."""
    dense = record.dense
    gaps = [0.0 for _ in dense.perplexity]
    return [
        "dense",
        "" if record.size == "target_size" else "1",
        *_quality(dense.perplexity, gaps),
        "1",
        "1",
        *_sizes(dense),
        "",
        "",
    ]


def quantized_cells(record: ComparisonRecord) -> list[list[str]]:
    """Rows of the original in few bits, a cell for each of :func:`columns_of`."""
    dense = dense_cells(record)
    sizes = [f"{record.dense.parameters_linears:,}", f"{record.dense.parameters:,}"]
    return [
        [f"dense, {row.name}", dense[1], *_quality(row.perplexity, row.gap), "1", "1", *sizes, mib(row.bytes), "", ""]
        for row in record.quantized or ()
    ]


def quantized_note(record: ComparisonRecord) -> str:
    """A sentence on these rows; nothing without them."""
    if not record.quantized:
        return ""
    bits = ", ".join(f"{row.bits:.3g} for {row.name}" for row in record.quantized)
    found = record.dense.format
    grid = (
        ""
        if found in (None, *_PLAIN_FORMATS)
        else f" The source's own weights are in {found}: rounding to as many bits or more costs them next to nothing, "
        "so those rows are no comparison."
    )
    return (
        f'Rows "dense, int..." are plain quantization: the decoder linears rounded to nearest, {bits} bits a weight '
        f"with scales, all else in {record.dtype or 'its own format'}.{grid}"
    )


def cells_of(record: ComparisonRecord, row: Row) -> list[str]:
    """A row, a cell for each of :func:`columns_of`; a failed one has three: its method, its keep ratio, the reason."""
    head = [row.method, size_cell(record.size, row.keep)]
    if isinstance(row, FailedRow):
        return [*head, _FAILED + row.error]
    kept = [f"{row.keep_linears:.4f}", f"{row.keep_model:.4f}"]
    peak = "" if row.peak_bytes is None else mib(row.peak_bytes)
    return [*head, *_quality(row.perplexity, row.gap), *kept, *_sizes(row), f"{seconds_of(row):.1f}", peak]


def leaders(record: ComparisonRecord) -> set[tuple[str, int]]:
    """Where the table has the smallest gap of each keep ratio on each text: name of the row, index of the column.

    A keep ratio with a single finite gap on a text has no smallest one.
    """
    found = set()
    first = columns_of(record).index("gap")
    for keep in record.keep:
        rows = [row for row in record.results if row.keep == keep]
        for i in range(len(record.texts)):
            gaps = [(gap, row.name) for row in rows if (gap := row.gap[i]) is not None]
            if len(gaps) > 1:
                found.add((min(gaps)[1], first + 2 * i))
    return found


def memory_note(record: ComparisonRecord) -> str:
    """A sentence on what the column ``peak memory`` means."""
    since = "while the row ran" if record.memory == "row" else "up to the row's end, earlier rows included"
    return f"Peak memory is the resident memory of the process {since}: the original and mapped files count."


def size_note(record: ComparisonRecord) -> str:
    """A sentence on the column ``on disk``, where the original's number format is another one; else nothing."""
    found, made = record.dense.format, record.dtype
    if found is None or made is None or found == made:
        return ""
    return f" On disk the original is in {found}, as it was found, the results are in {made}."


@dataclass(frozen=True)
class TaskTable:
    """One metric of the tasks at one keep ratio: a row for each model, a column for each task, and their mean."""

    metric: str
    columns: list[str]
    rows: list[list[str]]


def task_tables(record: ComparisonRecord) -> list[TaskTable]:
    """A table for each metric that a task has; empty without tasks. A single task has no column for the mean."""
    rows = [row for row in record.results if row.keep == record.task_keep]
    scores = [("dense", record.dense.tasks), *((row.method, row.tasks) for row in rows)]
    first = record.dense.tasks
    metrics = dict.fromkeys(metric for values in first.values() for metric in values)
    tables = []
    for metric in metrics:
        if metric in ("examples", "shots") or metric.endswith("_stderr"):
            continue
        tasks = [task for task, values in first.items() if metric in values]
        table = [
            [name, *(_score(found.get(task, {}), metric) for task in tasks), _mean(found, tasks, metric)]
            for name, found in scores
        ]
        columns = [f"{task} ({first[task]['examples']})" for task in tasks] + ["mean"]
        if len(tasks) == 1:
            columns, table = columns[:1], [cells[:-1] for cells in table]
        tables.append(TaskTable(metric, ["method", *columns], table))
    return tables


def _mean(found: Mapping[str, Scores], tasks: Sequence[str], metric: str) -> str:
    """The mean over tasks with its standard error, which takes theirs as independent; empty if one has no score."""
    values = [value for task in tasks if (value := found.get(task, {}).get(metric)) is not None]
    if len(values) < len(tasks):
        return ""
    errors = [error for task in tasks if (error := found[task].get(f"{metric}_stderr")) is not None]
    error = math.hypot(*errors) / len(tasks) if len(errors) == len(tasks) else None
    return _score({metric: math.fsum(values) / len(tasks), f"{metric}_stderr": error}, metric)


def _score(values: Scores, metric: str) -> str:
    """A metric with its standard error; empty if there is none."""
    value, error = values.get(metric), values.get(f"{metric}_stderr")
    if value is None:
        return ""
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def rich_table(record: ComparisonRecord) -> Table:
    """The table for the terminal, with the columns that it has room for; a section for each keep ratio."""
    columns = columns_of(record)
    wanted = [i for i, name in enumerate(columns) if name not in _NOT_IN_TERMINAL]
    table = Table(title=f"{record.model}: methods compared", title_justify="left")
    for i in wanted:
        table.add_column(columns[i], justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
    keep = None
    for cells in (dense_cells(record), *quantized_cells(record), *(cells_of(record, row) for row in record.rows)):
        if keep is not None and cells[1] != keep:
            table.add_section()
        keep = cells[1]
        if len(cells) < len(columns):
            table.add_row(*cells[:2], "failed")
        else:
            table.add_row(*(cells[i] for i in wanted))
    return table


def calibration_note(record: ComparisonRecord) -> str:
    """A sentence on the texts that methods were calibrated on."""
    sources = record.calibration
    return f"Calibrated on {'; '.join(sources)}." if sources else "None of these methods reads text."


def markdown(record: ComparisonRecord) -> str:
    """The content of ``table.md``: the table, what its numbers mean, and the tables of tasks."""
    columns = columns_of(record)
    lines = [_line(columns), _line(["---", *("---:" for _ in columns[1:])]), _line(dense_cells(record))]
    lines += map(_line, quantized_cells(record))
    for row in record.rows:
        cells = cells_of(record, row)
        lines.append(_line([*cells, *("" for _ in columns[len(cells) :])]))
    texts = "; ".join(f"{text.source}: {text.windows} windows of {text.seq_len} tokens" for text in record.texts)
    parts = [
        f"# {plain(record.model)}: methods compared",
        "\n".join(lines),
        f"Perplexity on {plain(texts)}. Gaps are log-perplexity over the dense model, in nats a token. "
        f"{plain(calibration_note(record))} Seconds of a row are its own; shared by all: "
        + plain(", ".join(f"{stage} {value:.1f}" for stage, value in record.seconds.items()))
        + f". {memory_note(record)}{size_note(record)}",
    ]
    if record.quantized:
        parts.append(plain(quantized_note(record)))
    for table in task_tables(record):
        lines = [_line(table.columns), _line(["---", *("---:" for _ in table.columns[1:])]), *map(_line, table.rows)]
        parts += [
            f"## Tasks at {asked_words(record.size, record.task_keep or 1)}: {plain(table.metric)}",
            "\n".join(lines),
        ]
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(plain(cell) for cell in cells) + " |"


def comma_separated(record: ComparisonRecord) -> str:
    """The content of ``table.csv``: numbers in full, with columns for each text and for each metric of each task."""
    sources, dense = _labels(record), record.dense
    asked = f"asked_{record.size}" if record.size else "keep"
    rows: list[dict[str, Any]] = [
        {
            "method": "dense",
            asked: None if record.size == "target_size" else 1,
            "keep_linears": 1,
            "keep_model": 1,
        }
        | _exact_sizes(dense)
        | _exact(sources, dense.perplexity, [0.0 for _ in sources])
        | _exact_scores(dense.tasks)
    ]
    for plain_row in record.quantized or ():
        sizes = {"parameters_linears": dense.parameters_linears, "parameters": dense.parameters}
        rows.append(
            {"method": f"dense, {plain_row.name}", "keep_linears": 1, "keep_model": 1}
            | (sizes | {"bytes": plain_row.bytes})
            | _exact(sources, plain_row.perplexity, plain_row.gap)
        )
    for row in record.rows:
        cells: dict[str, Any] = {"method": row.method, asked: row.keep}
        if isinstance(row, FailedRow):
            cells["error"] = row.error
        else:
            cells |= {"keep_linears": row.keep_linears, "keep_model": row.keep_model} | _exact_sizes(row)
            cells |= _exact(sources, row.perplexity, row.gap)
            cells |= {"seconds": round(seconds_of(row), 3), "peak_bytes": row.peak_bytes}
            cells |= _exact_scores(row.tasks)
        rows.append(cells)
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "error")) + ["error"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _exact_sizes(sized: DenseRecord | RowResult) -> dict[str, int]:
    return {"parameters_linears": sized.parameters_linears, "parameters": sized.parameters, "bytes": sized.bytes}


def _exact(sources: Sequence[str], perplexities: Sequence[float | None], gaps: Sequence[float | None]) -> Scores:
    """Cells of the perplexities and then of the gaps, by heading."""
    found: Scores = {f"perplexity {name}": value for name, value in zip(sources, perplexities, strict=True)}
    return found | {f"gap {name}": value for name, value in zip(sources, gaps, strict=True)}


def _exact_scores(tasks: Mapping[str, Scores]) -> Scores:
    """Cells of the tasks' metrics, by heading."""
    return {
        f"{task} {metric}": value
        for task, values in tasks.items()
        for metric, value in values.items()
        if metric not in ("examples", "shots")
    }
