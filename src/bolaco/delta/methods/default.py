"""Ours: singular directions of D in the metric of the fine-tuned model, bits and ranks by one price for all matrices.

D is factored under both sides' metric, as matrices are by method ``kfac``: half the squared error is then an estimate
of what it costs in nats, and errors of all matrices are in one unit. Both metrics lean on the identity, since the text
need not be that of the skill. A direction with squared singular value e costs ``e * loss(b)`` with b bits and ``e``
with none, where ``loss`` is read off the quantizer; it takes ``b (out + in)`` bits and two scales. One price for a bit,
the lowest that the budget allows, decides for every direction of every matrix.

A matrix is then made group by group, from the most bits to the fewest: what is left of D is factored anew, so that
later groups take up the error of those before them; V is quantized with error feedback, U is fitted to what V became
and quantized so, and then V to that. A direction has one scale for each factor, of least error, with levels on both
sides of zero and none at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from typing import cast

import torch
from pydantic import Field
from torch import Tensor

from bolaco.delta.form import Form
from bolaco.delta.forms.low_rank import Group, LowRank
from bolaco.delta.method import DeltaMethod, DeltaTask
from bolaco.errors import BudgetError
from bolaco.models.structure import Site
from bolaco.progress import Tick
from bolaco.quantize.gptq import Feedback, gptq
from bolaco.quantize.grid import GridSpec, Levels
from bolaco.quantize.matrix import QuantizedMatrix, round_to_nearest
from bolaco.settings import Section
from bolaco.statistics.forward import collect, input_walk
from bolaco.statistics.gradient import GRADIENT
from bolaco.statistics.moments import MOMENTS
from bolaco.statistics.statistic import SiteStatistics
from bolaco.statistics.stored import StatisticStore, estimate_gradients
from bolaco.statistics.symmetric import lower_root
from bolaco.work.blockstore import BlockStore


class DefaultOptions(Section):
    """The price's choices, and how far the metric is trusted."""

    bits: tuple[int, ...] = Field((1, 2, 3, 4, 8), min_length=1, description="what a direction may have beside none")
    inputs: float = Field(0.5, ge=1e-6, le=1, description="share of the identity in the metric of inputs; 1: it alone")
    outputs: float = Field(0.5, ge=1e-6, le=1, description="the same for outputs; 1 needs no loss gradients")
    rounds: int = Field(2, ge=1, description="times that both factors are fitted to each other")
    damping: float = Field(0.01, ge=0, description="share of the mean diagonal that GPTQ adds to its Hessian")


class Metric:
    """A symmetric positive definite matrix ``[n, n]``, float64, that leans on the identity.

    Args:
        matrix: positive semi-definite; None is the identity.
        share: that share of its mean times the identity is mixed into it; a matrix of zeros becomes the identity.
        damping: of GPTQ under it.
    """

    def __init__(self, matrix: Tensor | None, size: int, share: float, damping: float) -> None:
        mean = 0.0 if matrix is None else float(matrix.diagonal().double().mean())
        self._plain = mean if share == 1 and mean > 0 else 1.0 if mean <= 0 else None
        self._damping = damping
        if self._plain is not None or matrix is None:
            self.matrix = (self._plain or 1.0) * torch.eye(size, dtype=torch.float64)
        else:
            self.matrix = (1 - share) * matrix.double()
            self.matrix.diagonal().add_(share * mean)

    @cached_property
    def lower(self) -> Tensor:
        """L with L L^T the matrix, ``[n, n]``, lower triangular; computed when it is first asked for."""
        if self._plain is not None:
            return cast(Tensor, self.matrix / self._plain**0.5)
        return lower_root(self.matrix, 1e-12 * float(self.matrix.diagonal().sum()))

    @cached_property
    def feedback(self) -> Feedback:
        """For GPTQ of rows ``[r, n]``."""
        return Feedback(self.matrix, self._damping)


