"""Refinement of the whole decoder, block by block: its matrices are fitted, then the block is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bolaco.data.settings import Calibration
from bolaco.factorize.method import ChosenMethod
from bolaco.factorize.store import FactorStore
from bolaco.models.structure import Site
from bolaco.models.subject import Subject
from bolaco.models.walk import BlockRunner, cache_tensor, in_files
from bolaco.parallel import team
from bolaco.progress import Reporter
from bolaco.refine.ending import Ending
from bolaco.refine.fit import BlockFit
from bolaco.refine.loss import OutputLoss
from bolaco.refine.scales import scaled
from bolaco.refine.settings import Refinement
from bolaco.refine.train import BlockTrainer, Stretch, Training
from bolaco.statistics.statistic import BLOCK
from bolaco.statistics.stored import StatisticStore, site_statistics
from bolaco.storage.block import compressed_block, restored_block, trainable_copy
from bolaco.storage.budget import Ranks
from bolaco.work.blockstore import BlockStore


class Refiner:
    """Carries the hidden states of the original and of the compressed model side by side through the decoder.

    The original's are ahead, at the end of the window of blocks that is trained.

    Args:
        subject: what was factored; its model is the original, which is not changed.
        factors: factors of every matrix that has a rank.
        ranks: the allocation.
        tokens: ``[sequences, length]``, the calibration text.
        method: the method that made the factors.
        settings: what is done.
        calibration: batch and groups; whether the two sets of hidden states are held in memory or beside the result.
        statistics: what the method needs that is on disk; used for fitting, and for the metric of the training.
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
        self.layers = structure.num_layers
        self.runner = BlockRunner(
            subject.model, structure, tokens[: settings.sequences], calibration.batch, shared=True
        )
        self.fit = BlockFit(self.runner, subject, method, ranks, calibration.groups, settings.drift, settings.damping)

    def run(
        self, store: BlockStore, reporter: Reporter, on_block: Callable[[str, Training], Any] | None = None
    ) -> None:
        """Refines every block that ``store`` does not hold yet, and puts it there as a state dict.

        ``on_block`` is called with the number of the layer and what came of its training, before the block is stored;
        with ``logits`` and ``scales`` for the training on next tokens.

        Raises:
            NonFiniteError: a block's output or loss with NaN or infinity.
            ResumeError: a stored block is damaged.
        """
        settings = self.settings
        ends = {"logits": self.first_on_logits < self.layers, "scales": settings.scale_steps}
        waiting = team.agreed([name for name, wanted in ends.items() if wanted and not self._done(store, name)])
        if team.agreed(store.complete(self.layers) and not waiting):
            return
        on_disk = in_files(self.calibration.cache, self.subject.model, self.runner.tokens, 3)
        places = [team.own_file(store.folder / f"{name}.cache") for name in ("original", "compressed")]
        files = [place if on_disk else None for place in places]
        original = self.runner.embed(files[0])
        compressed = cache_tensor(tuple(original.shape), original.dtype, files[1]).copy_(original)
        try:
            entering = self._all_blocks(store, reporter, original, compressed, waiting, on_block)
            if "logits" in waiting:
                self._on_tokens(store, "logits", reporter, entering, original, on_block)
            if "scales" in waiting:
                self._on_tokens(store, "scales", reporter, self.runner.embed(files[1]), original, on_block)
        finally:
            for file in files:
                _remove(file)

    @property
    def first_on_logits(self) -> int:
        """The first of the blocks that are trained on logits; the number of blocks where none is."""
        settings, first = self.settings, self.layers
        if not settings.on_logits:
            return first
        if settings.logits is not None:
            return max(0, self.layers - settings.logits)
        trained = 0
        while first:
            trained += sum(_size(site, self.ranks[site.name]) for site in self.subject.structure.of_layer(first - 1))
            if trained > settings.logit_parameters and first < self.layers:
                break
            first -= 1
        return first

    def _done(self, store: BlockStore, name: str) -> bool:
        return BlockStore(store.folder / name).has(self.layers + 1)

    def _all_blocks(
        self,
        store: BlockStore,
        reporter: Reporter,
        original: Tensor,
        compressed: Tensor,
        waiting: Sequence[str],
        on_block: Callable[[str, Training], Any] | None,
    ) -> Tensor:
        """Every block after the other; returns what enters the last ones that are trained on logits.

        Hidden states go as far as they are used: the original's to the end if something is ``waiting`` there.
        """
        settings = self.settings
        ahead = BlockStore(store.folder / "ahead")
        trainer = BlockTrainer(self.runner, settings, self.seed, BlockStore(store.folder / "partial"))
        opened: dict[int, nn.Module] = {}
        entering, first = compressed, self.first_on_logits
        unfinished = team.agreed([layer for layer in range(self.layers) if not store.has(layer)])
        past = unfinished[-1] if unfinished else -1
        used = max(past, first if "logits" in waiting else 0)  # the last block whose inputs are
        front = 0  # blocks that the original's states are past
        per_block = 4 * len(original) * settings.fit + settings.steps + 2 * len(original)
        with reporter.stage("refine blocks", per_block * self.layers) as tick:
            for layer in range(self.layers):
                last = min(layer + settings.window, self.layers)
                if layer == first and past >= first:
                    entering = compressed.clone()
                finished = layer not in unfinished
                if not finished and layer and settings.window > 1 and not opened:
                    opened = self._read_ahead(ahead, layer, last)
                while front < last:
                    if not finished and front not in opened:
                        opened[front] = self._block(front, original, compressed, tick)
                    self.runner.advance(front, original, tick=tick)
                    front += 1
                if finished:
                    tick(per_block - 2 * len(original))
                else:
                    window = [opened[i] for i in range(layer, last)]
                    stretch = Stretch(layer, window, compressed, original)
                    found = self._trained(trainer, stretch, tick) if settings.steps else Training()
                    block = opened.pop(layer)
                    if on_block and found.losses:
                        on_block(str(layer), found)
                    self._write_ahead(ahead, layer, opened)
                    store.write(layer, block.state_dict())
                    if team.is_first():
                        _remove(ahead.path(layer - 1))
                        _remove(trainer.partial.path(layer) if trainer.partial else None)
                if layer < used:
                    after = stored_block(store, self.subject, layer) if finished else block
                    self.runner.advance(layer, compressed, after, tick=tick)
                else:
                    tick(len(compressed))
        return entering

    def _block(self, layer: int, original: Tensor, compressed: Tensor, tick: Callable[[int], Any]) -> nn.Module:
        """A block at its ranks, and fitted if that is wanted."""
        factors = self.factors.load(layer) if self.factors.has(layer) else {}
        block = compressed_block(self.subject, layer, factors, self.ranks)
        block = trainable_copy(self.subject, layer, block)
        if self.settings.fit:
            sites, device = self.subject.structure.of_layer(layer), self.subject.model.device
            stored = site_statistics(layer, sites, self.statistics, device)
            self.fit.run(layer, block, original, compressed, stored, tick)
        return block

    def _trained(self, trainer: BlockTrainer, stretch: Stretch, tick: Callable[[int], Any]) -> Training:
        last = stretch.layer + len(stretch.blocks) - 1
        curvature = None
        if self.settings.curvature:
            device = self.subject.model.device
            found = [store.get(last, device).get(BLOCK) for store in self.statistics]
            curvature = next((value for value in found if value is not None), None)
        return trainer.train(stretch, OutputLoss(curvature, self.settings.curvature), self.settings.steps, tick)

    def _read_ahead(self, ahead: BlockStore, layer: int, last: int) -> dict[int, nn.Module]:
        """The blocks behind one that is finished, as they were trained together with it."""
        state = ahead.read(layer - 1)
        found = {}
        for i in range(layer, last):
            inside = {name.partition("/")[2]: value for name, value in state.items() if name.startswith(f"{i}/")}
            if inside:
                found[i] = restored_block(self.subject, i, inside)
        return found

    def _write_ahead(self, ahead: BlockStore, layer: int, opened: dict[int, nn.Module]) -> None:
        if opened:
            ahead.write(
                layer, {f"{i}/{name}": v for i, block in opened.items() for name, v in block.state_dict().items()}
            )

    def _on_tokens(
        self,
        store: BlockStore,
        name: str,
        reporter: Reporter,
        inputs: Tensor,
        outputs: Tensor,
        on_block: Callable[[str, Training], Any] | None,
    ) -> None:
        """Training towards the original's distribution of the next token: of the last blocks, or of all scales.

        Args:
            store: the blocks so far, and as they are afterwards.
            name: ``logits`` or ``scales``.
            reporter: where progress goes.
            inputs: what enters the first block that is trained, in the compressed model.
            outputs: of the original's last block.
            on_block: told what came of it.
        """
        made, end, settings = BlockStore(store.folder / name), Ending(self.runner), self.settings
        if not end.right():
            reporter.say(f"nothing is trained on {name}: what follows the last block cannot be run alone")
            return
        first = self.first_on_logits if name == "logits" else 0
        steps, rate = {
            "logits": (settings.end_steps, settings.logit_rate),
            "scales": (settings.scale_steps, settings.scale_rate),
        }[name]
        team.barrier()  # all blocks are written
        if not team.agreed(made.has(self.layers)):
            blocks = [stored_block(store, self.subject, i) for i in range(first, self.layers)]
            trainer = BlockTrainer(self.runner, settings, self.seed, BlockStore(made.folder / "partial"))
            stretch = Stretch(first, blocks, inputs, outputs)

            def divergence(output: Tensor, target: Tensor, rows: Tensor) -> Tensor:
                return end.divergence(output, target, self.runner.tokens[rows])

            with reporter.stage(f"refine on {name}", steps) as tick:
                if name == "logits":
                    found = trainer.train(stretch, divergence, steps, tick, rate=rate)
                else:
                    for block in blocks:
                        block.float()
                    with scaled(self.subject.structure, blocks) as parameters:
                        found = trainer.train(stretch, divergence, steps, tick, parameters, rate)
                    for block in blocks:
                        block.to(self.subject.model.dtype)
            if on_block:
                on_block(name, found)
            for i, block in enumerate(blocks, first):
                made.write(i, block.state_dict())
            # This says that all are there, and the next one that they are in the store.
            made.write(self.layers, {"losses": torch.tensor(found.losses)})
            if team.is_first():
                _remove(trainer.partial.path(first) if trainer.partial else None)
        if team.is_first():
            for i in range(first, self.layers):
                store.write(i, made.read(i))
            made.write(self.layers + 1, {"done": torch.ones(1)})
        team.barrier()


def _size(site: Site, rank: int | None) -> int:
    """Parameters of a matrix while it is trained."""
    return site.size if rank is None else rank * (site.out_features + site.in_features)


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
