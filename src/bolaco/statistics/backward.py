"""Statistics of loss gradients, block by block from the last to the first.

One forward pass records the inputs of every block; then the blocks are run again one at a time, last to first, with
autograd inside one block only. Memory is the model, one block's graph and statistics, and the recorded block inputs
(on disk if asked). Where blocks cannot be run on their own, autograd goes through the whole model, which takes the
memory of its graph for one batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.errors import NonFiniteError
from bolaco.evaluation.objective import SLAB, Head, final_hidden
from bolaco.models.structure import Site, Structure
from bolaco.models.walk import (
    Arguments,
    BlockRunner,
    by_sequence,
    cache_tensor,
    no_gradients,
    split_arguments,
    state_in,
)
from bolaco.parallel import team
from bolaco.statistics.statistic import BLOCK, GradientAccumulator, GradientStatistic
from bolaco.work.memory import free_memory
from bolaco.work.pages import release

_NO_LABEL = -100
# Of the memory that is free, what the statistics of several blocks may take.
_SHARE = 0.25


def _sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label ``[n]`` from each row of ``logits`` ``[n, vocabulary]``."""
    with torch.no_grad():
        # Inverse of the distribution function; torch.multinomial takes ten times as long on large vocabularies.
        cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.rand(len(logits), 1, generator=generator, device=logits.device) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, drawn)[:, 0].clamp(max=logits.shape[-1] - 1)


