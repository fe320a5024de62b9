"""Refinement of the whole decoder, block by block: its matrices are fitted, then the block is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bolaco.data.settings import Calibration
from bolaco.factorize.method import ChosenMethod
from bolaco.factorize.store import FactorStore
from bolaco.models.subject import Subject
from bolaco.models.walk import BlockRunner, cache_tensor
from bolaco.progress import Reporter
from bolaco.refine.fit import BlockFit
from bolaco.refine.settings import Refinement
from bolaco.refine.train import train_block
from bolaco.statistics.stored import StatisticStore, site_statistics
from bolaco.storage.block import compressed_block, restored_block, trainable_copy
from bolaco.storage.budget import Ranks
from bolaco.work.blockstore import BlockStore


class Refiner:
    """Carries the hidden states of the original and of the compressed model side by side through the decoder.

    Args:
        subject: what was factored; its model is the original, which is not changed.
        factors: factors of every matrix that has a rank.
        ranks: the allocation.
        tokens: ``[sequences, length]``, the calibration text.
        method: the method that made the factors.
        settings: what is done.
        calibration: batch and groups; whether the two sets of hidden states are held in memory or beside the result.
        statistics: what the method needs that is on disk; only used for fitting.
        seed: of the order of the sequences.
    """

    def __init__(
        self,
        subject: Subject,
        factors: FactorStore,
        ranks: Ranks,
        tokens: Tensor,
        method: ChosenMethod,
        settings: Refinement,
        calibration: Calibration,
        statistics: Sequence[StatisticStore] = (),
        seed: int = 0,
    ) -> None:
        self.subject, self.factors, self.ranks = subject, factors, ranks
        self.settings, self.calibration, self.statistics, self.seed = settings, calibration, statistics, seed
        structure = subject.structure
        self.runner = BlockRunner(subject.model, structure, tokens[: settings.sequences], calibration.batch)
        self.fit = BlockFit(self.runner, subject, method, ranks, calibration.groups, settings.drift, settings.damping)

    def run(
        self, store: BlockStore, reporter: Reporter, on_block: Callable[[int, list[float]], Any] | None = None
    ) -> None:
        """Refines every block that ``store`` does not hold yet, and puts it there as a state dict.

        ``on_block`` is called with the layer and the losses of its training steps, before the block is stored.

        Raises:
            NonFiniteError: a block's output or loss with NaN or infinity.
            ResumeError: a stored block is damaged.
        """
        layers = range(self.subject.structure.num_layers)
        if store.complete(len(layers)):
            return
        on_disk = self.calibration.cache == "disk"
        files = [store.folder / f"{name}.cache" if on_disk else None for name in ("original", "compressed")]
        original = self.runner.embed(files[0])
        compressed = cache_tensor(tuple(original.shape), original.dtype, files[1]).copy_(original)
        settings = self.settings
        per_block = 4 * len(original) * settings.fit + settings.steps + 2 * len(original)
        try:
            with reporter.stage("refine blocks", per_block * len(layers)) as tick:
                for layer in layers:
                    if store.has(layer):
                        block = stored_block(store, self.subject, layer)
                        self.runner.advance(layer, original)
                        tick(per_block - len(original))
                    else:
                        block, losses = self._refined(layer, original, compressed, tick)
                        if on_block and losses:
                            on_block(layer, losses)
                        store.write(layer, block.state_dict())
                    self.runner.advance(layer, compressed, block, tick=tick)
        finally:
            for file in files:
                _remove(file)

    def _refined(
        self, layer: int, original: Tensor, compressed: Tensor, tick: Callable[[int], Any]
    ) -> tuple[nn.Module, list[float]]:
        """The block as it will be, and the losses of its training; ``original`` is moved past it."""
        factors = self.factors.load(layer) if self.factors.has(layer) else {}
        block = compressed_block(self.subject, layer, factors, self.ranks)
        block = trainable_copy(self.subject, layer, block)
        settings, structure = self.settings, self.subject.structure
        if settings.fit:
            sites, device = structure.of_layer(layer), self.subject.model.device
            stored = site_statistics(layer, sites, self.statistics, device)
            self.fit.run(layer, block, original, compressed, stored, tick)
        self.runner.advance(layer, original, tick=tick)
        if not settings.steps:
            return block, []
        return block, train_block(self.runner, layer, block, compressed, original, settings, self.seed, tick)


def _remove(file: Path | None) -> None:
    if file is not None:
        file.unlink(missing_ok=True)


def stored_block(store: BlockStore, subject: Subject, layer: int) -> nn.Module:
    """A refined block.

    Raises:
        ResumeError: missing, damaged, or of another model.
    """
    state = store.read(layer)
    try:
        return restored_block(subject, layer, state)
    except (RuntimeError, KeyError) as error:
        raise store.damaged(layer, error) from error
