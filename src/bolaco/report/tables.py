"""Tables and lines for the terminal, and how numbers are written in every report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from pydantic import ByteSize
from rich.table import Table

from bolaco.checkpoint.info import CompressedInfo, TrialRecord, TuningRecord
from bolaco.models.labels import layer_of, ordered, type_of
from bolaco.models.structure import Structure
from bolaco.storage.budget import Budget, Ranks

if TYPE_CHECKING:
    from bolaco.evaluation.speed import Speed
    from bolaco.evaluation.tasks import TaskResult


def millions(count: int) -> str:
    """A count in millions, such as ``1.50 M``."""
    return f"{count / 1e6:,.2f} M"


def mib(count: float) -> str:
    """A number of bytes in MiB, such as ``2.0 MiB``."""
    return f"{count / 2**20:,.1f} MiB"


def _change(before: float, after: float) -> str:
    """Difference of two log-perplexities, in nats a token."""
    finite = math.isfinite(before) and math.isfinite(after)
    return f"{math.log(after) - math.log(before):+.3f} nats" if finite else "not finite"


def summary_rows(info: CompressedInfo) -> list[tuple[str, str, str, str]]:
    """Rows (quantity, dense, compressed, ratio or gap) of the table that ends every run."""
    ppl = info.perplexity
    return [
        ("perplexity", f"{ppl.dense:.3f}", f"{ppl.compressed:.3f}", _change(ppl.dense, ppl.compressed)),
        (
            "parameters, decoder linears",
            millions(info.parameters_linears_dense),
            millions(info.parameters_linears),
            f"{info.keep_linears:.4f}",
        ),
        (
            "parameters, whole model",
            millions(info.parameters_dense),
            millions(info.parameters),
            f"{info.keep_model:.4f}",
        ),
        *_active_rows(info),
        *weight_rows(info),
    ]


def weight_rows(info: CompressedInfo) -> list[tuple[str, str, str, str]]:
    """The weights on disk; where the original's are in another number format, in the result's format too."""
    dense, compressed, here = info.bytes_dense, info.bytes, info.bytes_dense_here
    rows = [("weights on disk", mib(dense), mib(compressed), f"{compressed / dense:.4f}")]
    if here is None or info.dtype_dense in (None, info.dtype):
        return rows
    as_found = (f"weights on disk, {info.dtype_dense} and {info.dtype}", *rows[0][1:])
    return [(f"weights in {info.dtype}", mib(here), mib(compressed), f"{compressed / here:.4f}"), as_found]


def larger_note(size: int, dtype: str, source: int, source_format: str | None) -> list[str]:
    """A line where a result takes more bytes than its original on disk, which is in another number format."""
    if size <= source or source_format in (None, "", dtype):
        return []
    return [
        f"The result has more bytes ({mib(size)}) than the original on disk ({mib(source)}): "
        f"its weights are in {dtype}, those of the original in {source_format}."
    ]


def size_notes(info: CompressedInfo) -> list[str]:
    """What must be said beside the sizes of a result."""
    return larger_note(info.bytes, info.dtype, info.bytes_dense, info.dtype_dense)


def asked_size(info: CompressedInfo) -> str:
    """The size that was asked for, and the keep ratio that it came to."""
    keep = f"keep {info.keep:g}"
    share, size = info.recipe.get("keep_model"), info.recipe.get("target_size")
    if isinstance(size, int):
        return f"target size {ByteSize(size).human_readable(decimal=True)} ({keep})"
    return f"keep {share:g} of all parameters ({keep} of the decoder linears)" if isinstance(share, float) else keep


def _active_rows(info: CompressedInfo) -> list[tuple[str, str, str, str]]:
    """What one token uses, where that is not everything."""
    dense, active = info.parameters_active_dense, info.parameters_active
    if dense is None or active is None or dense == info.parameters_dense:
        return []
    return [("parameters, active per token", millions(dense), millions(active), f"{active / dense:.4f}")]


def experts_table(tokens: Mapping[str, int]) -> Table:
    """Calibration tokens that the experts of each block were sent; ``tokens`` is by matrix name."""
    counts: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, count in tokens.items():
        counts[layer_of(name)][type_of(name)].append(count)
    table = Table("layer", "experts", "least", "median", "most", "without any")
    table.title, table.title_justify = "calibration tokens of the experts", "left"
    for layer, by_type in sorted(counts.items()):
        found = sorted(next(iter(by_type.values())))
        row = (len(found), found[0], found[len(found) // 2], found[-1], found.count(0))
        table.add_row(str(layer), *(f"{value:,}" for value in row))
    return table


def summary_table(info: CompressedInfo) -> Table:
    """The compressed model beside the original."""
    ppl = info.perplexity
    title = f"{info.model}, {asked_size(info)}: perplexity on {ppl.data}, {ppl.windows} x {ppl.seq_len} tokens"
    table = Table("", title=title, title_justify="left")
    for column in ("dense", "compressed", "ratio / gap"):
        table.add_column(column, justify="right")
    for row in summary_rows(info):
        table.add_row(*row)
    return table


_SIZES_COLUMNS = ("", "perplexity", "gap, nats", "parameters", "of all", "weights on disk", "of the original's")


def _sizes_rows(infos: Mapping[str, CompressedInfo]) -> list[tuple[str, ...]]:
    """The original and its results at several sizes, a cell for each of :data:`_SIZES_COLUMNS`."""
    first = next(iter(infos.values()))
    dense = first.perplexity.dense
    rows: list[tuple[str, ...]] = [
        ("original", f"{dense:.3f}", "", f"{first.parameters_dense:,}", "1", mib(first.bytes_dense), "1")
    ]
    for name, info in infos.items():
        quality = (
            f"{info.perplexity.compressed:.3f}",
            _change(dense, info.perplexity.compressed).removesuffix(" nats"),
        )
        size = (f"{info.parameters:,}", f"{info.keep_model:.4f}", mib(info.bytes))
        rows.append((name, *quality, *size, f"{info.bytes / info.bytes_dense:.4f}"))
    return rows


def sizes_table(infos: Mapping[str, CompressedInfo]) -> Table:
    """Quality against size of one model's results, by name; there must be one."""
    first = next(iter(infos.values()))
    ppl = first.perplexity
    title = f"{first.model}: perplexity on {ppl.data}, {ppl.windows} x {ppl.seq_len} tokens"
    table = Table(_SIZES_COLUMNS[0], title=title, title_justify="left")
    for column in _SIZES_COLUMNS[1:]:
        table.add_column(column, justify="right")
    for row in _sizes_rows(infos):
        table.add_row(*row)
    return table


