"""Input statistics of the decoder's matrices, block by block.

The hidden states between two blocks are cached, so each block sees the whole calibration text before the next one
starts: statistics exist for one block at a time, and peak memory is the model, one block's statistics and the cache
(in memory, or a memory-mapped file). The statistics are taken on the fly from the same forward pass that produces the
next block's inputs.

Where blocks cannot be run on their own (:class:`bolaco.models.structure.Walk`), whole forward passes are observed: the
statistics of as many blocks at a time as a share of the memory holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.errors import NonFiniteError
from bolaco.evaluation.objective import final_hidden
from bolaco.models.structure import Site, Structure, all_experts
from bolaco.models.walk import BlockRunner, by_sequence
from bolaco.parallel import team
from bolaco.statistics.moments import group_runs
from bolaco.statistics.statistic import InputAccumulator, InputStatistic, SiteStatistics
from bolaco.work.memory import free_memory

# Called with (layer, input group, the input [batch, length, d], index of the batch's first sequence).
Observer = Callable[[int, str, Tensor, int], None]
# Of the memory that is free, what the statistics of several blocks may take.
_SHARE = 0.25


class InputWalk(ABC):
    """Goes through the decoder once, a block at a time.

    Args:
        model: the model, in evaluation mode.
        structure: its structure.
        tokens: ``[sequences, length]``, of all ranks; each walks through its share.
        batch: sequences per forward pass.
        cache_file: memory-map hidden states here instead of holding them in memory.

    Attributes:
        sequences: that this rank walks through.
        total: sequences of all ranks.
        first: this rank's first among them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        tokens: Tensor,
        batch: int,
        cache_file: Path | None = None,
    ) -> None:
        own = team.share_of_batches(len(tokens), batch, "calibration text")
        self.model, self.structure, self.tokens, self.batch = model, structure, tokens[own], batch
        self.sequences, self.total, self.first = own.stop - own.start, len(tokens), own.start
        self.layer = 0
        self._cache_file = None if cache_file is None else team.own_file(cache_file)

    @abstractmethod
    def layers_at_once(self, numbers: Callable[[int], int]) -> int:
        """How many blocks from the next one on are observed together; ``numbers`` of each is what it takes."""

    @abstractmethod
    def advance(self, layers: int, observe: Observer | None = None, tick: Callable[[int], Any] | None = None) -> None:
        """Runs the next blocks on every sequence; ``observe`` sees each shared input of theirs once per batch.

        Raises:
            NonFiniteError: a block's output holds NaN or infinity.
        """

    def close(self) -> None:  # noqa: B027 - there may be nothing to free
        """Frees the cache."""

    @contextmanager
    def _observed(self, layers: range, observe: Observer | None, at: dict[str, slice]) -> Iterator[None]:
        """While it lasts the inputs of these blocks are observed; ``at`` holds the rows of the batch."""
        handles = []

        def make(site: Site) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                assert observe is not None
                rows = at["rows"]
                x = by_sequence(site, args[0], rows.stop - rows.start)
                # Llama 4 sends every token to all experts, as zeros to those that are not its own.
                x = x if site.expert is None else x[:, x[0].any(dim=-1)]
                observe(site.layer, site.input_group, x, rows.start)

            return hook

        for layer in layers if observe else ():
            leaders: dict[str, tuple[str, Site]] = {}
            for name, sites in self.structure.modules(layer).items():
                leaders.setdefault(sites[0].input_group, (name, sites[0]))
            for name, site in leaders.values():
                handles.append(self.model.base_model.get_submodule(name).register_forward_pre_hook(make(site)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class BlockWalk(InputWalk):
    """The hidden states of all sequences, carried through the decoder one block at a time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.runner = BlockRunner(self.model, self.structure, self.tokens, self.batch)
        self.hidden = self.runner.embed(self._cache_file)

    def layers_at_once(self, numbers: Callable[[int], int]) -> int:
        """One."""
        return 1

    def advance(
        self, layers: int = 1, observe: Observer | None = None, tick: Callable[[int], Any] | None = None
    ) -> None:
        """Runs the next blocks, one by one."""
        at: dict[str, slice] = {}
        for layer in range(self.layer, self.layer + layers):
            with self._observed(range(layer, layer + 1), observe, at):
                self.runner.advance(layer, self.hidden, before=lambda rows: at.update(rows=rows), tick=tick)
        self.layer += layers

    def close(self) -> None:
        """Frees the cache."""
        self.hidden = torch.empty(0)
        if self._cache_file is not None:
            self._cache_file.unlink(missing_ok=True)


class WholeWalk(InputWalk):
    """Whole forward passes: right for every model, and repeated if the statistics of all blocks do not fit."""

    def layers_at_once(self, numbers: Callable[[int], int]) -> int:
        """As many as a share of the free memory holds, at least one."""
        free = _SHARE * free_memory(self.model.device)
        count, taken = 0, 0
        for layer in range(self.layer, self.structure.num_layers):
            taken += 8 * numbers(layer)
            if count and taken > free:
                break
            count += 1
        return count

    def advance(self, layers: int, observe: Observer | None = None, tick: Callable[[int], Any] | None = None) -> None:
        """Runs the model, if there is something to observe."""
        at: dict[str, slice] = {}
        with self._observed(range(self.layer, self.layer + layers), observe, at), torch.no_grad():
            for start in range(0, self.sequences, self.batch) if observe else ():
                at["rows"] = slice(start, min(start + self.batch, self.sequences))
                tokens = self.tokens[at["rows"]].to(self.model.device)
                final = final_hidden(self.model, tokens)
                if not torch.isfinite(final).all():
                    raise NonFiniteError(
                        f"the model's output holds NaN or infinity on calibration sequences {start}-"
                        f"{at['rows'].stop - 1}; try --dtype float32"
                    )
                if tick:
                    tick(layers * (at["rows"].stop - start))
        if not observe and tick:
            tick(layers * self.sequences)
        self.layer += layers


def input_walk(
    model: PreTrainedModel, structure: Structure, tokens: Tensor, batch: int, cache_file: Path | None = None
) -> InputWalk:
    """The walk that is right for a model."""
    kind = WholeWalk if structure.walk.hooks else BlockWalk
    return kind(model, structure, tokens, batch, cache_file)


def collect(
    walk: InputWalk,
    statistics: Iterable[InputStatistic[Any]],
    groups: int,
    tick: Callable[[int], Any] | None = None,
) -> list[dict[str, SiteStatistics]]:
    """Runs the next block of ``walk``, or the next ones if it takes several at a time.

    Sequence ``i`` of ``n`` belongs to group ``i * groups // n``, so groups are runs of consecutive sequences.

    Returns:
        Of each block, the statistics of its shared inputs, by input group.

    Raises:
        NonFiniteError: naming the block and the input.
    """
    first, wanted = walk.layer, tuple(statistics)
    groups = min(groups, walk.total)
    dims = {layer: _by_group(walk.structure, layer) for layer in range(first, walk.structure.num_layers)}

    def numbers(layer: int) -> int:
        sizes = [site.in_features for site in dims[layer].values()]
        return sum(kind.numbers(size) for size in sizes for kind in wanted)

    # Free memory, which this may depend on, is another one everywhere.
    layers = range(first, first + team.agreed(walk.layers_at_once(numbers)))
    found: dict[tuple[int, str], dict[InputStatistic[Any], InputAccumulator[Any]]] = {}
    counts: dict[tuple[int, str], int] = {}

    def observe(layer: int, name: str, x: Tensor, start: int) -> None:
        place = layer, name
        if place not in found:
            found[place] = {kind: kind.accumulator(x.shape[-1], groups, x.device) for kind in wanted}
        counts[place] = counts.get(place, 0) + x[..., 0].numel()
        routed = dims[layer][name].expert is not None
        start += walk.first
        stop = start + (1 if routed else len(x))
        for group, run in group_runs(slice(start, stop), groups, walk.total):
            for accumulator in found[place].values():
                try:
                    accumulator.update(x[run], group)
                except NonFiniteError as error:
                    raise NonFiniteError(f"block {layer}, input of {name}: {error}") from None

    walk.advance(len(layers), observe, tick)
    if team.count() > 1:
        _reduce(
            found,
            counts,
            lambda place: {
                k: k.accumulator(dims[place[0]][place[1]].in_features, groups, walk.model.device) for k in wanted
            },
        )
    return [_finished(dims[layer], layer, wanted, found, counts) for layer in layers]


def _reduce(
    found: dict[tuple[int, str], dict[InputStatistic[Any], InputAccumulator[Any]]],
    counts: dict[tuple[int, str], int],
    empty: Callable[[tuple[int, str]], dict[InputStatistic[Any], InputAccumulator[Any]]],
) -> None:
    """Adds up what all ranks have seen; an expert may have been sent tokens on some of them only."""
    seen = team.gather([[layer, name, count] for (layer, name), count in counts.items()])
    places = sorted({(int(layer), str(name)) for rank in seen for layer, name, _ in rank})
    for place in places:
        counts[place] = sum(count for rank in seen for layer, name, count in rank if (layer, name) == place)
        if place not in found:
            found[place] = empty(place)
        for accumulator in found[place].values():
            accumulator.reduce()


def _by_group(structure: Structure, layer: int) -> dict[str, Site]:
    """The first matrix of every input group of a block, in order of execution."""
    found: dict[str, Site] = {}
    for site in (member for unit in structure.of_layer(layer) for member in unit.members):
        found.setdefault(site.input_group, site)
    return found


def _finished(
    sites: dict[str, Site],
    layer: int,
    wanted: tuple[InputStatistic[Any], ...],
    found: dict[tuple[int, str], dict[InputStatistic[Any], InputAccumulator[Any]]],
    counts: dict[tuple[int, str], int],
) -> dict[str, SiteStatistics]:
    """The statistics of one block, by input group; those of experts lean on one another."""
    done: dict[str, SiteStatistics] = {}
    experts: dict[tuple[int, str], list[str]] = {}
    for name, site in sites.items():
        if site.tie is not None:
            experts.setdefault(site.tie, []).append(name)
        elif (layer, name) in found:
            done[name] = SiteStatistics({kind: item.finalize() for kind, item in found[layer, name].items()})
    together: dict[InputStatistic[Any], Any] = {}
    for position, names in enumerate(experts.values()):
        seen = [counts.get((layer, name), 0) for name in names]
        values: dict[InputStatistic[Any], list[Any]] = {}
        for kind in wanted:
            own = [_or_none(found.get((layer, name), {}).get(kind)) for name in names]
            # What enters an expert is one space for all of them; behind its first matrix each has its own.
            values[kind] = kind.of_experts(own, seen, position == 0, sites[names[0]].in_features)
            if position == 0:
                known = [(value, count) for value, count in zip(own, seen, strict=True) if value is not None]
                together[kind] = kind.pooled(*(list(part) for part in zip(*known, strict=True)))
        for index, name in enumerate(names):
            done[name] = SiteStatistics({kind: values[kind][index] for kind in wanted}, seen[index])
        if position == 0:
            done[all_experts(sites[names[0]].type)] = SiteStatistics(together)
    return done


def _or_none(accumulator: InputAccumulator[Any] | None) -> Any:
    try:
        return None if accumulator is None else accumulator.finalize()
    except ValueError:  # too few vectors
        return None
