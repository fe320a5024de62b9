"""Decoder blocks in memory for their turn: a model larger than memory, as its weights stay in their files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil
from torch import nn

from bolaco.work.pages import mapped, release

# Of the memory that is free, what weights may take before they are streamed: the rest is for statistics and training.
_SHARE = 0.5
# Norms and the like are often converted.
_MOST = 0.9


def take_turns(blocks: Sequence[nn.Module]) -> None:
    """From now on the memory of a block's weights is given back as soon as another block runs.

    The weights are the files' pages, as safetensors maps them; they are read again when the block has its next turn,
    from the disk where the system has no memory to keep them. What is computed stays the same, bit for bit.
    """
    here: set[int] = set()

    def before(index: int) -> Any:
        # A function, not a method: copies of a block then share it, and not a copy of all the others.
        def hook(*_: Any) -> None:
            for other in here - {index}:
                release((*blocks[other].parameters(), *blocks[other].buffers()))
            here.clear()
            here.add(index)

        return hook

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(before(index))


def needs_streaming(size: int, stream: bool | None) -> bool:
    """Whether weights of so many bytes are streamed: what was asked for, or else whether they leave too little room."""
    return size > _SHARE * psutil.virtual_memory().available if stream is None else stream


def why_not_streamed(model: nn.Module, source_quantized: bool = False) -> str:
    """Why the weights of a model that was loaded cannot be streamed; empty if they can."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        return f"they are on {device}"
    inside, total = mapped(model.parameters())
    if inside >= _MOST * total:
        return ""
    if source_quantized:
        return "they are stored quantized and are float32 in memory"
    return "they are not pages of files here, which needs Linux, and a model in a folder"
