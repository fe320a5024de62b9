"""The decoder compressed for good, block by block: fitted on its own inputs, then trained locally."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.allocate.budget import Ranks
from bolaco.blockstore import BlockStore
from bolaco.compressed import compressed_block, restored_block, trainable_copy
from bolaco.factorize.method import Method
from bolaco.factorize.store import FactorStore
from bolaco.models.structure import Structure
from bolaco.progress import Reporter
from bolaco.refine.fit import BlockFit
from bolaco.refine.train import train_block
from bolaco.statistics.blocks import BlockRunner, cache_tensor
from bolaco.statistics.site import LossStatistics

if TYPE_CHECKING:
    from bolaco.recipe import Recipe


class Refiner:
    """Carries the hidden states of the original and of the compressed model side by side through the decoder.

    Args:
        model: the original; not changed.
        structure: its structure.
        factors: factors of every matrix that has a rank.
        ranks: the allocation.
        tokens: ``[sequences, length]``, the calibration text.
        method: the method that made the factors.
        recipe: its sections ``refinement`` and ``calibration`` say what to do.
        losses: what the method needs of the loss gradients; only used for fitting.
        cache: folder for the two sets of hidden states; None holds them in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        factors: FactorStore,
        ranks: Ranks,
        tokens: Tensor,
        method: Method,
        recipe: Recipe,
        losses: LossStatistics | None = None,
        cache: Path | None = None,
    ) -> None:
        self.model, self.structure, self.factors, self.ranks = model, structure, factors, ranks
        self.recipe, self.losses, self.cache = recipe, losses, cache
        settings = recipe.refinement
        self.runner = BlockRunner(model, structure, tokens[: settings.sequences], recipe.calibration.batch)
        self.fit = BlockFit(
            self.runner, structure, method, ranks, recipe.calibration.groups, settings.drift, settings.damping
        )

    def run(
        self, store: BlockStore, reporter: Reporter, on_block: Callable[[int, list[float]], Any] | None = None
    ) -> None:
        """Refines every block that ``store`` does not hold yet, and puts it there as a state dict.

        ``on_block`` is called with the layer and the losses of its training steps, before the block is stored.

        Raises:
            NonFiniteError: a block's output or loss with NaN or infinity.
            ResumeError: a stored block is damaged.
        """
        layers = range(self.structure.num_layers)
        if all(store.has(layer) for layer in layers):
            return
        original = self.runner.embed(self._file("original"))
        compressed = cache_tensor(tuple(original.shape), original.dtype, self._file("compressed")).copy_(original)
        settings = self.recipe.refinement
        per_block = 4 * len(original) * settings.fit + settings.steps + 2 * len(original)
        try:
            with reporter.stage("refine blocks", per_block * len(layers)) as tick:
                for layer in layers:
                    if store.has(layer):
                        block = stored_block(store, self.model, self.structure, layer)
                        self.runner.advance(layer, original)
                        tick(per_block - len(original))
                    else:
                        block, losses = self._refined(layer, original, compressed, tick)
                        if on_block and losses:
                            on_block(layer, losses)
                        store.write(layer, block.state_dict())
                    self.runner.advance(layer, compressed, block, tick=tick)
        finally:
            for name in ("original", "compressed"):
                file = self._file(name)
                if file is not None:
                    file.unlink(missing_ok=True)

    def _file(self, name: str) -> Path | None:
        return None if self.cache is None else self.cache / f"{name}.cache"

    def _refined(
        self, layer: int, original: Tensor, compressed: Tensor, tick: Callable[[int], Any]
    ) -> tuple[nn.Module, list[float]]:
        """The block as it will be, and the losses of its training; ``original`` is moved past it."""
        factors = self.factors.load(layer) if self.factors.has(layer) else {}
        block = compressed_block(self.model, self.structure, layer, factors, self.ranks)
        block = trainable_copy(self.model, self.structure, layer, block)
        settings = self.recipe.refinement
        if settings.fit:
            losses = None if self.losses is None else self.losses.of_layer(layer, self.model.device)
            self.fit.run(layer, block, original, compressed, losses, tick)
        self.runner.advance(layer, original, tick=tick)
        if not settings.steps:
            return block, []
        return block, train_block(self.runner, layer, block, compressed, original, settings, self.recipe.seed, tick)


def stored_block(store: BlockStore, model: PreTrainedModel, structure: Structure, layer: int) -> nn.Module:
    """A refined block.

    Raises:
        ResumeError: missing, damaged, or of another model.
    """
    state = store.read(layer)
    try:
        return restored_block(model, structure, layer, state)
    except (RuntimeError, KeyError) as error:
        raise store.damaged(layer, error) from error
