"""Input statistics of the decoder's matrices, block by block.

The hidden states between two blocks are cached, so each block sees the whole calibration text before the next one
starts: statistics exist for one block at a time, and peak memory is the model, one block's statistics and the cache
(in memory, or a memory-mapped file). The statistics are taken on the fly from the same forward pass that produces the
next block's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.errors import NonFiniteError, UnsupportedModelError
from bolaco.models.structure import Site, Structure
from bolaco.models.walk import BlockRunner
from bolaco.statistics.moments import group_runs
from bolaco.statistics.statistic import InputAccumulator, InputStatistic, SiteStatistics

# Called with (input group, the input [batch, length, d], index of the batch's first sequence).
Observer = Callable[[str, Tensor, int], None]


class BlockWalk:
    """The hidden states of all sequences, carried through the decoder one block at a time.

    Args:
        model: the model, in evaluation mode.
        structure: its structure.
        tokens: ``[sequences, length]``.
        batch: sequences per forward pass.
        cache_file: memory-map the hidden states here instead of holding them in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        tokens: Tensor,
        batch: int,
        cache_file: Path | None = None,
    ) -> None:
        self.model, self.structure = model, structure
        self.runner = BlockRunner(model, structure, tokens, batch)
        self.sequences = len(tokens)
        self.layer = 0
        self._cache_file = cache_file
        self.hidden = self.runner.embed(cache_file)

    def advance(self, observe: Observer | None = None, tick: Callable[[int], Any] | None = None) -> None:
        """Runs the next block on every sequence; ``observe`` sees each shared input of the block once per batch.

        Raises:
            UnsupportedModelError: projections that should share an input do not.
            NonFiniteError: the block's output holds NaN or infinity.
        """
        handles, first = self._observe(observe) if observe else ([], {})
        try:
            self.runner.advance(self.layer, self.hidden, before=lambda rows: first.update(rows=rows), tick=tick)
        finally:
            for handle in handles:
                handle.remove()
        self.layer += 1

    def _observe(self, observe: Observer) -> tuple[list[Any], dict[str, Any]]:
        """Hooks on the block's projections; the dict carries the batch's rows and each group's input pointer."""
        state: dict[str, Any] = {}
        handles = []
        modules = {name: sites[0] for name, sites in self.structure.modules(self.layer).items()}
        leaders = {site.input_group: name for name, site in reversed(modules.items())}

        def make(name: str, site: Site) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0]
                if leaders[site.input_group] == name:
                    state[site.input_group] = x.data_ptr()
                    # OPT flattens sequences and positions before its feed-forward matrices.
                    rows = state["rows"]
                    observe(site.input_group, x.reshape(rows.stop - rows.start, -1, x.shape[-1]), rows.start)
                elif state.get(site.input_group) != x.data_ptr():
                    raise UnsupportedModelError(
                        f"{site.name}: does not share its input with {leaders[site.input_group]}"
                    )

            return hook

        for name, site in modules.items():
            module = self.model.base_model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(make(name, site)))
        return handles, state

    def close(self) -> None:
        """Frees the cache."""
        self.hidden = torch.empty(0)
        if self._cache_file is not None:
            self._cache_file.unlink(missing_ok=True)


def collect(
    walk: BlockWalk,
    statistics: Iterable[InputStatistic[Any]],
    groups: int,
    tick: Callable[[int], Any] | None = None,
) -> dict[str, SiteStatistics]:
    """Runs the next block of ``walk``; returns the statistics of each of its shared inputs, by input group.

    Sequence ``i`` of ``n`` belongs to group ``i * groups // n``, so groups are runs of consecutive sequences.

    Raises:
        NonFiniteError: naming the block and the input.
    """
    layer, wanted = walk.layer, tuple(statistics)
    groups = min(groups, walk.sequences)
    found: dict[str, dict[InputStatistic[Any], InputAccumulator[Any]]] = {}

    def observe(name: str, x: Tensor, start: int) -> None:
        if name not in found:
            found[name] = {kind: kind.accumulator(x.shape[-1], groups, x.device) for kind in wanted}
        for group, run in group_runs(slice(start, start + len(x)), groups, walk.sequences):
            for accumulator in found[name].values():
                try:
                    accumulator.update(x[run], group)
                except NonFiniteError as error:
                    raise NonFiniteError(f"block {layer}, input of {name}: {error}") from None

    walk.advance(observe, tick)
    return {
        name: SiteStatistics({kind: accumulator.finalize() for kind, accumulator in accumulators.items()})
        for name, accumulators in found.items()
    }
