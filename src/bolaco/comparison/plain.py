"""The original rounded to few bits: what a smaller file costs without any factors. Rows of every comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.pytorch_utils import Conv1D

from bolaco.comparison.rows import Common, DenseResults, finite
from bolaco.errors import RecipeError
from bolaco.evaluation.perplexity import perplexity
from bolaco.parallel import team
from bolaco.quantize.grid import GridSpec, Levels
from bolaco.quantize.matrix import round_to_nearest
from bolaco.report.record import QuantizedRecord
from bolaco.runs.session import Loaded
from bolaco.settings import meant

# Eight bits with a scale for each row; below that groups of 64 along the input, with a scale and a zero point.
FORMS = {
    "int8": GridSpec(bits=8, group=None, levels=Levels.SYMMETRIC),
    "int6": GridSpec(bits=6, group=64),
    "int4": GridSpec(bits=4, group=64),
    "int3": GridSpec(bits=3, group=64),
}


def check_forms(names: tuple[str, ...]) -> None:
    """Raises RecipeError for a name that none of :data:`FORMS` has."""
    for name in names:
        if name not in FORMS:
            raise RecipeError(f"--quantized {name}: known are {', '.join(FORMS)}{meant(name, FORMS)}")


def quantized_rows(common: Common, dense: DenseResults) -> list[QuantizedRecord]:
    """The original with its decoder linears rounded to nearest, on all texts, in each form asked for.

    Embeddings, norms and biases stay, and count in the number format of the results.
    """
    found = team.first(lambda: [_row(common, dense, name).model_dump() for name in common.comparison.quantized])
    return [QuantizedRecord.model_validate(row) for row in found]


def _row(common: Common, dense: DenseResults, name: str) -> QuantizedRecord:
    comparison, session, loaded = common.comparison, common.session, common.loaded
    first, recipe = next(iter(comparison.recipes.items()))
    texts, batch = common.texts[first], recipe.validation.batch
    artefact = session.folder.artefact(
        "plain", model=loaded.identity, form=FORMS[name], text=texts.measured, batch=batch, dtype=str(loaded.dtype)
    )
    known = artefact.read(QuantizedRecord)
    if known is not None:
        return known
    blocks = [texts.evaluation, *(tokens for _, tokens in texts.others)]
    with (
        session.clock.timed("plain quantization"),
        rounded(loaded, FORMS[name]) as taken,
        session.reporter.stage(f"evaluate {name}", sum(map(len, blocks))) as tick,
    ):
        found = [perplexity(loaded.model, tokens, batch, tick).perplexity for tokens in blocks]
    linears = sum(site.size for site in loaded.structure.sites)
    rest = (loaded.parameters - linears) * loaded.dtype.itemsize
    before = [text.perplexity for _, text in dense.texts]
    row = QuantizedRecord(
        name=name,
        bits=taken / linears,
        bytes=rest + -(-taken // 8),
        perplexity=[finite(value) for value in found],
        gap=[
            finite(math.log(after) - math.log(plain)) if math.isfinite(after) else None
            for after, plain in zip(found, before, strict=True)
        ],
    )
    artefact.write(row)
    return row


@contextmanager
def rounded(loaded: Loaded, spec: GridSpec) -> Iterator[int]:
    """The decoder linears of a model are rounded while this lasts; gives the bits that they take as stored."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    bits = 0
    try:
        with torch.no_grad():
            for name in dict.fromkeys(site.module for site in loaded.structure.sites):
                module = loaded.working.base_model.get_submodule(name)
                weight = module._parameters["weight"]
                assert weight is not None
                kept.append((weight, weight.detach().clone()))
                matrix = weight.T if isinstance(module, Conv1D) else weight
                made = round_to_nearest(matrix.float(), spec)
                bits += made.stored_bits
                matrix.copy_(made.dense(torch.float32))
        yield bits
    finally:
        with torch.no_grad():
            for parameter, before in kept:
                parameter.copy_(before)