class _Gathered:
    """Accumulators of all matrices of some blocks, and the tokens that each of them has seen."""

    def __init__(self, structure: Structure, layers: range, statistic: GradientStatistic, device: torch.device) -> None:
        self._statistic = statistic
        self.sites = {layer: structure.modules(layer) for layer in layers}
        self._items: dict[str, GradientAccumulator] = {}
        self._counts: dict[str, int] = {}
        self._updates: dict[str, int] = {}
        for modules in self.sites.values():
            for site in (site for members in modules.values() for site in members):
                self._items[site.name] = statistic.accumulator(site, device)
                self._counts[site.name] = self._updates[site.name] = 0
        self.sequences = 0  # of the batch that is run

    @contextmanager
    def observing(self, base: nn.Module) -> Iterator[None]:
        """While it lasts, what the matrices are called with and the gradients at their outputs are gathered."""
        handles = [
            base.get_submodule(name).register_forward_hook(self._hook(members))
            for modules in self.sites.values()
            for name, members in modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, members: list[Site]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()

            def take(gradient: Tensor) -> None:
                inputs, outputs = (by_sequence(members[0], t, self.sequences) for t in (x, gradient))
                if members[0].expert is not None:
                    # Llama 4 sends every token to all experts, as zeros to those that are not its own.
                    own = inputs[0].any(dim=-1)
                    inputs, outputs = inputs[:, own], outputs[:, own]
                for site in members:
                    self._counts[site.name] += inputs[..., 0].numel()
                    self._updates[site.name] += 1
                    try:
                        self._items[site.name].update(inputs, outputs[..., slice(*site.rows)])
                    except NonFiniteError as error:
                        raise NonFiniteError(f"{site.name}, gradient: {error}; try --dtype float32") from None

            if output.requires_grad:
                output.register_hook(take)

        return hook

    def reduce(self) -> None:
        """Adds up what all ranks have seen, on each of them."""
        if team.count() == 1:
            return
        names = sorted(self._items)
        numbers = torch.tensor([[self._counts[name], self._updates[name]] for name in names])
        team.all_reduce({"numbers": numbers})
        for name, (count, updates) in zip(names, numbers.tolist(), strict=True):
            self._counts[name], self._updates[name] = count, updates
            self._items[name].reduce()

    def results(self, layer: int, text: Tensor) -> dict[str, Tensor]:
        """The statistic of each matrix of a block, by site name, on all of ``text`` ``[sequences, length]``."""
        done: dict[str, Tensor] = {}
        experts: dict[tuple[int, str], list[Site]] = {}
        for site in (site for members in self.sites[layer].values() for site in members):
            if site.tie is None:
                done[site.name] = self._items[site.name].result()
            else:
                experts.setdefault(site.tie, []).append(site)
        for position, sites in enumerate(experts.values()):
            counts = [self._counts[site.name] for site in sites]
            own = [self._result(site, len(text)) for site in sites]
            # What leaves an expert is one space for all of them; inside, each has its own.
            values = self._statistic.of_experts(own, counts, text.numel(), position == len(experts) - 1)
            done |= {site.name: value for site, value in zip(sites, values, strict=True)}
        return done

    def _result(self, site: Site, sequences: int) -> Tensor | None:
        if not self._counts[site.name]:
            return None
        try:
            found = self._items[site.name].result()
        except ValueError:  # too few tokens
            return None
        # A mean over sequences counts those in which an expert had nothing to do.
        return found * (self._updates[site.name] / sequences) if self._statistic.per_sequence else found


class GradientWalk(ABC):
    """Gradient statistics of a model, block by block from the last to the first.

    Args:
        model: the model, in evaluation mode; its parameters are frozen while it is used.
        structure: its structure.
        tokens: ``[sequences, length]``, of all ranks; each walks through its share.
        batch: sequences per pass.
        statistic: what is estimated.
        seed: of sampled labels.
        folder: record block inputs in memory-mapped files here instead of in memory.

    Attributes:
        gradient: what a walk that is interrupted goes on from: ``[sequences, ...]`` of the loss at the input of the
            block that was yielded last, of this rank's sequences.
        text: ``tokens``; :attr:`tokens` are this rank's of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        tokens: Tensor,
        batch: int,
        statistic: GradientStatistic,
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.statistic = statistic
        if statistic.per_sequence and any(site.expert is not None for site in structure.sites):
            batch = 1  # an expert is given its tokens without their sequences
        self.batch = batch
        own = team.share_of_batches(len(tokens), batch, "text for loss gradients")
        self.model, self.structure, self.text, self.tokens = model, structure, tokens, tokens[own]
        self._before = own.start
        self.head = Head(model)
        self._seed = seed
        self._folder = None if folder is None else team.own_file(folder)
        self.gradient = torch.empty(0)

    @abstractmethod
    def run(
        self, tick: Callable[[int], Any] | None = None, earlier: tuple[int, Tensor] | None = None
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yields ``(layer, {site name: statistic in float64})``, last block first.

        ``tick`` is called with the sequences done, ``num_layers + 1`` times each sequence in all. ``earlier`` is the
        last layer of a walk that was interrupted, and its :attr:`gradient` then: this one goes on below it.

        Raises:
            NonFiniteError: a gradient with NaN or infinity; names the matrix.
        """

    def close(self) -> None:  # noqa: B027 - there may be nothing to free
        """Frees what was recorded."""

    def whole_gradient(self) -> Tensor:
        """:attr:`gradient` of the sequences of all ranks."""
        if team.count() == 1 or self.gradient.ndim < 2:
            return self.gradient
        whole = self.gradient.new_empty((len(self.text), *self.gradient.shape[1:]))
        whole[self._before : self._before + len(self.tokens)] = self.gradient
        team.complete(whole, team.batches(len(self.text), self.batch))
        return whole

    def own_gradient(self, whole: Tensor) -> Tensor:
        """Of what :meth:`whole_gradient` gave, this rank's."""
        return whole.clone() if len(whole) < len(self.text) else whole[self._before :][: len(self.tokens)].clone()

    def _generator(self) -> torch.Generator:
        """Of labels; those of the sequences of ranks before this one are drawn already."""
        generator = torch.Generator(self.model.device).manual_seed(self._seed)
        torch.rand(self._before * self.text.shape[1], generator=generator, device=self.model.device)
        return generator

    def _upstream(self, final: Tensor, generator: torch.Generator, tokens: Tensor) -> Tensor:
        known = tokens if self.statistic.labels == "text" else None
        return self._label_gradient(final.detach(), generator, known)

    def _label_gradient(self, final: Tensor, generator: torch.Generator, tokens: Tensor | None = None) -> Tensor:
        """Gradient of the summed loss with respect to final hidden states ``[b, length, d]``.

        Labels are sampled from the model, or the next ones of ``tokens`` ``[b, length]`` (the last position has none).
        Computed a slab of positions at a time, as everywhere.
        """
        flat = final.flatten(0, 1)
        known = None if tokens is None else F.pad(tokens[:, 1:], (0, 1), value=_NO_LABEL).flatten()
        result = torch.empty_like(flat)
        chunk = max(1, SLAB // (4 * self.head.linear.weight.shape[0]))
        for start in range(0, len(flat), chunk):
            states = flat[start : start + chunk].requires_grad_()
            logits = self.head(states)
            labels = _sampled(logits, generator) if known is None else known[start : start + chunk]
            loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=_NO_LABEL)
            (result[start : start + chunk],) = torch.autograd.grad(loss, states)
        return result.view_as(final)


class BlockGradientWalk(GradientWalk):
    """Records the inputs of every block, and runs one block at a time with autograd."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.runner = BlockRunner(self.model, self.structure, self.tokens, self.batch)
        self._inputs: list[Tensor] = []

    def run(
        self, tick: Callable[[int], Any] | None = None, earlier: tuple[int, Tensor] | None = None
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yields the statistics of one block after the other."""
        top = self.structure.num_layers
        if earlier is not None:
            top, self.gradient = earlier[0], self.own_gradient(earlier[1])
            if tick:
                tick((self.structure.num_layers - top) * len(self.tokens))
        with no_gradients(self.model):
            self._forward(tick, differentiate=earlier is None)
            for layer in reversed(range(top)):
                yield layer, self._backward(layer, tick)
        self.close()

    def close(self) -> None:
        """Frees what was recorded."""
        self._inputs, self.gradient = [], torch.empty(0)
        if self._folder is not None:
            for file in self._folder.glob("inputs-*.cache"):
                file.unlink()

    def _allocate(self, index: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        file = None if self._folder is None else self._folder / f"inputs-{index:05d}.cache"
        return cache_tensor((len(self.tokens), *shape[1:]), dtype, file)

    def _forward(self, tick: Callable[[int], Any] | None, differentiate: bool) -> None:
        """Records every block's input and arguments, and if asked the loss gradient at the last block's output."""
        seen: list[tuple[Arguments, Tensor]] = []
        leaves: list[Tensor] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state, rest = split_arguments(args, kwargs)
            # Some families change hidden states in place.
            seen.append((rest, self.runner.kept(state.detach()).to("cpu", copy=True)))

        def cut(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            leaves.append(state_in(output).detach().requires_grad_())
            return type(output)([leaves[-1], *output[1:]]) if isinstance(output, tuple | list) else leaves[-1]

        blocks = self.runner.blocks
        handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
        handles.append(blocks[-1].register_forward_hook(cut))
        generator = self._generator()
        try:
            for rows in self.runner.slices:
                seen.clear()
                leaves.clear()
                with torch.set_grad_enabled(differentiate):
                    tokens = self.tokens[rows].to(self.model.device)
                    final = final_hidden(self.model, tokens)
                    if differentiate:
                        upstream = self._upstream(final, generator, tokens)
                        (gradient,) = torch.autograd.grad(final, leaves[0], upstream)
                        gradient = self.runner.kept(gradient)
                        if self.gradient.numel() == 0:
                            self.gradient = torch.empty((len(self.tokens), *gradient.shape[1:]), dtype=gradient.dtype)
                        self.gradient[rows] = gradient.to("cpu")
                for index, (_, state) in enumerate(seen):
                    if len(self._inputs) <= index:
                        self._inputs.append(self._allocate(index, state.shape, state.dtype))
                    self._inputs[index][rows] = state
                    release([self._inputs[index]])
                self.runner.record(rows, [rest for rest, _ in seen])
                if tick:
                    tick(rows.stop - rows.start)
        finally:
            for handle in handles:
                handle.remove()

    def _backward(self, layer: int, tick: Callable[[int], Any] | None) -> dict[str, Tensor]:
        """Runs one block again with autograd; moves the gradient to its input."""
        device = self.model.device
        gathered = _Gathered(self.structure, range(layer, layer + 1), self.statistic, device)
        make = self.statistic.of_outputs
        whole = None if make is None else make(self.gradient.shape[-1], device)
        with gathered.observing(self.model.base_model):
            for rows in self.runner.slices:
                gathered.sequences = rows.stop - rows.start
                if whole is not None:
                    whole.update(torch.empty(0), self.gradient[rows].to(device))
                with torch.enable_grad():
                    state = self._inputs[layer][rows].to(device).requires_grad_()
                    output = self.runner.run(layer, state, rows=rows)
                    (gradient,) = torch.autograd.grad(output, state, self.gradient[rows].to(device))
                self.gradient[rows] = gradient.to("cpu")
                if tick:
                    tick(rows.stop - rows.start)
        self._inputs[layer] = torch.empty(0)
        gathered.reduce()
        found = gathered.results(layer, self.text)
        if whole is None:
            return found
        if team.count() > 1:
            whole.reduce()
        return found | {BLOCK: whole.result()}


class WholeGradientWalk(GradientWalk):
    """Autograd through the whole model; several passes if the statistics of all blocks do not fit in memory."""

    def run(
        self, tick: Callable[[int], Any] | None = None, earlier: tuple[int, Tensor] | None = None
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yields the statistics of one block after the other."""
        top = self.structure.num_layers if earlier is None else earlier[0]
        if tick:
            tick((self.structure.num_layers - top + 1) * len(self.tokens))
        # There is nothing to go on from but the number of the block.
        self.gradient = torch.zeros(1)
        while top:
            # Free memory is another one for each rank.
            layers = range(top - team.agreed(self._at_once(top)), top)
            gathered = _Gathered(self.structure, layers, self.statistic, self.model.device)
            self._pass(gathered, len(layers), tick)
            gathered.reduce()
            for layer in reversed(layers):
                yield layer, gathered.results(layer, self.text)
            top = layers.start

    def _at_once(self, top: int) -> int:
        """How many blocks below ``top`` are observed together."""
        free = _SHARE * free_memory(self.model.device)
        count, taken = 0, 0
        while count < top:
            sites = self.structure.of_layer(top - count - 1)
            taken += 16 * sum(self.statistic.numbers(member) for site in sites for member in site.members)
            if count and taken > free:
                break
            count += 1
        return count

    def _pass(self, gathered: _Gathered, layers: int, tick: Callable[[int], Any] | None) -> None:
        entering: list[Tensor] = []

        def begin(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            entering.append(output.detach().requires_grad_())
            return entering[-1].clone()

        handle = self.model.get_input_embeddings().register_forward_hook(begin)
        generator = self._generator()
        try:
            with no_gradients(self.model), gathered.observing(self.model.base_model):
                for start in range(0, len(self.tokens), self.batch):
                    tokens = self.tokens[start : start + self.batch].to(self.model.device)
                    gathered.sequences = len(tokens)
                    entering.clear()
                    with torch.enable_grad():
                        final = final_hidden(self.model, tokens)
                        upstream = self._upstream(final, generator, tokens)
                        torch.autograd.grad(final, entering, upstream, allow_unused=True)
                    if tick:
                        tick(layers * len(tokens))
        finally:
            handle.remove()


def gradient_walk(model: PreTrainedModel, structure: Structure, *args: Any, **kwargs: Any) -> GradientWalk:
    """The walk that is right for a model; arguments as of :class:`GradientWalk`."""
    kind = WholeGradientWalk if structure.walk.hooks else BlockGradientWalk
    return kind(model, structure, *args, **kwargs)
