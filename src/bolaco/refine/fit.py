"""Error-aware fitting: every matrix of a block on the inputs it has in the compressed model.

Matrices are fitted in the order they run (q, k, v; o; gate, up; down), each on the inputs that the compressed blocks
before it and the fitted matrices of its own block give, towards the original matrix's outputs on the original inputs
(AA-SVD, arXiv 2604.02119). The metric is the method's own. Dense matrices are corrected too, at no cost in parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from bolaco.allocate.budget import Ranks
from bolaco.compressed import linear, low_rank_linear, place
from bolaco.errors import NonFiniteError
from bolaco.factorize.method import Method
from bolaco.factorize.solver import InputMetric, corrected
from bolaco.models.structure import Site, Structure
from bolaco.statistics.blocks import BlockRunner
from bolaco.statistics.moments import Drift, DriftMoments, group_runs
from bolaco.statistics.site import SiteStatistics


class BlockFit:
    """Fits the matrices of one block after the other.

    Args:
        runner: calls blocks; its model is the original.
        structure: the model's structure.
        method: the method that made the factors; gives metric and solution.
        ranks: rank of every matrix.
        groups: groups of the pooled covariance.
        drift: share of the change of the inputs that is made up for (1: arXiv 2604.02119; 0.25: arXiv 2501.19090).
        damping: share of the inputs' mean eigenvalue added before the drift is divided by them.
    """

    def __init__(
        self,
        runner: BlockRunner,
        structure: Structure,
        method: Method,
        ranks: Ranks,
        groups: int,
        drift: float,
        damping: float,
    ) -> None:
        self.runner, self.structure, self.method, self.ranks = runner, structure, method, ranks
        self.groups, self.drift, self.damping = min(groups, len(runner.tokens)), drift, damping

    def run(
        self,
        layer: int,
        block: nn.Module,
        original: Tensor,
        compressed: Tensor,
        losses: Mapping[str, Mapping[str, Tensor]] | None = None,
        tick: Callable[[int], Any] | None = None,
    ) -> None:
        """Replaces the matrices of ``block`` by fitted ones.

        Args:
            layer: which block.
            block: the compressed block, as :func:`bolaco.compressed.compressed_block` makes it.
            original: ``[sequences, length, d]``, the original block's inputs.
            compressed: the compressed block's.
            losses: by matrix, the fields of its :class:`SiteStatistics` that come from loss gradients.
            tick: called with the sequences done, once per shared input.
        """
        groups: dict[str, list[Site]] = {}
        for site in self.structure.of_layer(layer):
            groups.setdefault(site.input_group, []).append(site)
        for sites in groups.values():
            drift = self._drift(sites[0], block, original, compressed, tick)
            metric = self.method.metric(drift.inputs)
            for site in sites:
                statistics = SiteStatistics(drift.inputs, **(losses or {}).get(site.name, {}))
                place(self.structure, block, site, self._fitted(site, drift, metric, statistics))

    def _drift(
        self,
        site: Site,
        block: nn.Module,
        original: Tensor,
        compressed: Tensor,
        tick: Callable[[int], Any] | None,
    ) -> Drift:
        moments = DriftMoments(site.in_features, self.groups, self.runner.model.device, self.method.magnitudes)
        for rows in self.runner.slices:
            left = self.runner.input_of(site, original[rows])
            right = self.runner.input_of(site, compressed[rows], block)
            for group, chosen in group_runs(rows, self.groups, len(original)):
                try:
                    moments.update(left[chosen], right[chosen], group)
                except NonFiniteError as error:
                    raise NonFiniteError(f"{site.name}, compressed model's input: {error}") from None
            if tick:
                tick(rows.stop - rows.start)
        return moments.finalize()

    def _fitted(self, site: Site, drift: Drift, metric: InputMetric, statistics: SiteStatistics) -> nn.Module:
        model, method = self.runner.model, self.method
        weight, bias = self.structure.weight(model, site), self.structure.bias(model, site)
        shift, second = (
            (drift.covariance, drift.inputs.covariance)
            if method.centred
            else (drift.second_moment, drift.inputs.second_moment)
        )
        target = corrected(weight, self.drift * shift, second, self.damping)
        if method.centred:
            # What the mean output should be, beyond what the target gives at the mean of the compressed inputs.
            mean = drift.inputs.mean
            missing = weight.double() @ (mean + drift.mean) - target.double() @ mean
            bias = missing if bias is None else bias.double() + missing
        rank = self.ranks.get(site.name)
        if rank is None:
            return linear(target, bias)
        factors = method.prepare(target, metric, statistics, rank)
        return low_rank_linear(factors.expand_t.T, factors.reduce, factors.bias(rank, bias))
