"""The charts of a result, from its ``bolaco.json`` and ``curves.json``, and of a comparison.

Each takes ``ident``, what the ids inside the chart begin with; it must be unique in the page.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from markupsafe import Markup

from bolaco.checkpoint.info import CurvePoint, Curves, TrialRecord
from bolaco.errors import RecipeError
from bolaco.models.labels import layer_of, ordered, type_of
from bolaco.models.structure import Site, Stack
from bolaco.report.record import ComparisonRecord, Row, RowResult
from bolaco.report.svg import Series, band, chart, heat_map
from bolaco.storage.budget import Ranks
from bolaco.storage.storage import STORAGES, Storage


def types_of(ranks: Ranks) -> list[str]:
    """Types of the matrices that have ranks, in their usual order."""
    return ordered(set(map(type_of, ranks)))


def rank_map(
    ident: str, ranks: Ranks, storage: str | None, curves: Curves, stacks: Sequence[Sequence[str]] = ()
) -> Markup | None:
    """A cell for each matrix, layer by type: the share of its parameters that is kept; None where there are no ranks.

    Where that share cannot be computed, something close to it is drawn and named as what it is: see :func:`_shares`.

    Args:
        ident: what the ids inside the chart begin with; unique in the page.
        ranks: of every matrix, by name; None is dense.
        storage: name of the storage of the factored matrices; None where nothing is factored.
        stacks: names of matrices that have one input factor.
        curves: the shapes of the matrices; may be empty.
    """
    if not ranks:
        return None
    rows = types_of(ranks)
    shares, what, note = _shares(ranks, storage, curves, {name for stack in stacks for name in stack})
    cells: dict[tuple[int, int], tuple[float | None, str]] = {}
    for name, rank in ranks.items():
        share = shares.get(name)
        shown = "dense" if share is None else f"rank {rank}, {share:.3f}"
        cells[rows.index(type_of(name)), layer_of(name)] = (share, f"layer {layer_of(name)} {type_of(name)}: {shown}")
    dense = sum(share is None for share, _ in cells.values())
    text = f"{len(cells)} matrices, {dense} of them dense. " + " ".join(
        [*(f"{kind}: {_range(cells, row)}." for row, kind in enumerate(rows)), *note]
    )
    columns = 1 + max(layer for _, layer in cells)
    return heat_map(ident, "Rank of every matrix", text, rows, columns, cells, "layer", what)


def _shares(
    ranks: Ranks, storage: str | None, curves: Curves, stacked: Collection[str]
) -> tuple[dict[str, float], str, list[str]]:
    """What the rank map draws of every factored matrix, by name.

    Returns:
        Numbers in [0, 1]; what they are, for the scale; and sentences that explain them, if that is needed. Where
        shapes and storage are known, a number is the share of parameters kept. Without shapes (results from before
        ``curves.json``) it is the rank over the largest rank of the same type. Where the storage is not known here (it
        came with a package that is not installed) it is the rank over the matrix's smaller side.
    """
    factored = {name: rank for name, rank in ranks.items() if rank is not None}
    if not all(name in curves.matrices for name in ranks):
        largest: dict[str, int] = {}
        for name, rank in factored.items():
            largest[type_of(name)] = max(largest.get(type_of(name), 1), rank)
        relative = {name: rank / largest[type_of(name)] for name, rank in factored.items()}
        return relative, "rank, of the largest of its type", []
    form = _storage(storage)
    if form is None:
        sides = {name: rank / min(curves.matrices[name].shape) for name, rank in factored.items()}
        where = f"in {storage or 'its'} storage"
        note = f"What a rank costs {where} is not known here; ranks are relative to the smaller side."
        return sides, "rank, of the matrix's smaller side", [note]
    sites = {name: _site(name, curves.matrices[name].shape, name in stacked) for name in factored}
    kept = {name: form.parameters(sites[name], rank) / sites[name].size for name, rank in factored.items()}
    return kept, "share of the matrix's parameters kept", []


def _storage(name: str | None) -> Storage | None:
    """The storage of this name, if there is one here that can be used."""
    try:
        return None if name is None else STORAGES.get(name)
    except RecipeError:
        return None


def _site(name: str, shape: tuple[int, int], stacked: bool) -> Site:
    """A matrix of this name and shape ``[out, in]``, to ask a storage what it costs.

    The matrices of a stack are recorded with the shape and the rank of the stack, so the answer is that of the stack.
    """
    rows, columns = shape
    kind = type_of(name)
    values = (name, name, layer_of(name), kind, None, (0, rows), rows, columns, False)
    return Stack(*values, stacked=()) if stacked else Site(*values)


def _range(cells: Mapping[tuple[int, int], tuple[float | None, str]], row: int) -> str:
    found = [share for (r, _), (share, _) in cells.items() if r == row and share is not None]
    return f"{min(found):.2f} to {max(found):.2f}" if found else "all dense"


def search_chart(ident: str, trials: Sequence[TrialRecord]) -> Markup | None:
    """The objective of every trial, and the best one up to it; None where nothing was searched."""
    if not trials:
        return None
    objectives = [trial.objective for trial in trials]
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
    """For each matrix type with spectra, its name and a chart: the energy that every rank cuts, and the chosen ranks.

    The chart shows all layers together; see :func:`bolaco.report.curves.matrix_curves` for what energy is.
    """
    found = []
    for kind in types_of(ranks):
        lines, marks = [], []
        for name, rank in ranks.items():
            curve = curves.matrices.get(name)
            if type_of(name) != kind or curve is None or curve.energy is None:
                continue
            # All energy is cut at rank 0.
            count = len(curve.energy)
            lines.append([(0.0, 1.0), *(((i + 1) / count, 1 - kept) for i, kept in enumerate(curve.energy))])
            if rank is not None and curve.kept is not None:
                marks.append((rank / min(curve.shape), 1 - curve.kept))
        if not lines:
            continue
        cuts = [cut for _, cut in marks]
        text = f"{kind}, {len(lines)} layers. " + (
            f"The chosen ranks cut {min(cuts):.2g} to {max(cuts):.2g} of the energy." if cuts else "All stay dense."
        )
        found.append((kind, band(f"{ident}-{kind}", f"Spectra of {kind}", text, lines, marks)))
    return found


def refinement_chart(ident: str, curves: Curves) -> Markup | None:
    """The loss of every block at the start and at the end of its training; None where no block was trained."""
    losses = sorted((int(layer), values) for layer, values in curves.refinement.items() if values)
    if not losses:
        return None
    first = [(float(layer), values[0]) for layer, values in losses]
    last = [(float(layer), values[-1]) for layer, values in losses]
    pairs = [(a, b) for (_, a), (_, b) in zip(first, last, strict=True) if math.isfinite(a) and math.isfinite(b)]
    ratios = [math.log(max(b, 1e-12)) - math.log(max(a, 1e-12)) for a, b in pairs]
    text = f"Over {len(first)} blocks no loss is finite."
    if ratios:
        mean = math.exp(min(math.fsum(ratios) / len(ratios), 700.0))
        text = f"Over {len(ratios)} blocks the last loss is {mean:.2f} times the first (geometric mean)."
    series = [Series("first steps", first, "dots"), Series("last steps", last, "dots")]
    return chart(ident, "Block refinement", text, series, "layer", "loss", logarithmic=True, height=230)


def end_charts(ident: str, curves: Curves) -> list[tuple[str, Markup]]:
    """KL to the original's next token over the training on it, one chart for each thing that was trained."""
    found = []
    for name, title in (("logits", "Last blocks, on next tokens"), ("scales", "Scales, on next tokens")):
        curve = (curves.ends or {}).get(name)
        if curve is None:
            continue
        losses = _finite([((i + 0.5) / len(curve.losses), kl) for i, kl in enumerate(curve.losses)])
        looks = _finite([(i / max(len(curve.held_out) - 1, 1), kl) for i, kl in enumerate(curve.held_out)])
        if not losses:
            continue
        text = f"KL(original || compressed) is {losses[0][1]:.3g} nats at first and {losses[-1][1]:.3g} at last."
        series = [Series("training text", losses)]
        if looks:
            best = min(kl for _, kl in looks)
            text += f" On held-out text it is {looks[0][1]:.3g} at first and {best:.3g} at its best."
            series.append(Series("held-out text", looks, "dots"))
        drawn = chart(f"{ident}-{name}", title, text, series, "share of the steps", "KL, nats", height=230)
        found.append((name, drawn))
    return found


