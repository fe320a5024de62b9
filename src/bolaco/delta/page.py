"""The report and the model card of a delta, and the lines that a terminal shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from bolaco.checkpoint.info import Curves, MatrixCurve
from bolaco.delta.record import DeltaInfo, Quality
from bolaco.models.labels import layer_of, ordered, type_of
from bolaco.report.charts import spectrum_charts
from bolaco.report.html import REPORT_FILE, bars_of, rendered
from bolaco.report.markdown import code, fenced, plain
from bolaco.report.svg import heat_map
from bolaco.report.tables import mib, seconds_line

__all__ = ["REPORT_FILE", "bill", "delta_card", "delta_page", "document", "lines_of"]


def document(path: Path, info: DeltaInfo) -> dict[str, Any]:
    """A delta as one JSON document, for programs: where it is, and what its ``bolaco.json`` says."""
    return {"path": str(path)} | info.model_dump(mode="json")


def bill(info: DeltaInfo) -> list[tuple[str, int, float]]:
    """What is stored: its name, its bits, and their share of all."""
    bits = info.bits
    rows = [
        ("decoder matrices, scales included", bits.matrices),
        ("norms, biases and others, as they are", bits.others),
        ("embeddings and head, as they are", bits.embeddings),
        ("in all", bits.total),
    ]
    return [(label, count, count / max(bits.total, 1)) for label, count in rows]


def _use(name: str) -> str:
    return f"""import bolaco

model = bolaco.load("{name}")  # the base with this delta
"""


def _bit_map(info: DeltaInfo) -> Markup | None:
    """A cell for each matrix: the bits that a number of it takes."""
    if not info.matrices:
        return None
    each = {name: record.bits / (record.shape[0] * record.shape[1]) for name, record in info.matrices.items()}
    most = max(each.values())
    rows = ordered(set(map(type_of, each)))
    cells: dict[tuple[int, int], tuple[float | None, str]] = {}
    for name, count in each.items():
        place = rows.index(type_of(name)), layer_of(name)
        note = f"layer {place[1]} {rows[place[0]]}: {count:.3f} bits a number, {info.matrices[name].plan}"
        cells[place] = count / most, note
    text = f"{len(each)} matrices; {min(each.values()):.3f} to {most:.3f} bits for each of their numbers."
    columns = 1 + max(layer for _, layer in cells)
    return heat_map("bits", "Bits of every matrix", text, rows, columns, cells, "layer", f"share of {most:.2f} bits")


def _spectra(info: DeltaInfo) -> list[tuple[str, Markup]]:
    curves, ranks = {}, {}
    for name, record in info.matrices.items():
        if record.energy is not None:
            rank = record.rank
            at = 0 if rank is None else max(0, round(rank * len(record.energy) / min(record.shape)) - 1)
            kept = None if rank is None else record.energy[min(at, len(record.energy) - 1)]
            curves[name] = MatrixCurve(shape=record.shape, energy=record.energy, kept=kept)
            ranks[name] = rank
    return spectrum_charts("spectrum", ranks, Curves(matrices=curves, refinement={})) if curves else []


def delta_page(info: DeltaInfo, name: str) -> str:
    """The report of a delta in a folder called ``name``: one static page."""
    quality = info.quality
    return rendered(
        "delta.html.j2",
        name=name,
        info=info,
        quality=quality,
        divergence_base=None if quality is None else quality.divergence_base,
        bill=bill(info),
        bit_map=_bit_map(info),
        spectra=_spectra(info),
        bars=bars_of(info.seconds),
        total=sum(info.seconds.values()),
        use=_use(name),
        settings=yaml.safe_dump(info.settings, sort_keys=False),
    )


def lines_of(info: DeltaInfo) -> list[str]:
    """What a terminal shows of a delta."""
    bits = info.bits
    found = [
        f"{len(info.matrices)} matrices in {mib(bits.matrices // 8)}, {bits.ratio:.5f} of their 16 bits (asked for "
        f"{info.ratio}), scales counted",
        f"all that is stored: {mib(bits.total // 8)}, {bits.ratio_model:.5f} of the model in 16 bits",
    ]
    if bits.embeddings:
        share = bits.embeddings / bits.total
        found.append(
            f"embeddings and head differ and are stored as they are: {mib(bits.embeddings // 8)}, {share:.0%} of all; "
            "a fine-tune that leaves them alone has a smaller delta"
        )
    if info.quality is not None:
        found.append(_measured(info.quality))
    return found


def _measured(quality: Quality) -> str:
    return (
        f"perplexity {quality.result:.3f} (tuned {quality.tuned:.3f}, base {quality.base:.3f}), "
        f"{quality.divergence:.4f} nats a token from tuned, on {quality.windows} x {quality.seq_len} tokens of "
        f"{quality.data}"
    )


def delta_card(info: DeltaInfo, name: str) -> str:
    """Markdown of a delta in a folder called ``name``."""
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bolaco", "delta"],
    }
    # A name on the hub has one slash, and is not a path.
    if info.base.count("/") == 1 and not info.base.startswith((".", "/", "~")):
        front["base_model"] = info.base
    rows = "\n".join(f"| {label} | {count:,} | {share:.4f} |" for label, count, share in bill(info))
    measured = "" if info.quality is None else plain(_measured(info.quality)).capitalize() + ".\n"
    paper = f" ({plain(info.paper)})" if info.paper else ""
    settings = yaml.safe_dump(info.settings, sort_keys=False)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# {plain(name)}

What {code(info.tuned)} adds to {code(info.base)}, by method {plain(info.method)}{paper}: {info.bits.ratio:.5f} of the
16 bits of every number in the decoder's matrices, scales counted. It holds no model; the base is needed, with the
weights whose SHA-256 begins with `{info.base_sha256[:12]}`.

| | bits | share of all |
|---|---:|---:|
{rows}

{measured}{plain(seconds_line(info))}.

## Use

{fenced(_use(name), "python")}

`bolaco delta apply {plain(name)} -o MERGED` writes a stock model. [report.html](report.html) shows the bits of every
matrix and the spectra.

## Settings

{fenced(settings, "yaml")}
"""