def sizes_markdown(infos: Mapping[str, CompressedInfo]) -> str:
    """:func:`sizes_table` as Markdown."""
    lines = [_SIZES_COLUMNS, ("---", *("---:" for _ in _SIZES_COLUMNS[1:])), *_sizes_rows(infos)]
    ppl = next(iter(infos.values())).perplexity
    text = " ".join(f"{ppl.data}: {ppl.windows} windows of {ppl.seq_len} tokens".split()).replace("|", "\\|")
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\nPerplexity on {text}.\n"


class Timed(Protocol):
    """A record of a run."""

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage."""


def seconds_line(record: Timed) -> str:
    """Seconds of each stage and their sum, in one line."""
    parts = [f"{stage} {seconds:.1f}" for stage, seconds in record.seconds.items()]
    return f"seconds: {', '.join(parts)}; {sum(record.seconds.values()):.1f} in all"


def tuning_table(record: TuningRecord) -> Table:
    """A model before and after a tuning run."""
    ppl = record.perplexity
    title = f"{record.model}, tuned: perplexity on {ppl.tokens:,} tokens of {ppl.data}"
    table = Table("mode", title=title, title_justify="left")
    start = [] if ppl.start is None else [("before training", f"{ppl.start:.3f}")]
    numbers = [("before", f"{ppl.before:.3f}"), *start, ("after", f"{ppl.after:.3f}")]
    for column in ("steps", "trained parameters", *(name for name, _ in numbers), "change"):
        table.add_column(column, justify="right")
    steps = f"{record.steps:,}" + (f" of {record.of_steps:,}" if record.steps < record.of_steps else "")
    steps += "" if record.best_step is None else f", best {record.best_step:,}"
    trained = f"{record.trainable_parameters:,}"
    table.add_row(record.mode, steps, trained, *(value for _, value in numbers), _change(ppl.before, ppl.after))
    return table


def blocks_line(kept: Sequence[int], layers: int) -> str:
    """Which of a model's ``layers`` decoder blocks are kept, in one line; neighbours are written as ``first-last``."""
    runs: list[list[int]] = []
    for block in kept:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    named = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{len(kept)} of {layers} decoder blocks stay: {named}"


def ranks_table(ranks: Ranks) -> Table:
    """Ranks by layer and matrix type; neighbouring layers with the same ranks share a row."""
    cells: dict[int, dict[str, str]] = defaultdict(dict)
    for name, rank in ranks.items():
        cells[layer_of(name)][type_of(name)] = "dense" if rank is None else str(rank)
    types = ordered({kind for row in cells.values() for kind in row})
    table = Table("layers", *types, title="rank of each matrix", title_justify="left")
    layers = sorted(cells)
    start = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or cells[layers[i]] != cells[layers[start]]:
            label = str(layers[start]) if i - start == 1 else f"{layers[start]}-{layers[i - 1]}"
            table.add_row(label, *[cells[layers[start]].get(t, "") for t in types])
            start = i
    return table


def kept_lines(structure: Structure) -> list[str]:
    """What of the decoder blocks stays dense whatever the recipe says, with its share of them and the reason."""
    return [
        f"stays dense: {kept.name} ({kept.reason}), {kept.size:,} parameters, {kept.size / structure.size:.4f} of the "
        "decoder blocks"
        for kept in sorted(structure.kept, key=lambda kept: -kept.size)
    ]


def kept_line(info: CompressedInfo) -> str:
    """What of a result's decoder blocks is dense by nature, in one line; empty if nothing is."""
    parts = [f"{kept.name} ({kept.reason}, {kept.parameters:,})" for kept in info.kept]
    return f"dense by nature: {', '.join(parts)}" if parts else ""