def _finite(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [point for point in points if math.isfinite(point[1])]


def loss_chart(ident: str, curve: Sequence[CurvePoint]) -> Markup | None:
    """Training loss over steps; None where there is no finite one."""
    points = [(float(point.step), point.loss) for point in curve if math.isfinite(point.loss)]
    if not points:
        return None
    (start, first), (end, last) = points[0], points[-1]
    text = f"The loss is {first:.4g} at step {start:.0f} and {last:.4g} at step {end:.0f}."
    return chart(ident, "Training loss", text, [Series("loss", points)], "step", "loss", height=230)


def bytes_chart(ident: str, record: ComparisonRecord, text_name: str, index: int = 0) -> Markup | None:
    """Gap in log-perplexity to the original over the bytes of the whole model; plain quantization is a line as well.

    Args: as of :func:`frontier_chart`.

    Returns:
        None where fewer than two results have a finite gap.
    """
    sized: dict[str, list[tuple[float, float | None]]] = {row.method: [] for row in record.rows}
    for row in record.results:
        sized[row.method].append((row.bytes / 1e6, row.gap[index]))
    sized["plain quantization"] = [(plain.bytes / 1e6, plain.gap[index]) for plain in record.quantized or ()]
    series = []
    for name, found in sized.items():
        points = sorted((size, gap) for size, gap in found if gap is not None)
        if points:
            series.append(Series(name, points))
    points = [point for item in series for point in item.points]
    if len(points) < 2:
        return None
    gaps = [gap for _, gap in points]
    small = min((size, gap, item.name) for item in series for size, gap in item.points)
    text = f"{len(points)} results; the smallest is {small[0]:.1f} MB ({small[2]}), with {small[1]:.3g} nats."
    return chart(
        ident,
        f"Log-perplexity gap to dense on {text_name}, over bytes",
        text,
        series,
        "MB of the whole model",
        "gap to dense (nats)",
        logarithmic=min(gaps) > 0 and max(gaps) > 8 * min(gaps),
        descending=True,
        height=330,
    )


def frontier_chart(ident: str, rows: Sequence[Row], text_name: str, index: int = 0) -> Markup | None:
    """Gap in log-perplexity to the original over the share of the decoder linears kept, a line for each method.

    Args:
        ident: what the ids inside the chart begin with; unique in the page.
        rows: of a comparison; those that failed are left out.
        text_name: what the text is called in the title.
        index: of the text among those of the comparison.

    Returns:
        None where no row has a finite gap.
    """
    results = [row for row in rows if isinstance(row, RowResult)]
    series = []
    # In the order of all rows, so that a method has one colour whichever of them failed.
    for method in dict.fromkeys(row.method for row in rows):
        mine = [(row.keep_linears, row.gap[index]) for row in results if row.method == method]
        points = sorted((keep, gap) for keep, gap in mine if gap is not None)
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
