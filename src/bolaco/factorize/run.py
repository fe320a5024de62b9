"""Statistics and factors of a whole model, block by block; several methods share one pass over the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bolaco.data.settings import Calibration
from bolaco.factorize.method import ChosenMethod
from bolaco.factorize.solver import Factors, InputMetric
from bolaco.factorize.store import FactorStore, gathered
from bolaco.models.structure import Site
from bolaco.models.subject import Subject
from bolaco.parallel import team
from bolaco.parallel.spread import Piece, spread
from bolaco.progress import Reporter
from bolaco.statistics.forward import collect, input_walk
from bolaco.statistics.statistic import SiteStatistics
from bolaco.statistics.stored import StatisticStore, site_statistics
from bolaco.work.pages import release


@dataclass(frozen=True)
class FactorJob:
    """One method's share of a pass.

    Attributes:
        method: what is computed.
        subject: what is factored; its model is in evaluation mode, and the same in all jobs of a pass.
        store: where it goes.
        top: largest rank of each matrix, by site name; matrices not named, or at 0, are not factored.
        statistics: what the method needs that is on disk, estimated already.
    """

    method: ChosenMethod
    subject: Subject
    store: FactorStore
    top: Mapping[str, int]
    statistics: Sequence[StatisticStore] = ()


def factorize(
    tokens: Tensor,
    jobs: Sequence[FactorJob],
    settings: Calibration,
    reporter: Reporter,
    cache_file: Path | None = None,
) -> None:
    """Computes the factors of every block that a job's store does not have yet.

    Args:
        tokens: ``[sequences, length]`` of calibration text; not looked at if no method asks for statistics of inputs.
        jobs: methods, and where their factors go.
        settings: batch and groups of the statistics.
        reporter: where progress goes.
        cache_file: keep hidden states there instead of in memory.

    Raises:
        NonFiniteError: naming the block and the input, or the matrix.
    """
    jobs = [job for job in jobs if not team.agreed(job.store.complete(job.subject.structure.num_layers))]
    if not jobs:
        return
    first = jobs[0].subject
    layers = range(first.structure.num_layers)
    wanted = list(dict.fromkeys(kind for job in jobs for kind in job.method.method.inputs))
    if not wanted:
        with reporter.stage("factorize", len(layers)) as tick:
            for layer in layers:
                for job in jobs:
                    if not team.agreed(job.store.has(layer)):
                        job.store.save(layer, _of_block(layer, job, {}))
                release(first.structure.block_modules(first.model)[layer].parameters())
                tick(1)
        return
    walk = input_walk(first.model, first.structure, tokens, settings.batch, cache_file)
    try:
        with reporter.stage("calibrate and factorize", len(layers) * walk.sequences) as tick:
            while walk.layer < len(layers):
                first_layer = walk.layer
                if team.agreed(all(job.store.has(first_layer) for job in jobs)):
                    walk.advance(1, tick=tick)
                    continue
                for layer, inputs in enumerate(collect(walk, wanted, settings.groups, tick), first_layer):
                    for job in jobs:
                        if not team.agreed(job.store.has(layer)):
                            job.store.save(layer, _of_block(layer, job, inputs), _tokens(layer, job, inputs))
    finally:
        walk.close()


def _tokens(layer: int, job: FactorJob, inputs: Mapping[str, SiteStatistics]) -> dict[str, int]:
    """Tokens that each expert of a block was sent, by site name."""
    found = {}
    for site in (member for unit in job.subject.structure.of_layer(layer) for member in unit.members):
        count = inputs[site.input_group].tokens if site.input_group in inputs else None
        if site.expert is not None and count is not None:
            found[site.name] = count
    return found


def _of_block(layer: int, job: FactorJob, inputs: Mapping[str, SiteStatistics]) -> dict[str, Factors]:
    """Factors of the matrices of one block; ``inputs`` has the statistics of each input group.

    Ranks share the matrices; the first one gets all factors, the others their own.
    """
    sites = [site for site in job.subject.structure.units if site.layer == layer and job.top.get(site.name, 0) > 0]
    if team.count() == 1:
        return _of_sites(layer, sites, job, inputs)
    given = spread([_piece(site) for site in sites], team.count())
    own = [site for site, rank in zip(sites, given, strict=True) if rank == team.rank()]
    return gathered(team.each(lambda: _of_sites(layer, own, job, inputs)))


def _piece(site: Site) -> Piece:
    """What a matrix costs: an eigenproblem of its smaller side, and products; a tall one shares a root of its input."""
    out, inside = site.out_features, site.in_features
    small = min(out, inside)
    root = inside**3 if out > inside else 0
    return Piece(10 * small**3 + 4 * out * inside * max(out, inside), site.input_group if root else None, root)


def _of_sites(
    layer: int, sites: Sequence[Site], job: FactorJob, inputs: Mapping[str, SiteStatistics]
) -> dict[str, Factors]:
    """Factors of some matrices of a block."""
    subject = job.subject
    device: torch.device = subject.model.device
    stored = site_statistics(layer, sites, job.statistics, device)
    metrics: dict[str, InputMetric] = {}
    factors: dict[str, Factors] = {}
    for site in sites:
        group = site.input_group
        own = SiteStatistics({kind: inputs[group][kind] for kind in job.method.method.inputs})
        if group not in metrics:
            metrics[group] = job.method.metric(own)
        known = own.with_values(stored[site.name].values)
        factors[site.name] = job.method.prepare(subject.weight(site), metrics[group], known, job.top[site.name])
    return factors
