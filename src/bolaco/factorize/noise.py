"""What codes of some bits would add to the error of a matrix, read off the quantizer before ranks are known.

GPTQ treats the rows of a matrix one by one, so a sample of rows says what all of them would lose. Of an input factor
these are rows for components from the first to the last, and the error of those between is interpolated; of an output
factor and of the dense matrix they are rows of all sizes of output gradients. Errors are under the second moment of the
input, and under the output metric where the method has one, as shares of what the matrix gives: of each component for
an input factor, of the whole for the others. That the output factor makes up for some of the input factor's error is
not counted, so that the error of factors is estimated from above.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bolaco.factorize.solver import Factors
from bolaco.factorize.store import FactorStore
from bolaco.models.structure import Site
from bolaco.models.subject import Subject
from bolaco.quantize.gptq import Feedback, gptq
from bolaco.quantize.settings import WHOLE, grid_spec
from bolaco.statistics.forward import InputWalk, collect
from bolaco.statistics.gradient import GRADIENT
from bolaco.statistics.moments import MOMENTS, Moments
from bolaco.statistics.statistic import SiteStatistics
from bolaco.statistics.stored import StatisticStore, site_statistics
from bolaco.work.blockstore import BlockStore

# Rows of a matrix that are quantized.
_ROWS = 24
_TINY = 1e-300


@dataclass(frozen=True)
class Noise:
    """What codes of some bits add to the squared error of one matrix.

    Attributes:
        components: ``[rank]``, of each component of the factored matrix, a share of its squared size.
        dense: of the dense matrix, a share of the squared size of its outputs.
        energy: that squared size.
    """

    components: Tensor
    dense: float
    energy: float


def matrix_noise(
    weight: Tensor,
    factors: Factors | None,
    inputs: Feedback,
    output: Tensor | None,
    bits: Sequence[int],
    group: int,
    damping: float,
) -> dict[int, Noise]:
    """The noise of one matrix ``[out, in]`` at each of some bits; computed in float64.

    Args:
        weight: the matrix.
        factors: of it; None if it is not factored.
        inputs: its inputs.
        output: the output metric ``[out, out]``; None for the identity.
        bits: of a code.
        group: numbers of a row that share a scale.
        damping: of the Hessian of the output factor.
    """
    weight, moment = weight.double(), inputs.hessian
    metric = torch.eye(len(weight), dtype=torch.float64, device=weight.device) if output is None else output.double()
    seen = weight @ moment
    energy = float(((metric @ seen) * weight).sum())
    rows = _spread(metric.diagonal())
    first, second, sizes = None, None, None
    at = torch.empty(0, dtype=torch.int64)
    if factors is not None:
        first = factors.reduce.double()
        lengths = factors.expand_t.double().norm(dim=1)
        lengths = lengths.where(lengths > 0, 1.0)
        first, second = first * lengths[:, None], (factors.expand_t.double() / lengths[:, None]).T
        at = torch.linspace(0, len(first) - 1, min(_ROWS, len(first))).round().long().unique()
        sizes = ((first[at] @ moment) * first[at]).sum(1).clamp(min=_TINY)
        reduced = first @ moment @ first.T
        after = Feedback((reduced + reduced.T) / 2, damping)
        whole = max(float(((metric @ second @ reduced) * second).sum()), _TINY)
    found = {}
    for width in bits:
        if width == WHOLE:
            none = torch.zeros(0 if first is None else len(first), dtype=torch.float64)
            found[width] = Noise(none, 0.0, energy)
            continue
        spec = grid_spec(width, group)
        together = weight[rows] if first is None else torch.cat([weight[rows], first[at]])
        errors = inputs.error(gptq(together, inputs, spec).dense().double() - together)
        dense = float((metric.diagonal()[rows] * errors[: len(rows)]).mean()) * len(weight) / max(energy, _TINY)
        components = torch.zeros(0, dtype=torch.float64)
        if first is not None and second is not None and sizes is not None:
            shares = (errors[len(rows) :] / sizes).clamp(min=1e-12).log()
            between = np.interp(np.arange(len(first)), at.cpu().numpy(), shares.cpu().numpy())
            lost = after.error(gptq(second[rows], after, spec).dense().double() - second[rows])
            rest = float((metric.diagonal()[rows] * lost).mean()) * len(weight) / whole
            components = torch.from_numpy(np.exp(between)) + rest
        found[width] = Noise(components, dense, energy)
    return found


def _spread(sizes: Tensor) -> Tensor:
    """Indices of some rows from the smallest to the largest size."""
    order = torch.argsort(sizes, stable=True)
    steps = (torch.arange(min(_ROWS, len(order))) + 0.5) * len(order) / min(_ROWS, len(order))
    return order[steps.long().to(order.device)]


class NoiseStore(BlockStore):
    """The noise of a model's matrices in one folder, by decoder block."""

    def put(self, layer: int, found: Mapping[str, Mapping[int, Noise]]) -> None:
        """Writes one block's, by site name and bits."""
        tensors: dict[str, Tensor] = {}
        for name, of_bits in found.items():
            for bits, noise in of_bits.items():
                tensors[f"{name}/{bits}/components"] = noise.components
                tensors[f"{name}/{bits}/shares"] = torch.tensor([noise.dense, noise.energy], dtype=torch.float64)
        self.write(layer, tensors)

    def all(self, layers: int) -> dict[int, dict[str, Noise]]:
        """All of them, by bits and site name.

        Raises:
            ResumeError: missing or damaged; names the file.
        """
        found: dict[int, dict[str, Noise]] = {}
        for layer in range(layers):
            values = self.read(layer)
            for key in values:
                name, bits, what = key.rsplit("/", 2)
                if what == "shares":
                    dense, energy = values[key].tolist()
                    found.setdefault(int(bits), {})[name] = Noise(values[f"{name}/{bits}/components"], dense, energy)
        return found


