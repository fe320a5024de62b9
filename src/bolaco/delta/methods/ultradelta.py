"""UltraDelta (arXiv 2505.13563): four-bit codes of which a random share stays, and larger ones for it; data-free.

The three steps of the paper: matrices are ranked by the variance of D and cut into three groups, of which those with
less variance become sparser by a step; D is quantized uniformly and codes are dropped at random inside each set of
equal codes, which keeps the histogram; and the survivors grow by ``gamma / (1 - share dropped)``. The paper says of
gamma that it lies in 0.5 to 1 and falls with the trace norm of D; here it falls linearly between the least and the
largest trace norm of a number. What is stored are codes and gaps, see :mod:`bolaco.delta.forms.sparse`.
"""

from __future__ import annotations

import math
import zlib

import torch
from pydantic import Field
from torch import Tensor

from bolaco.delta.form import Form
from bolaco.delta.forms.sparse import Sparse, gap_bits
from bolaco.delta.method import DeltaMethod, DeltaTask
from bolaco.errors import BudgetError
from bolaco.models.structure import Site
from bolaco.settings import Section

# The code of zero.
_SIZE_BITS = 16


class UltraDeltaOptions(Section):
    """What the paper leaves to be chosen."""

    bits: int = Field(4, ge=2, le=8, description="of a code")
    step: float = Field(0.25, ge=0, lt=1, description="more or less of the numbers of a group stay, as a share")
    least_gain: float = Field(0.5, gt=0, le=1, description="gamma of the matrix with the largest trace norm")


def compress(task: DeltaTask, options: UltraDeltaOptions) -> None:
    """As dense as all matrices together may be."""
    variance: dict[str, float] = {}
    trace: dict[str, float] = {}
    places: dict[str, float] = {}  # share of the numbers that are not zero once they are codes
    sizes: dict[str, int] = {}
    with task.reporter.stage("trace norms", task.layers) as tick:
        for layer in range(task.layers):
            for site in task.sites(layer):
                delta = task.subject.weight(site).cpu()
                variance[site.name] = float(delta.double().var(correction=0))
                trace[site.name] = float(torch.linalg.svdvals(delta.double()).sum()) / math.sqrt(site.size)
                places[site.name] = float((_codes(delta, options.bits)[0] != _zero(options.bits)).float().mean())
                sizes[site.name] = site.size
            tick(1)
    if not sizes:
        task.each_block("drop", lambda site, delta: _made(site, delta, 0.0, 1.0, options, task.seed))
        return
    order = sorted(variance, key=lambda name: variance[name])
    third = {name: 3 * i // len(order) for i, name in enumerate(order)}
    weights = {name: 1 + options.step * (third[name] - 1) for name in order}
    kept = _kept_share(task.total, sizes, places, weights, options.bits)
    low, high = min(trace.values()), max(trace.values())

    def make(site: Site, delta: Tensor) -> Form:
        share = min(1.0, kept * weights[site.name])
        fall = (trace[site.name] - low) / (high - low) if high > low else 0.0
        gamma = 1 - (1 - options.least_gain) * fall
        return _made(site, delta, share, gamma, options, task.seed)

    task.each_block("drop", make)


def _zero(bits: int) -> int:
    return 1 << bits - 1


def _codes(delta: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes ``[out, in]`` uint8 on levels that span D with zero among them, and the size of a step."""
    size = (delta.abs().max() / (_zero(bits) - 1)).to(torch.bfloat16).float()
    top = (1 << bits) - 1
    codes = (delta / size.where(size > 0, 1.0)).round_().add_(_zero(bits)).clamp_(0, top)
    return codes.to(torch.uint8), size


def _made(site: Site, delta: Tensor, share: float, gamma: float, options: UltraDeltaOptions, seed: int) -> Sparse:
    """Of every code that is not zero, a share stays; how many is certain, which is random."""
    codes, size = _codes(delta, options.bits)
    flat = codes.reshape(-1)
    draw = torch.Generator().manual_seed(seed ^ zlib.crc32(site.name.encode()))
    chance = torch.rand(len(flat), generator=draw)
    kept = torch.zeros(len(flat), dtype=torch.bool)
    for code in range(1 << options.bits):
        own = (flat == code).nonzero()[:, 0]
        if code != _zero(options.bits) and len(own):
            chosen = torch.argsort(chance[own], stable=True)[: math.floor(share * len(own))]
            kept[own[chosen]] = True
    return Sparse.of(codes, kept.view_as(codes), size * gamma / share if share else size, options.bits)


def _kept_share(
    total: int, sizes: dict[str, int], places: dict[str, float], weights: dict[str, float], bits: int
) -> float:
    """The largest share of the codes that are not zero for which all matrices fit.

    Raises:
        BudgetError: not even one in a thousand fits.
    """

    def needed(kept: float) -> float:
        found = 0.0
        for name, size in sizes.items():
            density = min(1.0, kept * weights[name]) * places[name]
            # Gaps are random; three standard deviations, and the ends of three streams in whole bytes.
            count = density * size
            found += count * (bits + gap_bits(density)) + 3 * math.sqrt(2 * count) + 24 + _SIZE_BITS
        return found

    low, high = 1e-3, 1.0
    if needed(low) > total:
        raise BudgetError(f"ultradelta: {total:,} bits are too few, one number in a thousand needs {needed(low):,.0f}")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle) <= total else (low, middle)
    return low


METHOD = DeltaMethod(
    name="ultradelta",
    paper="arXiv 2505.13563",
    summary="a random share of four-bit codes, rescaled; no text is read",
    compress=compress,
    options=UltraDeltaOptions,
    reads_text=False,
)
