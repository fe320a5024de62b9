"""The report as one static HTML file: nothing is fetched, nothing runs, every word from outside is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import bolaco
from bolaco.checkpoint.info import Curves
from bolaco.recipe import Recipe
from bolaco.report.charts import (
    frontier_chart,
    loss_chart,
    rank_map,
    refinement_chart,
    search_chart,
    spectrum_charts,
    types_of,
)
from bolaco.report.comparison import (
    calibration_note,
    cells_of,
    columns_of,
    dense_cells,
    labels,
    leaders,
    memory_note,
    task_tables,
)
from bolaco.report.tables import layer_of, mib, millions, type_of

REPORT_FILE = "report.html"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bolaco.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(millions=millions, mib=mib, number=number, gap=gap_text)
    loader = environment.loader
    assert loader is not None
    style = "".join(loader.get_source(environment, name)[0] for name in ("charts.css", "page.css"))
    environment.globals.update(style=Markup(style), version=bolaco.__version__)
    return environment


def number(value: float | None) -> str:
    """Four digits; ``not finite`` for None."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"


def gap_text(value: float | None) -> str:
    """In nats, with its sign."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:+.3f}"


def _log_gap(after: float, before: float) -> float | None:
    if not (math.isfinite(after) and math.isfinite(before) and after > 0 and before > 0):
        return None
    return math.log(after / before)


def _bars(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(stage, seconds, percent of the longest)."""
    longest = max(seconds.values(), default=0.0) or 1.0
    return [(stage, value, round(100 * value / longest, 1)) for stage, value in seconds.items()]


def _rank_rows(ranks: Mapping[str, int | None]) -> list[tuple[int, list[str]]]:
    """Ranks as a table: (layer, a cell for each type)."""
    table: dict[int, dict[str, str]] = {}
    for name, rank in ranks.items():
        table.setdefault(layer_of(name), {})[type_of(name)] = "dense" if rank is None else str(rank)
    types = types_of(dict(ranks))
    return [(layer, [table[layer].get(kind, "") for kind in types]) for layer in sorted(table)]


def _result(ident: str, info: Mapping[str, Any], curves: Curves) -> dict[str, Any]:
    """What the parts that a result and a row of a comparison share are drawn from."""
    ranks = dict(info["ranks"])
    return {
        "ident": ident,
        "rank_map": rank_map(f"{ident}-ranks", ranks, info.get("storage", "two-factor"), curves),
        "rank_rows": _rank_rows(ranks),
        "types": types_of(ranks),
        "search": search_chart(f"{ident}-search", info["trials"]),
        "spectra": spectrum_charts(f"{ident}-spectrum", ranks, curves),
        "refinement": refinement_chart(f"{ident}-refinement", curves),
        "bars": _bars(info["seconds"]),
        "total": sum(info["seconds"].values()),
    }


def result_page(info: Mapping[str, Any], curves: Curves, name: str) -> str:
    """The report of one compressed folder.

    Args:
        info: content of its ``bolaco.json``.
        curves: of its ``curves.json``; may be empty.
        name: of the folder.
    """
    ppl = info["perplexity"]
    return (
        _environment()
        .get_template("result.html.j2")
        .render(
            name=name,
            info=info,
            flag="" if info["storage"] == "dense" else ", trust_remote_code=True",
            ppl=ppl,
            log_gap=_log_gap(ppl["compressed"], ppl["dense"]),
            recipe=Recipe.model_validate(info["recipe"]).to_yaml(),
            **_result("result", info, curves),
        )
    )


def tuned_page(info: Mapping[str, Any], name: str) -> str:
    """The report of one tuned folder: of the tuning, not of the compression before it.

    Args:
        info: content of its ``bolaco.json``.
        name: of the folder.
    """
    record = info["tuning"]
    ppl = record["perplexity"]
    return (
        _environment()
        .get_template("tuned.html.j2")
        .render(
            name=name,
            tuning=record,
            ppl=ppl,
            log_gap=_log_gap(ppl["after"], ppl["before"]),
            loss=loss_chart("loss", record["curve"]),
            bars=_bars(record["seconds"]),
            total=sum(record["seconds"].values()),
            settings=yaml.safe_dump(record["settings"], sort_keys=False),
        )
    )


def comparison_page(record: Mapping[str, Any]) -> str:
    """The report of a comparison.

    Args:
        record: content of its ``results.json``.
    """
    rows: Sequence[Mapping[str, Any]] = record["rows"]
    columns = columns_of(record)
    best = leaders(record)
    return (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            record=record,
            columns=columns,
            table=[(row, cells_of(row)) for row in rows],
            best=best,
            dense=dense_cells(record),
            calibration_note=calibration_note(record),
            memory_note=memory_note(record),
            task_tables=task_tables(record),
            charts=[
                (name, drawn)
                for i, name in enumerate(labels([text["source"] for text in record["texts"]]))
                if (drawn := frontier_chart(f"frontier-{i}", rows, name, i)) is not None
            ],
            details=[
                (row, None if "error" in row else _result(f"row-{i}", row, row["curves"])) for i, row in enumerate(rows)
            ],
            shared=_bars(record["seconds"]),
        )
    )
