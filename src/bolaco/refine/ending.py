"""The end of a model, from the output of its last block to the distribution of the next token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bolaco.evaluation.losses import summed_losses
from bolaco.evaluation.objective import Head, final_hidden
from bolaco.models.walk import BlockRunner, agrees, state_in


class Ending:
    """What follows the last block: norm and head.

    The model itself is run, with its blocks skipped, so that whatever a family does behind them is done here too.

    Args:
        runner: of the model, whose arguments are recorded.
        chunk: positions whose logits are in memory at once; by default as many as fit into a slab.
    """

    def __init__(self, runner: BlockRunner, chunk: int | None = None) -> None:
        self.runner, self.head = runner, Head(runner.model)
        self.chunk = chunk
        self._output: Any = None

    def right(self) -> bool:
        """Whether this is what the model does, seen on the first sequence."""
        model, tokens = self.runner.model, self.runner.tokens[:1]
        seen: list[Any] = []
        handle = self.runner.blocks[-1].register_forward_hook(lambda _, args, output: seen.append(output))
        try:
            with torch.no_grad():
                expected = final_hidden(model, tokens)
        finally:
            handle.remove()
        self._output = seen[-1]
        with torch.no_grad():
            found = self.final(self.runner.kept(state_in(seen[-1])), tokens)
        return agrees(found, expected)

    def final(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Final hidden states ``[sequences, length, d]`` from outputs of the last block, as a runner keeps them."""
        with self._skipped(states.to(self.runner.model.dtype)):
            return final_hidden(self.runner.model, tokens)

    @contextmanager
    def _skipped(self, states: Tensor) -> Iterator[None]:
        """While it lasts every block hands on what it is given, and the last one these states."""
        blocks = self.runner.blocks
        if self._output is None:
            raise RuntimeError("ask whether it is right first")
        given = self.runner.placed(states)

        def whole(state: Tensor) -> Any:
            output = self._output
            return type(output)([state, *output[1:]]) if isinstance(output, tuple | list) else state

        def passed(*args: Any, **kwargs: Any) -> Any:
            return whole(args[0] if args else kwargs["hidden_states"])

        try:
            for block in blocks[:-1]:
                _set_forward(block, passed)
            _set_forward(blocks[-1], lambda *args, **kwargs: whole(given))
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)  # the class's own is behind it

    def divergence(self, states: Tensor, wanted: Tensor, tokens: Tensor) -> Tensor:
        """KL(original || compressed) of the next token, the mean over all positions, in nats; differentiable.

        Args:
            states: outputs of the last block in the compressed model.
            wanted: those of the original.
            tokens: ``[sequences, length]`` that they are of.
        """
        with torch.no_grad():
            known = self.final(wanted, tokens)
        final = self.final(states, tokens)
        everywhere = torch.zeros(final.shape[:-1], dtype=torch.int64, device=final.device)
        divergence = summed_losses(self.head, final, everywhere, (self.head, known), self.chunk)[1]
        return divergence / tokens.numel()


def _set_forward(block: nn.Module, function: Any) -> None:
    block.__dict__["forward"] = function