def directions(
    weight: Tensor, inputs: Metric, outputs: Metric, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors ``[out, r]``, squared singular values ``[k]``, right vectors ``[r, in]`` in both metrics.

    Both are vectors of D itself: ``left @ diag(values ** 0.5) @ right`` is D at full rank.
    """
    sided = outputs.lower.T @ weight @ inputs.lower
    tall = sided.shape[0] > sided.shape[1]
    gram = sided.T @ sided if tall else sided @ sided.T
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :most]
    sizes = values[: vectors.shape[1]].sqrt().clamp(min=1e-300)
    if tall:
        left, right = (sided @ vectors) / sizes, vectors.T
    else:
        left, right = vectors, (vectors.T @ sided) / sizes[:, None]
    return (
        torch.linalg.solve_triangular(outputs.lower.T, left, upper=True),
        values,
        torch.linalg.solve_triangular(inputs.lower, right, upper=False, left=False),
    )


@cache
def losses(bits: tuple[int, ...]) -> dict[int, float]:
    """The share of a direction that is lost where both its factors have so many bits; none is all of it.

    Read off the quantizer, on normal numbers.
    """
    numbers = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = {0: 1.0}
    for count in bits:
        error = (round_to_nearest(numbers, spec_of(count)).dense().double() - numbers).square().mean()
        left = 1 - float(error / numbers.square().mean())
        found[count] = 1 - left**2
    return found


def spec_of(bits: int) -> GridSpec:
    """The levels of a factor."""
    return GridSpec(bits=bits, group=None, levels=Levels.MIDRISE, fitted=True)


def cost_of(shape: tuple[int, int], bits: int, rank: int = 1) -> int:
    """Bits of a group of directions as it is stored."""
    spec = spec_of(bits)
    return spec.stored_bits(rank, shape[0]) + spec.stored_bits(rank, shape[1]) if rank else 0


Plans = dict[str, dict[int, int]]


def plans_of(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], total: int, bits: tuple[int, ...]
) -> Plans:
    """How many directions of each matrix have how many bits: the least estimated error within ``total`` bits.

    Raises:
        BudgetError: not one direction fits.
    """
    share = losses(bits)
    choices = sorted(share)
    lost = torch.tensor([share[b] for b in choices], dtype=torch.float64)
    each = {
        name: torch.tensor([float(cost_of(shapes[name], b)) if b else 0.0 for b in choices], dtype=torch.float64)
        for name in spectra
    }
    estimates = {name: spectrum[:, None] * lost for name, spectrum in spectra.items()}

    def at(price: float) -> Plans:
        found: Plans = {}
        for name, estimate in estimates.items():
            best = (estimate + price * each[name]).argmin(1).where(spectra[name] > 0, 0)
            counts = torch.bincount(best, minlength=len(choices)).tolist()
            found[name] = {b: n for b, n in zip(choices, counts, strict=True) if b and n}
        return found

    def cost(plans: Plans) -> int:
        return sum(cost_of(shapes[name], b, n) for name, plan in plans.items() for b, n in plan.items())

    largest = max((float(s[0]) for s in spectra.values() if len(s)), default=0.0)
    if largest <= 0:
        return {name: {} for name in spectra}
    high = largest  # a price at which nothing is bought: every direction costs more than one bit
    low = high * 1e-18
    if cost(at(low)) <= total:
        return at(low)
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if cost(at(middle)) > total else (low, middle)
    plans = at(high)
    if not any(plans.values()):
        least = min(cost_of(shape, min(bits)) for shape in shapes.values())
        raise BudgetError(f"default: {total:,} bits are too few for one direction, which needs {least:,}")
    return plans


def compress(task: DeltaTask, options: DefaultOptions) -> None:
    """Gradients, spectra, the price, and then block by block."""
    layers = task.layers
    if task.store.complete(layers):
        return
    gradients = _gradients(task, options)
    spectra = BlockStore(task.folder("spectra", [options.inputs, options.outputs]))
    sites = {site.name: site for layer in range(layers) for site in task.sites(layer)}
    if not spectra.complete(layers):
        with task.reporter.stage("spectra of the delta", layers * len(task.tokens)) as tick:
            for layer, metrics in _metrics(task, spectra, gradients, options, tick):
                own = [site for site in sites.values() if site.layer == layer]
                found = {site.name: directions(_exact(task, site), *metrics(site), 1)[1] for site in own}
                spectra.write(layer, found)
    known = {name: spectrum for layer in range(layers) for name, spectrum in spectra.read(layer).items()}
    shapes = {name: (site.out_features, site.in_features) for name, site in sites.items()}
    plans = plans_of(known, shapes, task.total, options.bits)
    with task.reporter.stage("quantize directions", layers * len(task.tokens)) as tick:
        for layer, metrics in _metrics(task, task.store, gradients, options, tick):
            own = [site for site in sites.values() if site.layer == layer]
            forms = {s.name: quantized(_exact(task, s), plans[s.name], *metrics(s), options.rounds) for s in own}
            task.store.save(layer, forms)


def _exact(task: DeltaTask, site: Site) -> Tensor:
    return task.subject.weight(site).cpu().double()


def quantized(delta: Tensor, plan: Mapping[int, int], inputs: Metric, outputs: Metric, rounds: int = 2) -> Form:
    """The delta ``[out, in]`` of one matrix with so many directions of so many bits."""
    rest = delta.double()
    groups = []
    for bits in sorted(plan, reverse=True):
        group = _group(rest, plan[bits], bits, inputs, outputs, rounds)
        left, right = group.factors()
        rest = rest - left.double() @ right.double()
        groups.append(group)
    return LowRank(tuple(groups), (delta.shape[0], delta.shape[1]))


def _group(rest: Tensor, rank: int, bits: int, inputs: Metric, outputs: Metric, rounds: int) -> Group:
    """The leading directions of what is left, both factors quantized and fitted to each other."""
    spec = spec_of(bits)
    _, _, wanted = directions(rest, inputs, outputs, rank)
    left: QuantizedMatrix | None = None
    for _ in range(rounds):
        right = gptq(wanted, inputs.feedback, spec)
        left = gptq(_fitted(rest.T, right.dense().double(), inputs.matrix), outputs.feedback, spec)
        wanted = _fitted(rest, left.dense().double(), outputs.matrix)
    assert left is not None  # there is one round at least
    return Group(left.transposed(), right)


def _fitted(target: Tensor, vectors: Tensor, metric: Tensor) -> Tensor:
    """``[r, n]``: what ``vectors.T @`` it is nearest to ``target`` ``[m, n]`` under a metric on the m rows.

    ``vectors`` are ``[r, m]``, the metric ``[m, m]``.
    """
    sided = vectors @ metric
    inner = sided @ vectors.T
    inner.diagonal().add_(1e-9 * float(inner.diagonal().mean()) or 1.0)
    found: Tensor = torch.linalg.solve(inner, sided @ target)
    return found


def _gradients(task: DeltaTask, options: DefaultOptions) -> StatisticStore | None:
    """Output metrics on disk; None where the identity is all that is asked for."""
    if options.outputs == 1:
        return None
    tokens = task.tokens[: task.calibration.gradient_sequences]
    store = StatisticStore(task.folder("gradient", None), GRADIENT)
    subject = task.subject
    estimate_gradients(
        store, GRADIENT, subject.model, subject.structure, tokens, task.calibration, task.reporter, task.seed
    )
    return store


# metrics(site) -> of its inputs, of its outputs.
MetricsOf = Callable[[Site], tuple[Metric, Metric]]


def _metrics(
    task: DeltaTask, done: BlockStore, gradients: StatisticStore | None, options: DefaultOptions, tick: Tick
) -> Iterator[tuple[int, MetricsOf]]:
    """The blocks that ``done`` does not have, each with the metrics of its matrices on the fine-tuned model's text."""
    subject, cpu = task.subject, torch.device("cpu")
    walk = input_walk(subject.model, subject.structure, task.tokens, task.calibration.batch)
    try:
        while walk.layer < task.layers:
            first = walk.layer
            if done.has(first):
                walk.advance(1, tick=tick)
                continue
            for layer, inputs in enumerate(collect(walk, (MOMENTS,), task.calibration.groups, tick), first):
                if not done.has(layer):
                    yield layer, _of_block(inputs, {} if gradients is None else gradients.get(layer, cpu), options)
    finally:
        walk.close()


def _of_block(
    inputs: Mapping[str, SiteStatistics], outputs: Mapping[str, Tensor], options: DefaultOptions
) -> MetricsOf:
    shared: dict[str, Metric] = {}

    def metrics(site: Site) -> tuple[Metric, Metric]:
        group = site.input_group
        if group not in shared:
            moment = inputs[group][MOMENTS].second_moment.cpu()
            shared[group] = Metric(moment, site.in_features, options.inputs, options.damping)
        own = outputs.get(site.name)
        return shared[group], Metric(own, site.out_features, options.outputs, options.damping)

    return metrics


METHOD = DeltaMethod(
    name="default",
    paper="",
    summary="ours: directions in the two-sided metric, bits and ranks by one price over all matrices",
    compress=compress,
    options=DefaultOptions,
)
