"""Small static charts as SVG text: no scripts, no fonts of their own, colours from the variables of ``charts.css``.

A chart takes the width of the element around it; lengths here are in units of its view box. Every chart has a title
and a description in words, which screen readers read out. All text from outside is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from markupsafe import Markup, escape

COLOURS = 8
WIDTH = 480
_LEFT, _RIGHT, _TOP = 62, 14, 12
_LETTER = 7.2  # mean width of a letter in the legend
_LARGEST = 1e100  # that is drawn: differences of it and of its logarithm are still numbers


@dataclass(frozen=True)
class Series:
    """Points ``(x, y)`` in ascending x, under a name.

    ``kind`` is how they are drawn: as a ``line`` with markers, as markers only (``dots``), or as a staircase without
    markers (``step``).
    """

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "line"


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def figure(width: float, height: float, ident: str, title: str, text: str, body: str) -> Markup:
    """An SVG element around ``body``, which is SVG already and not escaped.

    Args:
        width, height: of the view box.
        ident: what ids inside the element begin with; unique in the page.
        title: names the chart for screen readers.
        text: says in words what the chart shows.
        body: its content.
    """
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {_n(width)} {_n(height)}" role="img" '
        f'aria-labelledby="{ident}-title {ident}-text"><title id="{ident}-title">{escape(title)}</title>'
        f'<desc id="{ident}-text">{escape(text)}</desc>{body}</svg>'
    )


def standalone(chart: Markup) -> str:
    """The chart as the content of an SVG file of its own, with its styles."""
    style = files("bolaco.report").joinpath("templates/charts.css").read_text(encoding="utf-8")
    head, arrow, rest = str(chart).partition(">")
    return f"{head}{arrow}<style>{style}svg {{ background: var(--paper); }}</style>{rest}\n"


def ticks(low: float, high: float, logarithmic: bool = False, whole: bool = False) -> list[float]:
    """Round numbers within ``[low, high]`` to label an axis at, about five of them.

    Args:
        low, high: ends of the axis; positive on a logarithmic one.
        logarithmic: prefers 1, 2 and 5 times powers of ten where there are enough of those.
        whole: no fractions.
    """
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1,)):
            found = [m * 10.0**e for e in decades for m in steps if low * 0.999 <= m * 10.0**e <= high * 1.001]
            if len(found) <= 8:
                break
        if len(found) > 2:
            return found
    span = high - low or 1.0
    base = 10.0 ** max(math.floor(math.log10(max(span / 4, 1e-300))), -300)
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if span / (base * m) <= 5)
    if whole:
        step = max(math.ceil(step), 1)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _scale(low: float, high: float, a: float, b: float, logarithmic: bool = False) -> Callable[[float], float]:
    """The map from values in ``[low, high]`` to places between ``a`` and ``b``."""
    change = math.log10 if logarithmic else float
    start, span = change(low), (change(high) - change(low)) or 1.0
    return lambda value: a + (change(value) - start) / span * (b - a)


def _marker(x: float, y: float, index: int, note: str) -> str:
    # Colours repeat after COLOURS series; the shift gives series of the same colour different shapes.
    shape = (index + index // COLOURS) % 4
    tag, drawn = (
        ("circle", f'cx="{_n(x)}" cy="{_n(y)}" r="4"'),
        ("rect", f'x="{_n(x - 3.6)}" y="{_n(y - 3.6)}" width="7.2" height="7.2"'),
        ("path", f'd="M{_n(x)} {_n(y - 5)}l5 5-5 5-5-5z"'),
        ("path", f'd="M{_n(x)} {_n(y - 4.8)}l4.8 8.4h-9.6z"'),
    )[shape]
    return f'<{tag} {drawn} class="mark"><title>{escape(note)}</title></{tag}>'


def _group(index: int, body: str) -> str:
    dash = " dashed" if index >= COLOURS else ""
    return f'<g class="s{index % COLOURS}{dash}">{body}</g>'


def _legend(series: Sequence[Series], top: float) -> tuple[str, float]:
    """The legend, its entries side by side in as many lines as they need; and its height."""
    parts, x, y = [], float(_LEFT), top + 12
    for index, item in enumerate(series):
        name, width = item.name, 30 + _LETTER * len(item.name)
        if x > _LEFT and x + width > WIDTH - 4:
            x, y = float(_LEFT), y + 20
        line = "" if item.kind == "dots" else f'<path class="line" d="M{_n(x)} {_n(y)}h18"/>'
        line += "" if item.kind == "step" else _marker(x + 9, y, index, name)
        parts.append(
            _group(index, line) + f'<text class="label" x="{_n(x + 24)}" y="{_n(y + 4)}">{escape(name)}</text>'
        )
        x += width + 10
    return "".join(parts), y + 12 - top


def chart(
    ident: str,
    title: str,
    text: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    logarithmic: bool = False,
    descending: bool = False,
    span: float = 0.0,
    height: float = 270,
) -> Markup:
    """Series over common axes; with a legend below if there are several.

    Args:
        ident, title, text: see :func:`figure`.
        series: what is drawn; points whose y is not finite (or has a hundred digits), or not positive on a logarithmic
            axis, are left out.
        x_label, y_label: of the axes.
        logarithmic: makes the vertical axis logarithmic.
        descending: makes the horizontal axis run from high to low.
        span: the least length of the horizontal axis, in units of x.
        height: of the plot without the legend.
    """
    shown = [[(x, y) for x, y in item.points if abs(y) <= _LARGEST and (y > 0 or not logarithmic)] for item in series]
    xs = [x for points in shown for x, _ in points] or [0.0, 1.0]
    ys = [y for points in shown for _, y in points] or [1.0, 2.0]
    margin = max((max(xs) - min(xs)) * 0.04, (span - max(xs) + min(xs)) / 2) or 0.05
    x_low, x_high = min(xs) - margin, max(xs) + margin
    if logarithmic:
        y_low, y_high = min(ys) / 1.2, max(ys) * 1.2
    else:
        room = (max(ys) - min(ys)) * 0.06 or abs(max(ys)) * 0.1 or 1.0
        y_low, y_high = (0.0 if 0 <= min(ys) < max(ys) * 0.5 else min(ys) - room), max(ys) + room
    bottom, right = height - 44, WIDTH - _RIGHT
    x_of = _scale(x_low, x_high, *((right, _LEFT) if descending else (_LEFT, right)))
    y_of = _scale(y_low, y_high, bottom, _TOP, logarithmic)
    parts = []
    for tick in ticks(y_low, y_high, logarithmic):
        y = y_of(tick)
        kind = "zero" if tick == 0 and y_low < 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{_LEFT} {_n(y)}H{right}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 7}" y="{_n(y + 4)}">{tick:g}</text>')
    for tick in ticks(x_low, x_high, whole=all(float(x).is_integer() for x in xs)):
        parts.append(f'<path class="axis" d="M{_n(x_of(tick))} {bottom}v5"/>')
        parts.append(f'<text class="tick middle" x="{_n(x_of(tick))}" y="{bottom + 18}">{tick:g}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(f'<text class="label middle" x="{(_LEFT + right) / 2}" y="{bottom + 37}">{escape(x_label)}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="label middle" transform="rotate(-90 13 {middle})" x="13" y="{middle}">{escape(y_label)}</text>'
    )
    for index, (item, points) in enumerate(zip(series, shown, strict=True)):
        spots = [(x_of(x), y_of(y)) for x, y in points]
        inside = ""
        if item.kind != "dots" and len(spots) > 1:
            path = "".join(
                f"H{_n(x)}V{_n(y)}" if item.kind == "step" and i else f"{'L' if i else 'M'}{_n(x)} {_n(y)}"
                for i, (x, y) in enumerate(spots)
            )
            inside += f'<path class="line" d="{path}"/>'
        if item.kind != "step" or len(spots) == 1:
            notes = [f"{item.name}: {x:.4g}, {y:.4g}" for x, y in points]
            inside += "".join(_marker(x, y, index, note) for (x, y), note in zip(spots, notes, strict=True))
        parts.append(_group(index, inside))
    legend, more = _legend(series, height) if len(series) > 1 else ("", 0.0)
    return figure(WIDTH, height + more, ident, title, text, "".join(parts) + legend)


def heat_map(
    ident: str,
    title: str,
    text: str,
    rows: Sequence[str],
    columns: int,
    cells: Mapping[tuple[int, int], tuple[float | None, str]],
    x_label: str,
    scale_label: str,
) -> Markup:
    """A grid of cells, the darker the larger their share; with a scale below.

    Args:
        ident, title, text: see :func:`figure`.
        rows: names of the rows, from the top.
        columns: number of columns; they are labelled with their index.
        cells: (row, column) -> a share in [0, 1], or None for a hatched cell, which the scale calls dense; and a note
            that is shown on hovering. Where there is no entry the grid is empty.
        x_label: of the columns.
        scale_label: says what the shares are, above the scale.
    """
    left, cell_height = 44.0, 22.0
    width = (WIDTH - left - 4) / max(columns, 1)
    gap = min(1.5, width * 0.12)
    bottom = 4 + cell_height * len(rows)
    size = 'width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"'
    hatch = f'<pattern id="{ident}-hatch" class="hatch" {size}><path d="M0 0V5"/></pattern>'
    parts = [f"<defs>{hatch}</defs>"]
    for index, name in enumerate(rows):
        y = 4 + cell_height * index
        parts.append(f'<text class="label end" x="{left - 8}" y="{_n(y + 15)}">{escape(name)}</text>')
    for (row, column), (share, note) in sorted(cells.items()):
        x, y = left + column * width, 4 + row * cell_height
        parts.append(_cell(x, y, width - gap, cell_height - 2, share, ident, note))
    every = next((step for step in (1, 2, 5, 10, 20, 50) if columns / step <= 11), 100)
    for column in range(0, columns, every):
        x = left + (column + 0.5) * width
        parts.append(f'<text class="tick middle" x="{_n(x)}" y="{_n(bottom + 14)}">{column}</text>')
    parts.append(
        f'<text class="label middle" x="{_n((left + WIDTH) / 2)}" y="{_n(bottom + 33)}">{escape(x_label)}</text>'
    )
    y = bottom + 48
    parts.append(f'<text class="label" x="{left}" y="{_n(y + 12)}">{escape(scale_label)}</text>')
    x = left
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, None):
        x += 14 if share is None else 0
        parts.append(_cell(x, y + 20, 34, 14, share, ident, ""))
        name = "dense" if share is None else f"{share:g}"
        parts.append(f'<text class="tick middle" x="{_n(x + 17)}" y="{_n(y + 48)}">{name}</text>')
        x += 36
    return figure(WIDTH, y + 54, ident, title, text, "".join(parts))


def _cell(x: float, y: float, width: float, height: float, share: float | None, ident: str, note: str) -> str:
    box = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="{_n(min(2, width / 6))}"'
    hint = f"<title>{escape(note)}</title>" if note else ""
    if share is None:
        return f'<rect {box} class="dense" fill="url(#{ident}-hatch)">{hint}</rect>'
    strength = 0.06 + 0.94 * min(max(share, 0.0), 1.0)
    return f'<rect {box} class="cell" fill-opacity="{_n(strength)}">{hint}</rect>'


def band(
    ident: str,
    title: str,
    text: str,
    curves: Sequence[Sequence[tuple[float, float]]],
    marks: Sequence[tuple[float, float]],
    floor: float = 1e-4,
) -> Markup:
    """The range and the median of many curves over [0, 1], and single points on top.

    Args:
        ident, title, text: see :func:`figure`.
        curves: points ``(x, y)``; all curves have the same x, ascending.
        marks: the single points.
        floor: lower end of the vertical axis, which is logarithmic and ends at 1; a smaller y is drawn at the floor.
    """
    width, height, left, bottom = 200.0, 150.0, 52.0, 122.0
    x_of = _scale(0.0, 1.0, left, width - 8)
    y_of = _scale(floor, 1.0, bottom, 8, True)
    parts = []
    for tick in ticks(floor, 1.0, True):
        y = _n(y_of(tick))
        parts.append(f'<path class="grid" d="M{_n(left)} {y}H{_n(width - 8)}"/>')
        parts.append(f'<text class="tick end" x="{_n(left - 5)}" y="{_n(y_of(tick) + 4)}">{tick:g}</text>')
    for tick in (0.0, 0.5, 1.0):
        parts.append(f'<text class="tick middle" x="{_n(x_of(tick))}" y="{_n(bottom + 16)}">{tick:g}</text>')
    parts.append(f'<path class="axis" d="M{_n(left)} {_n(bottom)}H{_n(width - 8)}"/>')

    def spot(x: float, y: float) -> str:
        return f"{_n(x_of(x))} {_n(y_of(min(max(y, floor), 1.0)))}"

    if curves:
        across = [sorted(curve[i][1] for curve in curves) for i in range(len(curves[0]))]
        xs = [x for x, _ in curves[0]]
        upper = [spot(x, ys[-1]) for x, ys in zip(xs, across, strict=True)]
        lower = [spot(x, ys[0]) for x, ys in zip(xs, across, strict=True)]
        median = [spot(x, ys[len(ys) // 2]) for x, ys in zip(xs, across, strict=True)]
        parts.append(f'<path class="band" d="M{"L".join([*upper, *reversed(lower)])}Z"/>')
        parts.append(f'<g class="s0"><path class="line" d="M{"L".join(median)}"/></g>')
    for point in marks:
        cx, cy = spot(*point).split()
        parts.append(f'<circle class="cut" cx="{cx}" cy="{cy}" r="3"/>')
    return figure(width, height, ident, title, text, "".join(parts))
