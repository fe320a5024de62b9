"""The files of a comparison."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from bolaco.report.charts import bytes_chart, frontier_chart
from bolaco.report.comparison import comma_separated, labels, markdown
from bolaco.report.html import REPORT_FILE, comparison_page
from bolaco.report.record import ComparisonRecord, write_record
from bolaco.report.svg import standalone
from bolaco.work.files import write_text
from bolaco.work.output import link_or_copy


def write_so_far(folder: Path, record: ComparisonRecord) -> None:
    """Table and report of the rows that are finished, in the work folder: long comparisons are looked at early."""
    write_text(folder / "table.md", markdown(record))
    write_text(folder / REPORT_FILE, comparison_page(record))


def write_results(folder: Path, record: ComparisonRecord, models: Mapping[str, Path]) -> None:
    """All files of a comparison; ``models`` are the checkpoints to keep, by name of their row."""
    write_record(folder / "results.json", record)
    files = {"table.md": markdown(record), "table.csv": comma_separated(record), REPORT_FILE: comparison_page(record)}
    names = labels([text.source for text in record.texts])
    picture = frontier_chart("frontier", record.rows, names[0])
    if picture is not None:
        files["frontier.svg"] = standalone(picture)
    sizes = bytes_chart("bytes", record, names[0]) if record.quantized else None
    if sizes is not None:
        files["bytes.svg"] = standalone(sizes)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "recipes").mkdir()
    for row in record.rows:
        (folder / "recipes" / f"{row.name}.yaml").write_text(row.recipe_yaml, encoding="utf-8")
    for name, place in models.items():
        if place.is_dir():
            shutil.copytree(place, folder / "models" / name, copy_function=link_or_copy)
