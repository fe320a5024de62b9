"""Memory and speed of several deltas beside one base, against as many whole models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from bolaco.delta.record import read_record
from bolaco.delta.serve import DeltaModel
from bolaco.errors import DataError, RecipeError
from bolaco.evaluation.engines import TorchEngine
from bolaco.evaluation.speed import step_seconds
from bolaco.models.load import load_model
from bolaco.models.structure import positions_of
from bolaco.report.tables import mib


@dataclass(frozen=True)
class DeltaSpeed:
    """So many deltas, a row of a batch each.

    Attributes:
        deltas: how many.
        bytes: of the base, the packed deltas and those that are kept unpacked.
        bytes_packed: of the base and the packed deltas.
        bytes_models: of as many whole models.
        prefill, decode: tokens per second of the mixed batch: of prompts, all positions counted; of new tokens.
        prefill_models, decode_models: of whole models, one row each, one after the other.
    """

    deltas: int
    bytes: int
    bytes_packed: int
    bytes_models: int
    prefill: float
    decode: float
    prefill_models: float
    decode_models: float


def measure_deltas(
    folders: Sequence[str],
    counts: Sequence[int] = (1, 4, 16),
    prompt: int = 64,
    new: int = 16,
    unpacked: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> Iterator[DeltaSpeed]:
    """Measures numbers of deltas; where there are fewer folders they are taken again under other names.

    Args:
        folders: what ``bolaco delta`` wrote, all for one base.
        counts: of deltas.
        prompt, new: tokens of a prompt, and after it; the median of the latter is taken.
        unpacked: deltas that are kept unpacked; by default all that are measured.
        dtype, device: of the base in memory.

    Raises:
        CheckpointError: no deltas, or of several bases.
        DataError: prompt and new tokens are more than the model has positions.
        RecipeError: no deltas.
    """
    if not folders or min(counts) < 1:
        raise RecipeError("bench --deltas: needs folders of deltas, and numbers of them from 1 up")
    bases = [read_record(folder).base for folder in folders]
    whole = load_model(folders[0], dtype, device)
    positions = positions_of(whole.config)
    if positions is not None and prompt + new + 1 > positions:
        raise DataError(
            f"a prompt of {prompt} and {new} new tokens: the model has {positions} positions; lower --prompt"
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, whole.config.vocab_size, (max(counts), prompt), generator=generator).to(whole.device)
    bytes_of_one = sum(p.numel() * p.element_size() for p in whole.parameters())
    with torch.inference_mode():
        # Whole models share nothing, so that each takes its row alone.
        prefill, decode = step_seconds(TorchEngine(whole, whole), tokens[:1], 3, new)
    alone = prompt / prefill, 1 / decode
    del whole
    model = DeltaModel(bases[0], unpacked=0, dtype=dtype, device=device)
    for count in sorted(counts):
        model.unpacked = count if unpacked is None else unpacked
        for i in range(len(model.names), count):
            model.add(str(i), folders[i % len(folders)])
        rows = model.names[:count]
        with torch.inference_mode(), model.using(rows):
            prefill, decode = step_seconds(TorchEngine(model.model, model.model), tokens[:count], 3, new)
        found = model.bytes
        packed = found["base"] + found["deltas"]
        yield DeltaSpeed(
            deltas=count,
            bytes=packed + found["unpacked"],
            bytes_packed=packed,
            bytes_models=count * bytes_of_one,
            prefill=count * prompt / prefill,
            decode=count / decode,
            prefill_models=alone[0],
            decode_models=alone[1],
        )


def delta_table(found: Sequence[DeltaSpeed]) -> Table:
    """Numbers of deltas, a row each."""
    table = Table(title="one base and deltas, a mixed batch; whole models one after the other", title_justify="left")
    for name in ("deltas", "packed", "with unpacked", "whole models", "prompt tokens/s", "new tokens/s"):
        table.add_column(name, justify="right")
    for row in found:
        table.add_row(
            str(row.deltas),
            f"{mib(row.bytes_packed)} ({row.bytes_packed / (row.bytes_models / row.deltas):.2f})",
            f"{mib(row.bytes)} ({row.bytes / (row.bytes_models / row.deltas):.2f})",
            f"{mib(row.bytes_models)} ({row.deltas})",
            f"{row.prefill:,.1f} ({row.prefill_models:,.1f})",
            f"{row.decode:,.1f} ({row.decode_models:,.1f})",
        )
    return table
