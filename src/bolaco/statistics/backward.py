"""Statistics of loss gradients, block by block from the last to the first.

One forward pass records the inputs of every block; then the blocks are run again one at a time, last to first, with
autograd inside one block only. Memory is the model, one block's graph and statistics, and the recorded block inputs
(on disk if asked).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.errors import NonFiniteError
from bolaco.evaluation.objective import SLAB, Head
from bolaco.models.structure import Site, Structure
from bolaco.models.walk import Arguments, BlockRunner, cache_tensor, split_arguments
from bolaco.statistics.statistic import GradientStatistic

_NO_LABEL = -100


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter gets a gradient while this lasts: only activations are differentiated."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label ``[n]`` from each row of ``logits`` ``[n, vocabulary]``."""
    with torch.no_grad():
        # Inverse of the distribution function; torch.multinomial takes ten times as long on large vocabularies.
        cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.rand(len(logits), 1, generator=generator, device=logits.device) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, drawn)[:, 0].clamp(max=logits.shape[-1] - 1)


class GradientWalk:
    """Gradient statistics of a model, block by block from the last to the first.

    Args:
        model: the model, in evaluation mode; its parameters are frozen while it is used.
        structure: its structure.
        tokens: ``[sequences, length]``.
        batch: sequences per pass.
        statistic: what is estimated.
        seed: of sampled labels.
        folder: record block inputs in memory-mapped files here instead of in memory.

    Attributes:
        gradient: ``[sequences, length, d]`` of the loss at the input of the block that was yielded last.
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
        self.model, self.structure, self.tokens = model, structure, tokens
        self.statistic = statistic
        self.runner = BlockRunner(model, structure, tokens, batch)
        self.head = Head(model)
        self._seed, self._folder = seed, folder
        self._inputs: list[Tensor] = []
        self.gradient = torch.empty(0)

    def run(
        self, tick: Callable[[int], Any] | None = None, earlier: tuple[int, Tensor] | None = None
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yields ``(layer, {site name: statistic in float64})``, last block first.

        ``tick`` is called with the sequences done, ``num_layers + 1`` times each sequence in all. ``earlier`` is the
        last layer of a walk that was interrupted, and its :attr:`gradient` then: this one goes on below it.

        Raises:
            NonFiniteError: a gradient with NaN or infinity; names the matrix.
        """
        top = self.structure.num_layers
        if earlier is not None:
            top, self.gradient = earlier[0], earlier[1].clone()
            if tick:
                tick((self.structure.num_layers - top) * len(self.tokens))
        with _frozen(self.model):
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
            seen.append((rest, state.detach()))

        def cut(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            state = output[0] if isinstance(output, tuple) else output
            leaves.append(state.detach().requires_grad_())
            return (leaves[-1], *output[1:]) if isinstance(output, tuple) else leaves[-1]

        blocks = self.runner.blocks
        handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
        handles.append(blocks[-1].register_forward_hook(cut))
        generator = torch.Generator(self.model.device).manual_seed(self._seed)
        try:
            for rows in self.runner.slices:
                seen.clear()
                leaves.clear()
                with torch.set_grad_enabled(differentiate):
                    tokens = self.tokens[rows].to(self.model.device)
                    final = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
                    if differentiate:
                        known = tokens if self.statistic.labels == "text" else None
                        upstream = self._label_gradient(final.detach(), generator, known)
                        (gradient,) = torch.autograd.grad(final, leaves[0], upstream)
                        if self.gradient.numel() == 0:
                            self.gradient = torch.empty((len(self.tokens), *gradient.shape[1:]), dtype=gradient.dtype)
                        self.gradient[rows] = gradient.to("cpu")
                for index, (_, state) in enumerate(seen):
                    if len(self._inputs) <= index:
                        self._inputs.append(self._allocate(index, state.shape, state.dtype))
                    self._inputs[index][rows] = state.to("cpu")
                self.runner.arguments[rows.stop - rows.start] = [rest for rest, _ in seen]
                if tick:
                    tick(rows.stop - rows.start)
        finally:
            for handle in handles:
                handle.remove()

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

    def _backward(self, layer: int, tick: Callable[[int], Any] | None) -> dict[str, Tensor]:
        """Runs one block again with autograd; moves the gradient to its input."""
        sites = self.structure.modules(layer)
        device = self.model.device
        statistics = {s.name: self.statistic.accumulator(s, device) for members in sites.values() for s in members}
        size = 0

        def observe(members: list[Site]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                x = args[0].detach()

                def take(gradient: Tensor) -> None:
                    # OPT flattens sequences and positions before its feed-forward matrices.
                    inputs, outputs = (t.reshape(size, -1, t.shape[-1]) for t in (x, gradient))
                    for site in members:
                        try:
                            statistics[site.name].update(inputs, outputs[..., slice(*site.rows)])
                        except NonFiniteError as error:
                            raise NonFiniteError(f"{site.name}, gradient: {error}; try --dtype float32") from None

                output.register_hook(take)

            return hook

        base = self.model.base_model
        handles = [base.get_submodule(name).register_forward_hook(observe(m)) for name, m in sites.items()]
        try:
            for rows in self.runner.slices:
                size = rows.stop - rows.start
                with torch.enable_grad():
                    state = self._inputs[layer][rows].to(self.model.device).requires_grad_()
                    output = self.runner.run(layer, state)
                    (gradient,) = torch.autograd.grad(output, state, self.gradient[rows].to(self.model.device))
                self.gradient[rows] = gradient.to("cpu")
                if tick:
                    tick(rows.stop - rows.start)
        finally:
            for handle in handles:
                handle.remove()
        self._inputs[layer] = torch.empty(0)
        return {name: item.result() for name, item in statistics.items()}
