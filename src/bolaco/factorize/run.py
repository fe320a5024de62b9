"""Statistics and factors of a whole model, block by block; several methods share one pass over the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from bolaco.factorize.method import Method
from bolaco.factorize.solver import Factors, InputMetric
from bolaco.factorize.store import FactorStore
from bolaco.models.structure import Structure
from bolaco.progress import Reporter
from bolaco.recipe import Calibration
from bolaco.statistics import collect
from bolaco.statistics.collect import BlockWalk
from bolaco.statistics.moments import Moments
from bolaco.statistics.site import LossStatistics, SiteStatistics, of_members


@dataclass(frozen=True)
class FactorJob:
    """One method's share of a pass.

    Attributes:
        method: what is computed.
        store: where it goes.
        top: largest rank of each matrix, by site name; matrices not named, or at 0, are not factored.
        losses: what the method needs of the loss gradients, estimated already.
    """

    method: Method
    store: FactorStore
    top: Mapping[str, int]
    losses: LossStatistics

    def done(self, layers: int) -> bool:
        """Whether there is nothing left to do."""
        return all(self.store.has(layer) for layer in range(layers))


def factorize(
    model: PreTrainedModel,
    structure: Structure,
    tokens: Tensor,
    jobs: Sequence[FactorJob],
    settings: Calibration,
    reporter: Reporter,
    cache_file: Path | None = None,
) -> None:
    """Computes the factors of every block that a job's store does not have yet.

    Args:
        model: the model, in evaluation mode.
        structure: its structure.
        tokens: ``[sequences, length]`` of calibration text; not looked at if no method asks for moments.
        jobs: methods, and where their factors go.
        settings: batch and groups of the statistics.
        reporter: where progress goes.
        cache_file: keep hidden states there instead of in memory.

    Raises:
        NonFiniteError: naming the block and the input, or the matrix.
    """
    layers = range(structure.num_layers)
    jobs = [job for job in jobs if not job.done(len(layers))]
    if not jobs:
        return
    if not any(job.method.moments for job in jobs):
        with reporter.stage("factorize", len(layers)) as tick:
            for layer in layers:
                for job in jobs:
                    if not job.store.has(layer):
                        job.store.save(layer, _of_block(model, structure, layer, job, {}))
                tick(1)
        return
    magnitudes = any(job.method.magnitudes for job in jobs)
    walk = BlockWalk(model, structure, tokens, settings.batch, cache_file)
    try:
        with reporter.stage("calibrate and factorize", len(layers) * len(tokens)) as tick:
            for layer in layers:
                waiting = [job for job in jobs if not job.store.has(layer)]
                if not waiting:
                    walk.advance(tick=tick)
                    continue
                moments = collect(walk, settings.groups, tick, magnitudes)
                for job in waiting:
                    job.store.save(layer, _of_block(model, structure, layer, job, moments))
    finally:
        walk.close()


def _of_block(
    model: PreTrainedModel, structure: Structure, layer: int, job: FactorJob, moments: Mapping[str, Moments]
) -> dict[str, Factors]:
    of_loss = job.losses.of_layer(layer, model.device)
    metrics: dict[str, InputMetric] = {}
    factors: dict[str, Factors] = {}
    for site in structure.of_layer(layer):
        top = job.top.get(site.name, 0)
        if top == 0:
            continue
        group = site.input_group
        known = moments[group] if job.method.moments else None
        if group not in metrics:
            metrics[group] = InputMetric(None) if known is None else job.method.metric(known)
        statistics = SiteStatistics(known, **of_members(site, of_loss))
        factors[site.name] = job.method.prepare(structure.weight(model, site), metrics[group], statistics, top)
    return factors
