"""Error-aware fitting: every matrix of a block on the inputs it has in the compressed model.

Matrices are fitted in the order they run (q, k, v; o; gate, up; down), each on the inputs that the compressed blocks
before it and the fitted matrices of its own block give, towards the original matrix's outputs on the original inputs
(AA-SVD, arXiv 2604.02119). The metric is the method's own. Dense matrices are corrected too, at no cost in parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from bolaco.errors import NonFiniteError
from bolaco.factorize.method import ChosenMethod
from bolaco.factorize.solver import InputMetric, corrected
from bolaco.layers import put_module
from bolaco.models.structure import Site
from bolaco.models.subject import Subject
from bolaco.models.walk import BlockRunner
from bolaco.statistics.drift import Drift, DriftMoments
from bolaco.statistics.moments import MOMENTS, group_runs
from bolaco.statistics.statistic import SiteStatistics
from bolaco.storage.block import linear, low_rank_linear, place_in_block
from bolaco.storage.budget import Ranks


class BlockFit:
    """Fits the matrices of one block after the other.

    Args:
        runner: calls blocks; its model is the original.
        subject: what was factored.
        method: the method that made the factors; gives metric and solution.
        ranks: rank of every matrix.
        groups: groups of the pooled covariance.
        drift: share of the change of the inputs that is made up for (1: arXiv 2604.02119; 0.25: arXiv 2501.19090).
        damping: share of the inputs' mean eigenvalue added before the drift is divided by them.
    """

    def __init__(
        self,
        runner: BlockRunner,
        subject: Subject,
        method: ChosenMethod,
        ranks: Ranks,
        groups: int,
        drift: float,
        damping: float,
    ) -> None:
        self.runner, self.subject, self.method, self.ranks = runner, subject, method, ranks
        self.groups, self.drift, self.damping = min(groups, len(runner.tokens)), drift, damping

    def run(
        self,
        layer: int,
        block: nn.Module,
        original: Tensor,
        compressed: Tensor,
        stored: Mapping[str, SiteStatistics],
        tick: Callable[[int], Any] | None = None,
    ) -> None:
        """Replaces the matrices of ``block`` by fitted ones.

        Args:
            layer: which block.
            block: the compressed block, as :func:`bolaco.storage.block.compressed_block` makes it.
            original: ``[sequences, length, d]``, the original block's inputs.
            compressed: the compressed block's.
            stored: of each matrix, the statistics that are on disk.
            tick: called with the sequences done, once per shared input.
        """
        groups: dict[str, list[Site]] = {}
        structure = self.subject.structure
        for site in structure.of_layer(layer):
            # The router of the compressed model can send an expert other tokens: there are no pairs to compare.
            if site.expert is None:
                groups.setdefault(site.input_group, []).append(site)
        for sites in groups.values():
            drift, own = self._inputs(sites[0], block, original, compressed, tick)
            metric = self.method.metric(own)
            for site in sites:
                fitted = self._fitted(site, drift, metric, own.with_values(stored[site.name].values))
                put_module(block, place_in_block(structure, site), fitted)

    def _inputs(
        self,
        site: Site,
        block: nn.Module,
        original: Tensor,
        compressed: Tensor,
        tick: Callable[[int], Any] | None,
    ) -> tuple[Drift, SiteStatistics]:
        """How the inputs of some matrices differ, and the method's statistics of those of the compressed model."""
        device = self.runner.model.device
        moments = DriftMoments(site.in_features, self.groups, device)
        wanted = self.method.method.inputs
        # The moments of the compressed model's inputs are part of the drift.
        others = {
            kind: kind.accumulator(site.in_features, self.groups, device) for kind in wanted if kind is not MOMENTS
        }
        for rows in self.runner.slices:
            left = self.runner.input_of(site, original[rows], rows=rows)
            right = self.runner.input_of(site, compressed[rows], block, rows)
            assert left is not None  # experts are not fitted
            assert right is not None
            for group, chosen in group_runs(rows, self.groups, len(original)):
                try:
                    moments.update(left[chosen], right[chosen], group)
                    for accumulator in others.values():
                        accumulator.update(right[chosen], group)
                except NonFiniteError as error:
                    raise NonFiniteError(f"{site.name}, compressed model's input: {error}") from None
            if tick:
                tick(rows.stop - rows.start)
        drift = moments.finalize()
        own = {kind: drift.inputs if kind is MOMENTS else others[kind].finalize() for kind in wanted}
        return drift, SiteStatistics(own)

    def _fitted(self, site: Site, drift: Drift, metric: InputMetric, statistics: SiteStatistics) -> nn.Module:
        centred = self.method.method.centred
        weight, bias = self.subject.weight(site), self.subject.bias(site)
        shift, second = (
            (drift.covariance, drift.inputs.covariance)
            if centred
            else (drift.second_moment, drift.inputs.second_moment)
        )
        target = corrected(weight, self.drift * shift, second, self.damping)
        if centred:
            # What the mean output should be, beyond what the target gives at the mean of the compressed inputs.
            mean = drift.inputs.mean
            missing = weight.double() @ (mean + drift.mean) - target.double() @ mean
            bias = missing if bias is None else bias.double() + missing
        rank = self.ranks.get(site.name)
        if rank is None:
            return linear(target, bias)
        factors = self.method.prepare(target, metric, statistics, rank)
        return low_rank_linear(factors.expand_t.T, factors.reduce, factors.bias(rank, bias))
