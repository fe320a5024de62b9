"""The table of a comparison, for the terminal, Markdown, CSV and HTML; all from the content of its ``results.json``."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bolaco.report.tables import mib

_FAILED = "failed: "


def labels(sources: Sequence[str]) -> list[str]:
    """A short name for each text: the file's own, or the whole source where two are the same."""
    short = [Path(source).name or source for source in sources]
    return [name if short.count(name) == 1 else source for name, source in zip(short, sources, strict=True)]


def columns_of(record: Mapping[str, Any]) -> list[str]:
    """Headings of the table."""
    found = ["method", "keep"]
    for label in labels([text["source"] for text in record["texts"]]):
        found += [label, "gap"]
    return [*found, "linears kept", "model kept", "linears", "whole model", "on disk", "seconds", "peak memory"]


def seconds_of(row: Mapping[str, Any]) -> float:
    """Seconds of a row's own stages."""
    return float(sum(row["seconds"].values()))


def _quality(perplexities: Sequence[float | None], gaps: Sequence[float | None]) -> list[str]:
    cells = []
    for perplexity, gap in zip(perplexities, gaps, strict=True):
        cells += ["not finite" if perplexity is None else f"{perplexity:.4g}", "" if gap is None else f"{gap:.3f}"]
    return cells


def dense_cells(record: Mapping[str, Any]) -> list[str]:
    """The row of the original model."""
    dense = record["dense"]
    sizes = [f"{dense['parameters_linears']:,}", f"{dense['parameters']:,}", mib(dense["bytes"])]
    gaps = [0.0 for _ in dense["perplexity"]]
    return ["dense", "1", *_quality(dense["perplexity"], gaps), "1", "1", *sizes, "", ""]


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """One row; a failed one has its method, its keep ratio and the reason."""
    head = [row["method"], f"{row['keep']:g}"]
    if "error" in row:
        return [*head, _FAILED + row["error"]]
    sizes = [f"{row['parameters_linears']:,}", f"{row['parameters']:,}", mib(row["bytes"])]
    kept = [f"{row['keep_linears']:.4f}", f"{row['keep_model']:.4f}"]
    peak = "" if row["peak_bytes"] is None else mib(row["peak_bytes"])
    return [*head, *_quality(row["perplexity"], row["gap"]), *kept, *sizes, f"{seconds_of(row):.1f}", peak]


def leaders(record: Mapping[str, Any]) -> set[tuple[str, int]]:
    """(row, column) of the smallest gap of each keep ratio on each text, where there is more than one."""
    found = set()
    first = columns_of(record).index("gap")
    for keep in record["keep"]:
        rows = [row for row in record["rows"] if row["keep"] == keep and "error" not in row]
        for i in range(len(record["texts"])):
            gaps = [(row["gap"][i], row["name"]) for row in rows if row["gap"][i] is not None]
            if len(gaps) > 1:
                found.add((min(gaps)[1], first + 2 * i))
    return found


def memory_note(record: Mapping[str, Any]) -> str:
    """What the column of memory means."""
    since = "while the row ran" if record["memory"] == "row" else "up to the row's end, earlier rows included"
    return f"Peak memory is the resident memory of the process {since}: the original and mapped files count."


@dataclass(frozen=True)
class TaskTable:
    """One metric of the tasks at one keep ratio: a row for each model, a column for each task, and their mean."""

    metric: str
    columns: list[str]
    rows: list[list[str]]


def task_tables(record: Mapping[str, Any]) -> list[TaskTable]:
    """A table for each metric that a task has; empty without tasks."""
    rows = [row for row in record["rows"] if row["keep"] == record["task_keep"] and "error" not in row]
    scores = [("dense", record["dense"]["tasks"]), *((row["method"], row["tasks"]) for row in rows)]
    first: Mapping[str, Mapping[str, Any]] = scores[0][1]
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


