"""The charts of a result, from its ``bolaco.json`` and ``curves.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from bolaco.allocate.budget import Ranks
from bolaco.checkpoint.info import Curves
from bolaco.models.structure import TYPES
from bolaco.report.svg import Series, band, chart, heat_map
from bolaco.report.tables import layer_of, type_of


def types_of(ranks: Ranks) -> list[str]:
    """Matrix types of a model, in their usual order."""
    found = dict.fromkeys(map(type_of, ranks))
    return sorted(found, key=lambda kind: TYPES.index(kind) if kind in TYPES else len(TYPES))


def rank_map(ident: str, ranks: Ranks, storage: str, curves: Curves) -> Markup | None:
    """Layer by matrix type: the share of each matrix's parameters that is kept; None where there are no ranks.

    Without shapes, in results of before, the share of the largest rank of its type.
    """
    if not ranks:
        return None
    rows = types_of(ranks)
    shapes = {name: entry["shape"] for name, entry in curves["matrices"].items()}
    largest: dict[str, int] = {}
    for name, rank in ranks.items():
        largest[type_of(name)] = max(largest.get(type_of(name), 1), rank or 1)
    cells: dict[tuple[int, int], tuple[float | None, str]] = {}
    for name, rank in ranks.items():
        share: float | None = None
        if rank is not None:
            share = _share(rank, shapes[name], storage) if name in shapes else rank / largest[type_of(name)]
        shown = "dense" if share is None else f"rank {rank}, {share:.3f}"
        cells[rows.index(type_of(name)), layer_of(name)] = (share, f"layer {layer_of(name)} {type_of(name)}: {shown}")
    what = "share of the matrix's parameters kept" if shapes else "rank, of the largest of its type"
    dense = sum(share is None for share, _ in cells.values())
    text = f"{len(cells)} matrices, {dense} of them dense. " + " ".join(
        f"{kind}: {_range(cells, row)}." for row, kind in enumerate(rows)
    )
    columns = 1 + max(layer for _, layer in cells)
    return heat_map(ident, "Rank of every matrix", text, rows, columns, cells, "layer", what)


def _share(rank: int, shape: Sequence[int], storage: str) -> float:
    rows, columns = shape
    return rank * (rows + columns - (rank if storage == "pivoted" else 0)) / (rows * columns)


def _range(cells: Mapping[tuple[int, int], tuple[float | None, str]], row: int) -> str:
    found = [share for (r, _), (share, _) in cells.items() if r == row and share is not None]
    return f"{min(found):.2f} to {max(found):.2f}" if found else "all dense"


def search_chart(ident: str, trials: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Objective of every trial, and the best so far; None where nothing was searched."""
    if not trials:
        return None
    objectives = [float(trial["objective"]) for trial in trials]
    best = [min(objectives[: i + 1]) for i in range(len(objectives))]
    finite = [value for value in objectives if math.isfinite(value) and value > 0]
    wide = bool(finite) and len(finite) == len(objectives) and max(finite) > 4 * min(finite)
    winner = min(range(len(objectives)), key=lambda i: objectives[i])
    text = (
        f"{len(objectives)} trials; the best is trial {winner} with {objectives[winner]:.5g}, "
        f"the first had {objectives[0]:.5g}."
    )
    series = [
        Series("trial", list(enumerate(objectives)), "dots"),
        Series("best so far", list(enumerate(best)), "step"),
    ]
    return chart(ident, "Search", text, series, "trial", "objective", logarithmic=wide)


def spectrum_charts(ident: str, ranks: Ranks, curves: Curves) -> list[tuple[str, Markup]]:
    """For each matrix type what every rank cuts, over all layers, and where the chosen ranks are."""
    found = []
    for kind in types_of(ranks):
        names = [n for n in ranks if type_of(n) == kind and "energy" in curves["matrices"].get(n, {})]
        if not names:
            continue
        lines, marks = [], []
        for name in names:
            entry = curves["matrices"][name]
            energy = entry["energy"]
            # All energy is cut at rank 0.
            lines.append([(0.0, 1.0), *(((i + 1) / len(energy), 1 - e) for i, e in enumerate(energy))])
            rank = ranks[name]
            if rank is not None:
                marks.append((rank / min(entry["shape"]), 1 - entry["kept"]))
        cuts = [cut for _, cut in marks]
        text = f"{kind}, {len(names)} layers. " + (
            f"The chosen ranks cut {min(cuts):.2g} to {max(cuts):.2g} of the energy." if cuts else "All stay dense."
        )
        found.append((kind, band(f"{ident}-{kind}", f"Spectra of {kind}", text, lines, marks)))
    return found


def refinement_chart(ident: str, curves: Curves) -> Markup | None:
    """Loss of every block at the start and at the end of its training; None where there was none."""
    losses = sorted((int(layer), values) for layer, values in curves["refinement"].items() if values)
    if not losses:
        return None
    first = [(float(layer), values[0]) for layer, values in losses]
    last = [(float(layer), values[-1]) for layer, values in losses]
    ratio = math.exp(sum(math.log(max(b, 1e-12) / max(a, 1e-12)) for (_, a), (_, b) in zip(first, last)) / len(first))
    text = f"Over {len(first)} blocks the last loss is {ratio:.2f} times the first (geometric mean)."
    series = [Series("first steps", first, "dots"), Series("last steps", last, "dots")]
    return chart(ident, "Block refinement", text, series, "layer", "loss", logarithmic=True, height=230)


def loss_chart(ident: str, curve: Sequence[Mapping[str, float]]) -> Markup | None:
    """Training loss over steps; None where no step was taken."""
    points = [(float(point["step"]), float(point["loss"])) for point in curve if math.isfinite(point["loss"])]
    if not points:
        return None
    (start, first), (end, last) = points[0], points[-1]
    text = f"The loss is {first:.4g} at step {start:.0f} and {last:.4g} at step {end:.0f}."
    return chart(ident, "Training loss", text, [Series("loss", points)], "step", "loss", height=230)


def frontier_chart(ident: str, rows: Sequence[Mapping[str, Any]], text_name: str, index: int = 0) -> Markup | None:
    """Log-perplexity gap to the dense model over the keep ratio, a line for each method; None without a finite one."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    series = []
    for method in methods:
        mine = [row for row in rows if row["method"] == method and "error" not in row]
        points = sorted((row["keep_linears"], row["gap"][index]) for row in mine if row["gap"][index] is not None)
        if points:
            series.append(Series(method, points))
    gaps = [gap for item in series for _, gap in item.points]
    if not gaps:
        return None
    best = min(((gap, item.name) for item in series for _, gap in item.points))
    text = f"{len(gaps)} results of {len(series)} methods; gaps from {best[0]:.3g} ({best[1]}) to {max(gaps):.3g} nats."
    wide = min(gaps) > 0 and max(gaps) > 8 * min(gaps)
    return chart(
        ident,
        f"Log-perplexity gap to dense on {text_name}",
        text,
        series,
        "share of the decoder linears kept",
        "gap to dense (nats)",
        logarithmic=wide,
        descending=True,
        span=0.1,
        height=330,
    )
