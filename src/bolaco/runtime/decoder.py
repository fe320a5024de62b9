"""A decoder with an explicit cache, which is what other runtimes need: keys and values go in and come out.

Names and shapes are those that runtimes know from optimum: ``input_ids`` and ``position_ids`` ``[batch, new]``,
``attention_mask`` ``[batch, past + new]``, ``past_key_values.N.key`` and ``.value`` ``[batch, heads, past, size]``;
``logits`` ``[batch, new, vocabulary]`` and ``present.N.key``, ``present.N.value`` of length past + new.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

TOKENS = ("input_ids", "attention_mask", "position_ids")
Arrays = dict[str, NDArray[Any]]


class CachedDecoder(nn.Module):
    """A causal model called with tensors only."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits, and keys and values in turn, layer by layer; ``past_key_values`` come in the same order."""
        cache = DynamicCache()
        for layer in range(len(past_key_values) // 2):
            cache.update(past_key_values[2 * layer], past_key_values[2 * layer + 1], layer)
        made = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in made.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (made.logits, *present)


def cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Heads and size of every tensor of the cache, as a forward pass leaves it; nothing where it leaves another one."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad():
        cache = model(input_ids=tokens, past_key_values=DynamicCache(), use_cache=True).past_key_values
    found: list[tuple[int, int]] = []
    for layer in getattr(cache, "layers", ()):
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if not isinstance(tensor, Tensor) or tensor.ndim != 4 or tensor.shape[2] != 2:
                return []
            found.append((tensor.shape[1], tensor.shape[3]))
    return found


def cache_names(kind: str, count: int) -> list[str]:
    """Names of so many tensors of the cache; ``kind`` is ``past_key_values`` or ``present``."""
    return [f"{kind}.{index // 2}.{'value' if index % 2 else 'key'}" for index in range(count)]


class Decoder(ABC):
    """An exported model in its runtime; it holds the cache of one batch.

    Attributes:
        shapes: heads and size of every tensor of the cache.
    """

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        self.shapes = shapes
        self._past: Arrays = {}

    @abstractmethod
    def run(self, inputs: Arrays) -> Arrays:
        """One call: all outputs by name."""

    def start(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, n, vocabulary]`` of a prompt ``[batch, n]``, with an empty cache."""
        names = cache_names("past_key_values", len(self.shapes))
        empty = [np.zeros((len(tokens), heads, 0, size), dtype=np.float32) for heads, size in self.shapes]
        self._past = dict(zip(names, empty, strict=True))
        return self.step(tokens)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits of the tokens ``[batch, n]`` that follow."""
        past = next(iter(self._past.values())).shape[2]
        batch, new = tokens.shape
        places = np.broadcast_to(np.arange(past, past + new, dtype=np.int64), (batch, new))
        given = (tokens.numpy().astype(np.int64), np.ones((batch, past + new), dtype=np.int64), places)
        made = self.run(dict(zip(TOKENS, given, strict=True)) | self._past)
        self._past = {f"past_key_values.{k.partition('.')[2]}": v for k, v in made.items() if k.startswith("present.")}
        return torch.from_numpy(np.asarray(made["logits"]))

    def greedy(self, tokens: Tensor, new: int) -> Tensor:
        """``[batch, n + new]``: the prompt, and the likeliest tokens after it."""
        found, last = tokens, tokens
        for index in range(new):
            logits = self.step(last) if index else self.start(last)
            last = logits[:, -1].argmax(dim=-1, keepdim=True)
            found = torch.cat([found, last], dim=1)
        return found
