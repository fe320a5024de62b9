"""Quantization of the whole decoder, block by block: its matrices are rounded, then scales and vectors are trained.

The Hessians are those of the original's inputs, from one pass over the text. What a quantized block is trained towards
is the original block's output on the original's inputs, from the inputs that it has behind the quantized blocks before
it, so that it makes up for some of what those do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bolaco.data.settings import Calibration
from bolaco.errors import NonFiniteError
from bolaco.layers import FactoredLinear, QuantizedLinear, put_module
from bolaco.layers.quantized import quantized
from bolaco.models.structure import Structure
from bolaco.models.subject import Subject
from bolaco.models.walk import cache_tensor, in_files
from bolaco.progress import Reporter
from bolaco.quantize.grid import SCALES
from bolaco.quantize.settings import WHOLE, Quantization
from bolaco.refine.loss import OutputLoss
from bolaco.refine.rounding import Bits, BlockRounding
from bolaco.refine.settings import Refinement
from bolaco.refine.train import BlockTrainer, Stretch, Training
from bolaco.statistics.forward import BlockWalk, InputWalk, collect, input_walk
from bolaco.statistics.moments import MOMENTS
from bolaco.storage.block import place_in_block
from bolaco.work.blockstore import BlockStore


class Quantizer:
    """Quantizes every block of a compressed model.

    Args:
        subject: what was factored; its model is the original.
        make: makes a block of the compressed model, with nothing shared and every dense matrix a Linear.
        bits: of each matrix.
        tokens: ``[sequences, length]``, the calibration text.
        settings: what is done.
        calibration: batch and groups; whether hidden states are held in memory or beside the result.
        seed: of the order of the sequences.
    """

    def __init__(
        self,
        subject: Subject,
        make: Callable[[int], nn.Module],
        bits: Bits,
        tokens: Tensor,
        settings: Quantization,
        calibration: Calibration,
        seed: int = 0,
    ) -> None:
        self.subject, self.make, self.bits, self.settings = subject, make, bits, settings
        self.tokens, self.calibration, self.seed = tokens[: settings.sequences], calibration, seed
        self.rounding = BlockRounding(subject.structure, bits, settings.group, settings.damping)

    def run(
        self,
        store: BlockStore,
        reporter: Reporter,
        on_block: Callable[[str, Training], Any] | None = None,
        layers: int | None = None,
    ) -> None:
        """Quantizes every block that ``store`` does not hold yet, and puts it there as a state dict.

        Args:
            store: where blocks go.
            reporter: where progress goes.
            on_block: called with the number of the layer and what came of its training, before the block is stored.
            layers: the first so many blocks only.

        Raises:
            NonFiniteError: an input, an output or a loss with NaN or infinity.
            ResumeError: a stored block is damaged.
        """
        layers = layers or self.subject.structure.num_layers
        if store.complete(layers):
            return
        on_disk = in_files(self.calibration.cache, self.subject.model, self.tokens, 3)
        files = [store.folder / f"{name}.cache" if on_disk else None for name in ("original", "quantized")]
        walk = input_walk(self.subject.model, self.subject.structure, self.tokens, self.calibration.batch, files[0])
        trains = self.settings.steps > 0 and isinstance(walk, BlockWalk)
        per_block = len(self.tokens) + trains * (self.settings.steps + len(self.tokens))
        try:
            with reporter.stage("quantize", layers * per_block) as tick:
                if isinstance(walk, BlockWalk) and trains:
                    self._trained(walk, layers, store, files[1], tick, on_block)
                else:
                    self._rounded(walk, layers, store, tick)
        finally:
            walk.close()
            if files[1] is not None:
                files[1].unlink(missing_ok=True)

    def _rounded(self, walk: InputWalk, layers: int, store: BlockStore, tick: Callable[[int], Any]) -> None:
        while walk.layer < layers:
            if store.has(walk.layer):
                walk.advance(1, tick=tick)
                continue
            first = walk.layer
            for layer, inputs in enumerate(collect(walk, [MOMENTS], self.calibration.groups, tick), first):
                if not store.has(layer):
                    block = self.make(layer)
                    self.rounding.run(layer, block, inputs)
                    store.write(layer, block.state_dict())

    def _trained(
        self,
        walk: BlockWalk,
        layers: int,
        store: BlockStore,
        file: Path | None,
        tick: Callable[[int], Any],
        on_block: Callable[[str, Training], Any] | None,
    ) -> None:
        settings, runner = self.settings, walk.runner
        entering = cache_tensor(tuple(walk.hidden.shape), walk.hidden.dtype, file).copy_(walk.hidden)
        options = Refinement(
            steps=settings.steps, learning_rate=settings.learning_rate, weight_decay=0.0, sequences=None
        )
        trainer = BlockTrainer(runner, options, self.seed, BlockStore(store.folder / "partial"))
        for layer in range(layers):
            if store.has(layer):
                block = quantized_block(store, layer, self.make(layer), self.subject.structure, self.bits, settings)
                walk.advance(1, tick=tick)
                tick(settings.steps)
            else:
                block = self.make(layer)
                (inputs,) = collect(walk, [MOMENTS], self.calibration.groups, tick)
                self.rounding.run(layer, block, inputs)
                found = self._train(trainer, Stretch(layer, [block], entering, walk.hidden), tick)
                if on_block and found.losses:
                    on_block(str(layer), found)
                store.write(layer, block.state_dict())
                if trainer.partial is not None:
                    trainer.partial.path(layer).unlink(missing_ok=True)
            runner.advance(layer, entering, block, tick=tick)

    def _train(self, trainer: BlockTrainer, stretch: Stretch, tick: Callable[[int], Any]) -> Training:
        (block,) = stretch.blocks
        dtype = self.subject.model.dtype
        block.float()
        with scaled_codes(block) as parameters:
            found = trainer.train(stretch, OutputLoss(), self.settings.steps, tick, parameters)
        block.to(dtype)
        settle(block)
        return found


class _Ratio(nn.Module):
    """Scales times a factor for each, 1 at first: steps are relative to a scale."""

    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.ratio = nn.Parameter(torch.ones_like(scales))

    def forward(self, scales: Tensor) -> Tensor:
        return scales * self.ratio


@contextmanager
def scaled_codes(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """While it lasts, the scales of all codes of a block have factors; gives these, norms and biases. Then these are
    multiplied into the scales."""
    layers = [module for module in block.modules() if isinstance(module, QuantizedLinear)]
    vectors = [p for p in block.parameters() if p.ndim < 2 and p.is_floating_point()]
    made = [_Ratio(layer.scales.detach()) for layer in layers]
    for layer, ratio in zip(layers, made, strict=True):
        parametrize.register_parametrization(layer, "scales", ratio)
    try:
        yield [*(ratio.ratio for ratio in made), *vectors]
    finally:
        for layer in layers:
            parametrize.remove_parametrizations(layer, "scales", leave_parametrized=True)
            layer.scales.requires_grad_(False)
            layer.forget()


def settle(block: nn.Module) -> None:
    """Scales become numbers of the format that they are stored in.

    Raises:
        NonFiniteError: one is not finite.
    """
    for name, module in block.named_modules():
        if isinstance(module, QuantizedLinear):
            if not torch.isfinite(module.scales).all():
                raise NonFiniteError(f"{name}: scales hold NaN or infinity after training")
            module.scales.data = module.scales.data.to(SCALES).to(module.scales.dtype)
            module.forget()


def quantized_block(
    store: BlockStore, layer: int, block: nn.Module, structure: Structure, bits: Bits, settings: Quantization
) -> nn.Module:
    """A quantized block out of a store.

    Args:
        store: where its state is.
        layer: which one.
        block: the same before it was quantized; it is changed.
        structure, bits, settings: as it was quantized.

    Raises:
        ResumeError: missing, damaged, or of another model.
    """
    for site in structure.of_layer(layer):
        for member in site.members if bits[site.name] != WHOLE else ():
            name = place_in_block(structure, member)
            found = block.get_submodule(name)
            with torch.device("meta"):
                made = quantized(found, bits[site.name], settings.group)
            if not isinstance(found, FactoredLinear):
                put_module(block, name, made)
    try:
        block.load_state_dict(store.read(layer), assign=True)
    except (RuntimeError, KeyError) as error:
        raise store.damaged(layer, error) from error
    return block.requires_grad_(False).eval()
