"""Running decoder blocks on their own.

Between two blocks there is nothing but hidden states; everything else a block is called with (masks, rotary angles)
depends on the batch's size only and is recorded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.errors import NonFiniteError
from bolaco.models.structure import Site, Structure

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Enough(Exception):
    """Stops a forward pass once what it was run for is known."""


def split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """A decoder block's hidden states, and the other arguments of its call."""
    kwargs = dict(kwargs)
    state = args[0] if args else kwargs.pop("hidden_states")
    return state, (args[1:], kwargs)


def cache_tensor(shape: tuple[int, ...], dtype: torch.dtype, file: Path | None) -> Tensor:
    """An empty tensor in memory, or mapped to a file."""
    if file is None:
        return torch.empty(shape, dtype=dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    return torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in nested arguments, in another precision."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {name: _cast(item, dtype) for name, item in value.items()}
    return value


class BlockRunner:
    """Calls the decoder blocks of a model, or stand-ins for them, on given hidden states.

    Args:
        model: the model, in evaluation mode.
        structure: its structure.
        tokens: ``[sequences, length]``.
        batch: sequences per call.

    Attributes:
        blocks: the model's decoder blocks.
        slices: the batches, as slices of the sequences.
        arguments: what each block is called with besides hidden states, by batch size.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure, tokens: Tensor, batch: int) -> None:
        self.model, self.structure, self.tokens = model, structure, tokens
        self.blocks = structure.block_list(model)
        self.slices = [slice(a, min(a + batch, len(tokens))) for a in range(0, len(tokens), batch)]
        self.arguments: dict[int, list[Arguments]] = {}

    def embed(self, file: Path | None = None) -> Tensor:
        """Hidden states that enter the first block, ``[sequences, length, d]``; records the arguments.

        They are held in memory, or mapped to ``file``.
        """
        hidden: Tensor | None = None
        seen: list[tuple[Arguments, Tensor]] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state, rest = split_arguments(args, kwargs)
            seen.append((rest, state))
            if stop_early:
                raise _Enough

        handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in self.blocks]
        try:
            for rows in self.slices:
                size = rows.stop - rows.start
                # The first batch of each size runs whole: masks and rotary angles may differ from block to block.
                stop_early = size in self.arguments
                seen.clear()
                try:
                    with torch.no_grad():
                        self.model.base_model(input_ids=self.tokens[rows].to(self.model.device), use_cache=False)
                except _Enough:
                    pass
                if not stop_early:
                    self.arguments[size] = [rest for rest, _ in seen]
                state = seen[0][1]
                if hidden is None:
                    hidden = cache_tensor((*self.tokens.shape, state.shape[-1]), state.dtype, file)
                hidden[rows] = state.to("cpu")
        finally:
            for handle in handles:
                handle.remove()
        assert hidden is not None  # there is at least one batch
        return hidden

    def run(self, layer: int, state: Tensor, block: nn.Module | None = None) -> Tensor:
        """Output of block ``layer`` (or of ``block`` in its place) for one batch of hidden states."""
        args, kwargs = self.arguments[len(state)][layer]
        block = block or self.blocks[layer]
        # A stand-in may be of another precision than the model (float32 while it is trained).
        dtype = next(block.parameters()).dtype
        args, kwargs = _cast((args, kwargs), dtype)
        output = block(state.to(self.model.device, dtype), *args, **kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def advance(
        self,
        layer: int,
        hidden: Tensor,
        block: nn.Module | None = None,
        before: Callable[[slice], Any] | None = None,
        tick: Callable[[int], Any] | None = None,
    ) -> None:
        """Replaces the hidden states of all sequences by the outputs of block ``layer`` or of ``block`` in its place.

        ``before`` is called with each batch before it is run, ``tick`` with its size after.

        Raises:
            NonFiniteError: an output with NaN or infinity.
        """
        for rows in self.slices:
            if before:
                before(rows)
            with torch.no_grad():
                output = self.run(layer, hidden[rows], block)
            if not torch.isfinite(output).all():
                which = "its" if block is None else "the compressed model's"
                raise NonFiniteError(
                    f"block {layer}: {which} output holds NaN or infinity on calibration sequences "
                    f"{rows.start}-{rows.stop - 1}; try --dtype float32"
                )
            hidden[rows] = output.to("cpu")
            if tick:
                tick(rows.stop - rows.start)

    def input_of(self, site: Site, state: Tensor, block: nn.Module | None = None) -> Tensor:
        """Input ``[batch, length, in]`` of one matrix when its block runs on ``state``; what follows it is not run."""
        block = block or self.blocks[site.layer]
        found: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise _Enough

        handle = block.get_submodule(self.structure.name_in_block(site)).register_forward_pre_hook(take)
        try:
            with torch.no_grad():
                self.run(site.layer, state, block)
        except _Enough:
            pass
        finally:
            handle.remove()
        # OPT flattens sequences and positions before its feed-forward matrices.
        return found[0].reshape(len(state), -1, found[0].shape[-1])
