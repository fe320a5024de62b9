"""Second moments of the loss gradient at the outputs of linear layers: the output side of a Kronecker-factored Fisher.

``G = E[g g^T]`` with ``g`` the gradient of a token's loss summed over the sequence, at the layer's output. Labels are
sampled from the model itself, so this is the Fisher information, not the empirical one. One forward pass records the
inputs of every block; then the blocks are run again one at a time, last to first, with autograd inside one block
only. Memory is the model, one block's graph and statistics, and the recorded block inputs (on disk if asked).
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
from bolaco.models.structure import Site, Structure
from bolaco.objective import SLAB, Head
from bolaco.statistics.blocks import Arguments, BlockRunner, cache_tensor, split_arguments
from bolaco.statistics.moments import PooledMoments


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter asks for a gradient while this lasts: only activations are differentiated."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


class GradientWalk:
    """Output-gradient second moments of a model, block by block from the last to the first.

    Args:
        model: the model, in evaluation mode; its parameters are frozen while it is used.
        structure: its structure.
        tokens: ``[sequences, length]``.
        batch: sequences per pass.
        seed: of the sampled labels.
        folder: record block inputs in memory-mapped files here instead of in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        tokens: Tensor,
        batch: int,
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.model, self.structure, self.tokens = model, structure, tokens
        self.runner = BlockRunner(model, structure, tokens, batch)
        self.head = Head(model)
        self._seed, self._folder = seed, folder
        self._inputs: list[Tensor] = []
        self._gradient = torch.empty(0)

    def run(self, tick: Callable[[int], Any] | None = None) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yields ``(layer, {site name: G [out, out] float64})``, last block first.

        ``tick`` is called with the sequences done, ``num_layers + 1`` times each sequence in all.

        Raises:
            NonFiniteError: a gradient with NaN or infinity; names the matrix.
        """
        with _frozen(self.model):
            self._forward(tick)
            for layer in reversed(range(self.structure.num_layers)):
                yield layer, self._backward(layer, tick)
        self.close()

    def close(self) -> None:
        """Frees what was recorded."""
        self._inputs, self._gradient = [], torch.empty(0)
        if self._folder is not None:
            for file in self._folder.glob("inputs-*.cache"):
                file.unlink()

    def _allocate(self, index: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        file = None if self._folder is None else self._folder / f"inputs-{index:05d}.cache"
        return cache_tensor((len(self.tokens), *shape[1:]), dtype, file)

    def _forward(self, tick: Callable[[int], Any] | None) -> None:
        """Records every block's input and arguments, and the loss gradient at the last block's output."""
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
                with torch.enable_grad():
                    tokens = self.tokens[rows].to(self.model.device)
                    final = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
                    upstream = self._label_gradient(final.detach(), generator)
                    (gradient,) = torch.autograd.grad(final, leaves[0], upstream)
                for index, (_, state) in enumerate(seen):
                    if len(self._inputs) <= index:
                        self._inputs.append(self._allocate(index, state.shape, state.dtype))
                    self._inputs[index][rows] = state.to("cpu")
                if self._gradient.numel() == 0:
                    self._gradient = torch.empty((len(self.tokens), *gradient.shape[1:]), dtype=gradient.dtype)
                self._gradient[rows] = gradient.to("cpu")
                self.runner.arguments[rows.stop - rows.start] = [rest for rest, _ in seen]
                if tick:
                    tick(rows.stop - rows.start)
        finally:
            for handle in handles:
                handle.remove()

    def _label_gradient(self, final: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient of the summed loss of sampled labels with respect to final hidden states ``[b, length, d]``.

        Computed a slab of positions at a time, as everywhere.
        """
        flat = final.flatten(0, 1)
        result = torch.empty_like(flat)
        chunk = max(1, SLAB // (4 * self.head.linear.weight.shape[0]))
        for start in range(0, len(flat), chunk):
            states = flat[start : start + chunk].requires_grad_()
            logits = self.head(states)
            with torch.no_grad():
                # Inverse of the distribution function; torch.multinomial takes ten times as long on large vocabularies.
                cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
                drawn = torch.rand(len(states), 1, generator=generator, device=states.device) * cumulative[:, -1:]
                labels = torch.searchsorted(cumulative, drawn)[:, 0].clamp(max=logits.shape[-1] - 1)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            (result[start : start + chunk],) = torch.autograd.grad(loss, states)
        return result.view_as(final)

    def _backward(self, layer: int, tick: Callable[[int], Any] | None) -> dict[str, Tensor]:
        """Runs one block again with autograd; moves the gradient to its input."""
        sites: dict[str, list[Site]] = {}
        for site in self.structure.of_layer(layer):
            sites.setdefault(site.module, []).append(site)
        moments = {
            site.name: PooledMoments(site.out_features, device=self.model.device)
            for members in sites.values()
            for site in members
        }

        def observe(members: list[Site]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            def take(gradient: Tensor) -> None:
                for site in members:
                    try:
                        moments[site.name].update(gradient[..., slice(*site.rows)])
                    except NonFiniteError as error:
                        raise NonFiniteError(f"{site.name}, gradient: {error}; try --dtype float32") from None

            def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
                output.register_hook(take)

            return hook

        base = self.model.base_model
        handles = [base.get_submodule(name).register_forward_hook(observe(m)) for name, m in sites.items()]
        try:
            for rows in self.runner.slices:
                with torch.enable_grad():
                    state = self._inputs[layer][rows].to(self.model.device).requires_grad_()
                    output = self.runner.run(layer, state)
                    (gradient,) = torch.autograd.grad(output, state, self._gradient[rows].to(self.model.device))
                self._gradient[rows] = gradient.to("cpu")
                if tick:
                    tick(rows.stop - rows.start)
        finally:
            for handle in handles:
                handle.remove()
        self._inputs[layer] = torch.empty(0)
        return {name: item.finalize().second_moment for name, item in moments.items()}