@dataclass(frozen=True)
class NoiseTask:
    """What is read off the quantizer.

    Attributes:
        subject: what was factored.
        factors: of its matrices.
        top: largest rank of each matrix that may be factored.
        statistics: what the method needs that is on disk.
        centred: whether factored matrices have a bias that takes the mean of an error.
        bits, group, damping: of the codes.
    """

    subject: Subject
    factors: FactorStore
    top: Mapping[str, int]
    statistics: Sequence[StatisticStore]
    centred: bool
    bits: Sequence[int]
    group: int
    damping: float

    def run(self, walk: InputWalk, store: NoiseStore, groups: int, tick: Callable[[int], Any] | None = None) -> None:
        """Fills a store, as far as it is not full, in one pass over a text."""
        layers = self.subject.structure.num_layers
        while walk.layer < layers:
            first = walk.layer
            if store.has(first):
                walk.advance(1, tick=tick)
                continue
            for layer, inputs in enumerate(collect(walk, [MOMENTS], groups, tick), first):
                if not store.has(layer):
                    store.put(layer, self.of_block(layer, inputs))

    def of_block(self, layer: int, inputs: Mapping[str, SiteStatistics]) -> dict[str, dict[int, Noise]]:
        """The noise of the matrices of one block by site name and bits; ``inputs`` are the moments by input group."""
        sites = self.subject.structure.of_layer(layer)
        stored = site_statistics(layer, sites, self.statistics, self.subject.model.device)
        factors = self.factors.load(layer) if self.factors.has(layer) else {}
        known: dict[tuple[str, bool], Feedback] = {}
        found = {}
        for site in sites:
            centred = self.centred or site.bias
            key = site.input_group, centred
            if key not in known:
                moments: Moments = inputs[site.input_group][MOMENTS]
                known[key] = Feedback(moments.covariance if centred else moments.second_moment, self.damping)
            values = stored[site.name].values if site.name in stored else {}
            found[site.name] = self._site(site, factors.get(site.name), known[key], values.get(GRADIENT))
        return found

    def _site(self, site: Site, factors: Factors | None, inputs: Feedback, output: Tensor | None) -> dict[int, Noise]:
        top = self.top.get(site.name, 0)
        cut = None
        if factors is not None and top > 0:
            cut = Factors(factors.expand_t[:top], factors.reduce[:top], factors.spectrum)
        weight = self.subject.weight(site)
        return matrix_noise(weight, cut, inputs, output, self.bits, self.group, self.damping)