def allocation_line(info: CompressedInfo) -> str:
    """What the rule for ranks came to beside them, in one line; empty if nothing."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in info.allocation.items())


def trials_table(trials: Sequence[TrialRecord], limit: int = 10) -> Table:
    """The ``limit`` best trials by objective, each with its number in the search and its keep ratios.

    There must be one. Where a type's layers are searched in parts (``qk/1``, ``qk/2``, ..), the type has one column and
    each part a line of it.
    """
    shown = sorted(range(len(trials)), key=lambda i: trials[i].objective)[:limit]
    names = list(trials[0].keep)
    columns = list(dict.fromkeys(name.partition("/")[0] for name in names))
    table = Table("trial", "objective", "ppl", "KL", *columns, title="best trials: keep ratios", title_justify="left")
    table.show_lines = any("/" in name for name in names)
    for i in shown:
        trial = trials[i]
        numbers = [f"{value:.5g}" for value in (trial.objective, trial.perplexity, trial.kl)]
        keeps = [[f"{trial.keep[n]:.2f}" for n in names if n.partition("/")[0] == column] for column in columns]
        table.add_row(str(i), *numbers, *map("\n".join, keeps))
    return table


def plan_table(structure: Structure, budget: Budget, ranks: Ranks, name: str) -> Table:
    """What ``bolaco compress --dry-run`` shows: by matrix type, the shapes and the ranks of a first allocation.

    Args:
        structure: the matrices, or stacks of them, that are factored as one each.
        budget: of all decoder linears.
        ranks: of every site of ``structure``; None is dense.
        name: what that allocation is called, such as ``uniform``.
    """
    table = Table("type", "matrices", "shape", f"rank of the {name} allocation", title_justify="left")
    table.title = (
        f"budget {budget.limit:,} of {budget.total:,} parameters in {len(structure.sites)} decoder linears; "
        f"{name} allocation {budget.cost(ranks):,} ({budget.ratio(ranks):.4f})"
    )
    for kind in ordered(structure.types):
        sites = [site for site in structure.sites if site.type == kind]
        if sites:
            shapes = sorted({f"{s.out_features} x {s.in_features}" for s in sites})
            used = sorted({"dense" if ranks[s.name] is None else str(ranks[s.name]) for s in sites})
            table.add_row(kind, str(len(sites)), ", ".join(shapes), ", ".join(used))
    return table


def tasks_table(results: list[TaskResult]) -> Table:
    """Accuracies with their standard errors, a row for each task; other metrics, if any, in a last column."""
    usual = ("acc", "acc_norm")
    other = any(name not in usual for result in results for name in result.metrics)
    table = Table("task", title="tasks: mean ± standard error", title_justify="left")
    for column in ("examples", *usual):
        table.add_column(column, justify="right")
    if other:
        table.add_column("other")

    def cell(result: TaskResult, name: str) -> str:
        error = result.stderr[name]
        return f"{result.metrics[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")

    for result in results:
        cells = [cell(result, name) if name in result.metrics else "" for name in usual]
        rest = [f"{name} {cell(result, name)}" for name in result.metrics if name not in usual]
        table.add_row(result.task, f"{result.examples:,}", *cells, *(["\n".join(rest)] if other else []))
    return table


def _at(what: str, batch: int, result: Speed) -> float:
    """Tokens per second at a batch size; ``what`` is ``prefill`` or ``decode``."""
    rates: dict[int, float] = getattr(result, what)
    return rates[batch]


def speed_table(results: list[Speed]) -> Table:
    """Models side by side, a column each; in brackets the ratio to the first one."""
    table = Table("", title="ratios are to the first model", title_justify="left")
    for result in results:
        table.add_column(f"{result.model}\n{result.runtime}", justify="right")
    first = results[0]

    def row(label: str, shown: Callable[[float], str], value: Callable[[Speed], float]) -> None:
        cells = [shown(value(first))]
        cells += [f"{shown(value(r))} ({value(r) / (value(first) or 1):.2f})" for r in results[1:]]
        table.add_row(label, *cells)

    table.add_row("weights in", *[result.dtype for result in results])
    row("parameters", lambda v: millions(int(v)), lambda r: r.parameters)
    row("weights", mib, lambda r: r.bytes)
    if all(result.file_bytes for result in results):
        row("files", mib, lambda r: r.file_bytes)
    row("multiplications a token", lambda v: millions(int(v)), lambda r: r.macs)
    row("peak memory", mib, lambda r: r.peak_bytes)
    row("resident memory", mib, lambda r: r.resident_bytes)
    row("seconds to load", lambda v: f"{v:.2f}", lambda r: r.load_seconds)
    row("seconds to the first token", lambda v: f"{v:.3f}", lambda r: r.first_token_seconds)
    for batch in first.prefill:
        row(f"prompt tokens/s, batch {batch}", "{:,.1f}".format, partial(_at, "prefill", batch))
        row(f"new tokens/s, batch {batch}", "{:,.1f}".format, partial(_at, "decode", batch))
    return table
