"""Reports, each a single static HTML file.

Such a file loads nothing and runs no scripts. Jinja escapes every value, so names from outside cannot add markup.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bolaco.checkpoint.info import INFO_FILE, CompressedInfo, Curves, TunedInfo
from bolaco.errors import RecipeError
from bolaco.models.labels import layer_of, type_of
from bolaco.recipe.recipe import read_recipe
from bolaco.report.charts import (
    bytes_chart,
    end_charts,
    frontier_chart,
    loss_chart,
    rank_map,
    refinement_chart,
    search_chart,
    spectrum_charts,
    types_of,
)
from bolaco.report.comparison import (
    asked_words,
    calibration_note,
    cells_of,
    columns_of,
    dense_cells,
    labels,
    leaders,
    memory_note,
    quantized_cells,
    quantized_note,
    size_note,
    task_tables,
)
from bolaco.report.record import ComparisonRecord, RowResult
from bolaco.report.tables import asked_size, mib, millions, size_notes, weight_rows
from bolaco.storage.budget import Ranks
from bolaco.version import __version__

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
    environment.globals.update(style=Markup(style), version=__version__)
    return environment


def number(value: float | None) -> str:
    """Four significant digits; ``not finite`` for None, infinity and NaN."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"


def gap_text(value: float | None) -> str:
    """A difference in nats with its sign, three decimals; ``not finite`` for None, infinity and NaN."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:+.3f}"


def _log_gap(after: float, before: float) -> float | None:
    if not (math.isfinite(after) and math.isfinite(before) and after > 0 and before > 0):
        return None
    return math.log(after / before)


def bars_of(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """For each stage its name, its seconds, and the length of its bar in percent of the longest."""
    longest = max(seconds.values(), default=0.0) or 1.0
    return [(stage, value, round(100 * value / longest, 1)) for stage, value in seconds.items()]


def rendered(template: str, **values: Any) -> str:
    """A page from a template of this folder, with what all pages have."""
    return _environment().get_template(template).render(**values)


def _rank_rows(ranks: Ranks) -> list[tuple[int, list[str]]]:
    """Ranks as a table: for each layer its index, and a cell for each of :func:`types_of`."""
    table: dict[int, dict[str, str]] = {}
    for name, rank in ranks.items():
        table.setdefault(layer_of(name), {})[type_of(name)] = "dense" if rank is None else str(rank)
    types = types_of(ranks)
    return [(layer, [table[layer].get(kind, "") for kind in types]) for layer in sorted(table)]


def _result(ident: str, info: CompressedInfo | RowResult, curves: Curves) -> dict[str, Any]:
    """What the report of a result and that of a row of a comparison both draw; ``ident`` is unique in the page."""
    return {
        "ident": ident,
        "rank_map": rank_map(f"{ident}-ranks", info.ranks, info.storage, curves, info.stacks or ()),
        "rank_rows": _rank_rows(info.ranks),
        "types": types_of(info.ranks),
        "search": search_chart(f"{ident}-search", info.trials),
        "spectra": spectrum_charts(f"{ident}-spectrum", info.ranks, curves),
        "refinement": refinement_chart(f"{ident}-refinement", curves),
        "ends": end_charts(f"{ident}-end", curves),
        "bars": bars_of(info.seconds),
        "total": sum(info.seconds.values()),
    }


def result_page(info: CompressedInfo, curves: Curves, name: str) -> str:
    """The report of a compressed folder.

    Args:
        info: content of its ``bolaco.json``.
        curves: of its ``curves.json``; may be empty.
        name: of the folder.

    Raises:
        RecipeError: ``info.recipe`` is none.
    """
    ppl = info.perplexity
    return (
        _environment()
        .get_template("result.html.j2")
        .render(
            name=name,
            info=info,
            # Without factors it has the architecture of the original, which transformers knows.
            flag="" if info.storage is None else ", trust_remote_code=True",
            asked=asked_size(info),
            weights=weight_rows(info),
            notes=size_notes(info),
            ppl=ppl,
            log_gap=_log_gap(ppl.compressed, ppl.dense),
            recipe=_recipe_text(info),
            **_result("result", info, curves),
        )
    )


def _recipe_text(info: CompressedInfo) -> str:
    """The recipe of a result as YAML.

    Raises:
        RecipeError: it is none.
    """
    try:
        return read_recipe(info.recipe).to_yaml()
    except RecipeError as error:
        raise RecipeError(f"{INFO_FILE}: recipe: {error}") from None


def tuned_page(info: CompressedInfo | TunedInfo, name: str) -> str:
    """The report of a tuned folder: of its last tuning, not of what was done to the model before.

    Args:
        info: content of its ``bolaco.json``; ``info.tuning`` is there.
        name: of the folder.
    """
    tuning = info.tuning
    assert tuning is not None
    ppl = tuning.perplexity
    return (
        _environment()
        .get_template("tuned.html.j2")
        .render(
            name=name,
            tuning=tuning,
            ppl=ppl,
            log_gap=_log_gap(ppl.after, ppl.before),
            loss=loss_chart("loss", tuning.curve),
            bars=bars_of(tuning.seconds),
            total=sum(tuning.seconds.values()),
            settings=yaml.safe_dump(tuning.settings, sort_keys=False),
        )
    )


def comparison_page(record: ComparisonRecord) -> str:
    """The report of a comparison, finished or not."""
    texts = labels([text.source for text in record.texts])
    charts = [(name, frontier_chart(f"frontier-{i}", record.rows, name, i)) for i, name in enumerate(texts)]
    if record.quantized:
        charts += [(f"{name}, bytes", bytes_chart(f"bytes-{i}", record, name, i)) for i, name in enumerate(texts)]
    return (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            record=record,
            asked=partial(asked_words, record.size),
            columns=columns_of(record),
            table=[(row, cells_of(record, row)) for row in record.rows],
            best=leaders(record),
            dense=dense_cells(record),
            quantized=quantized_cells(record),
            quantized_note=quantized_note(record),
            calibration_note=calibration_note(record),
            memory_note=memory_note(record) + size_note(record),
            task_tables=task_tables(record),
            charts=[(name, drawn) for name, drawn in charts if drawn is not None],
            details=[
                (row, _result(f"row-{i}", row, row.curves) if isinstance(row, RowResult) else None)
                for i, row in enumerate(record.rows)
            ],
            shared=bars_of(record.seconds),
        )
    )
