"""Statistics on disk, block by block."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.data.settings import Calibration
from bolaco.models.structure import Site, Structure, hidden_size
from bolaco.models.walk import in_files
from bolaco.parallel import team
from bolaco.progress import Reporter
from bolaco.statistics.backward import gradient_walk
from bolaco.statistics.statistic import GradientStatistic, SiteStatistics, Statistic, StoredStatistic
from bolaco.work.blockstore import BlockStore


class StatisticStore(BlockStore):
    """One statistic of a model's matrices in one folder."""

    def __init__(self, folder: Path, statistic: StoredStatistic) -> None:
        super().__init__(folder)
        self.statistic = statistic

    def put(self, layer: int, values: Mapping[str, Tensor]) -> None:
        """Writes the values of one block's matrices, by site name."""
        self.write(layer, {name: self.statistic.encode(value) for name, value in values.items()})

    def get(self, layer: int, device: torch.device) -> dict[str, Tensor]:
        """Reads them.

        Raises:
            ResumeError: missing or damaged; names the file.
        """
        try:
            return {name: self.statistic.decode(value.to(device)) for name, value in self.read(layer).items()}
        except ValueError as error:
            raise self.damaged(layer, error) from error


def site_statistics(
    layer: int, sites: Iterable[Site], stores: Iterable[StatisticStore], device: torch.device
) -> dict[str, SiteStatistics]:
    """What is stored of one block, by site name; of a stack, the statistics of its members stacked.

    Raises:
        ResumeError: missing or damaged; names the file.
    """
    found: dict[str, dict[Statistic[Any], Tensor]] = {site.name: {} for site in sites}
    for store in stores:
        values = store.get(layer, device)
        for site in sites:
            parts = [values[member.name] for member in site.members if member.name in values]
            if parts:
                found[site.name][store.statistic] = parts[0] if len(parts) == 1 else store.statistic.stack(parts)
    return {name: SiteStatistics(values) for name, values in found.items()}


def estimate_gradients(
    store: StatisticStore,
    statistic: GradientStatistic,
    model: PreTrainedModel,
    structure: Structure,
    tokens: Tensor,
    settings: Calibration,
    reporter: Reporter,
    seed: int = 0,
) -> None:
    """Estimates a statistic of loss gradients where the store is not complete; an earlier walk goes on where it was.

    Args:
        store: where it goes.
        statistic: what is estimated.
        model: the model, in evaluation mode.
        structure: its structure.
        tokens: ``[sequences, length]``.
        settings: sequences per pass, and whether block inputs are kept in memory or in files beside the result.
        reporter: where progress goes.
        seed: of sampled labels.

    Raises:
        NonFiniteError: a gradient with NaN or infinity; names the matrix.
    """
    layers = structure.num_layers
    if team.agreed(store.complete(layers)):
        shutil.rmtree(store.folder / "walk", ignore_errors=True)
        return
    place = BlockStore(store.folder / "walk")  # the gradient at the input of the last block that is finished
    finished = team.agreed([layer for layer in range(layers) if place.has(layer)])
    earlier = (finished[0], place.read(finished[0])["gradient"]) if finished else None
    on_disk = in_files(settings.cache, model, tokens, layers + 1)
    folder = store.folder / "inputs" if on_disk else None
    walk = gradient_walk(model, structure, tokens, settings.batch, statistic, seed, folder)
    with reporter.stage("loss gradients", (layers + 1) * len(walk.tokens)) as tick:
        for layer, found in walk.run(tick, earlier):
            gradient = walk.whole_gradient()
            store.put(layer, found)
            place.write(layer, {"gradient": gradient})
            if team.is_first():
                place.path(layer + 1).unlink(missing_ok=True)
    team.barrier()
    shutil.rmtree(place.folder, ignore_errors=True)


def stored_bytes(
    statistics: Iterable[StoredStatistic],
    model: PreTrainedModel,
    structure: Structure,
    tokens: Tensor,
    settings: Calibration,
) -> int:
    """What statistics take on disk, at most, while they are estimated on the tokens."""
    members = [member for site in structure.sites for member in site.members]
    wanted = tuple(statistics)
    size = 4 * sum(statistic.numbers(member) for statistic in wanted for member in members)
    if any(isinstance(statistic, GradientStatistic) for statistic in wanted):
        seen, layers = tokens[: settings.gradient_sequences], structure.num_layers + 1
        states = seen.numel() * hidden_size(model) * model.dtype.itemsize
        # Where the walk is, the place before while that is written, and perhaps the inputs of every block.
        size += states * (2 + (layers if in_files(settings.cache, model, seen, layers) else 0))
    return size