def _mean(found: Mapping[str, Mapping[str, Any]], tasks: Sequence[str], metric: str) -> str:
    """Mean over tasks, and its standard error from theirs, which are independent."""
    values = [found[task][metric] for task in tasks if found.get(task, {}).get(metric) is not None]
    if len(values) < len(tasks):
        return ""
    errors = [error for task in tasks if (error := found[task].get(f"{metric}_stderr")) is not None]
    error = math.hypot(*errors) / len(tasks) if len(errors) == len(tasks) else None
    return _score({metric: math.fsum(values) / len(tasks), f"{metric}_stderr": error}, metric)


def _score(values: Mapping[str, Any], metric: str) -> str:
    if values.get(metric) is None:
        return ""
    error = values.get(f"{metric}_stderr")
    return f"{values[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def rich_table(record: Mapping[str, Any]) -> Table:
    """For the terminal: the columns that matter there."""
    columns = columns_of(record)
    wanted = [
        i
        for i, name in enumerate(columns)
        if name not in ("model kept", "linears", "whole model", "on disk", "peak memory")
    ]
    table = Table(title=f"{record['model']}: methods compared", title_justify="left")
    for i in wanted:
        table.add_column(columns[i], justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
    keep = None
    for cells in (dense_cells(record), *map(cells_of, record["rows"])):
        if keep is not None and cells[1] != keep:
            table.add_section()
        keep = cells[1]
        if len(cells) < len(columns):
            table.add_row(*cells[:2], "failed")
        else:
            table.add_row(*(cells[i] for i in wanted))
    return table


def calibration_note(record: Mapping[str, Any]) -> str:
    """One sentence: the texts that methods were calibrated on."""
    sources = record["calibration"]
    return f"Calibrated on {'; '.join(sources)}." if sources else "None of these methods reads text."


def markdown(record: Mapping[str, Any]) -> str:
    """``table.md``."""
    columns = columns_of(record)
    lines = [_line(columns), _line(["---", *("---:" for _ in columns[1:])]), _line(dense_cells(record))]
    for row in record["rows"]:
        cells = cells_of(row)
        lines.append(_line([*cells, *("" for _ in columns[len(cells) :])]))
    texts = "; ".join(
        f"{text['source']}: {text['windows']} windows of {text['seq_len']} tokens" for text in record["texts"]
    )
    parts = [
        f"# {_safe(record['model'])}: methods compared",
        "\n".join(lines),
        f"Perplexity on {_safe(texts)}. Gaps are log-perplexity over the dense model, in nats a token. "
        f"{_safe(calibration_note(record))} Seconds of a row are its own; shared by all: "
        + ", ".join(f"{stage} {value:.1f}" for stage, value in record["seconds"].items())
        + f". {memory_note(record)}",
    ]
    for table in task_tables(record):
        lines = [_line(table.columns), _line(["---", *("---:" for _ in table.columns[1:])]), *map(_line, table.rows)]
        parts += [f"## Tasks at keep {record['task_keep']:g}: {_safe(table.metric)}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _safe(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_safe(cell) for cell in cells) + " |"


def comma_separated(record: Mapping[str, Any]) -> str:
    """``table.csv``: exact numbers, a column for each text and task metric."""
    sources = labels([text["source"] for text in record["texts"]])
    sizes = ["keep_linears", "keep_model", "parameters_linears", "parameters", "bytes"]
    rows: list[dict[str, Any]] = []
    dense = {"method": "dense", "keep": 1, "keep_linears": 1, "keep_model": 1} | record["dense"]
    for row in (dense, *record["rows"]):
        cells = {name: row[name] for name in ("method", "keep", *sizes, "error") if name in row}
        if "error" not in row:
            cells |= {f"perplexity {s}": v for s, v in zip(sources, row["perplexity"], strict=True)}
            cells |= {f"gap {s}": v for s, v in zip(sources, row.get("gap", [0.0] * len(sources)), strict=True)}
            cells |= {} if row is dense else {"seconds": round(seconds_of(row), 3), "peak_bytes": row["peak_bytes"]}
            cells |= {
                f"{task} {metric}": value
                for task, values in row["tasks"].items()
                for metric, value in values.items()
                if metric not in ("examples", "shots")
            }
        rows.append(cells)
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "error")) + ["error"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
