"""Losses of a model on token blocks: perplexity, and the reverse KL divergence to a reference model.

The vocabulary never costs more than a fixed slab: logits are computed from final hidden states, a few positions at a
time. Of the reference only the final hidden states are kept (its logits are the same head's).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.errors import DataError, NonFiniteError, UnsupportedModelError
from bolaco.models.structure import trunk
from bolaco.models.structure import vocabulary as vocabulary_of
from bolaco.models.walk import agrees

# Bytes of one chunk of logits.
SLAB = 24 * 2**20


class Head:
    """From final hidden states to logits: the model's output embedding and what the family does after it.

    Where that is more than is known here, it is the model's own forward pass behind a base model that only hands out
    hidden states.

    Raises:
        UnsupportedModelError: these logits are not the model's own (checked once, on a few tokens).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.linear = model.get_output_embeddings()
        config = model.config
        if self.linear is None:
            raise UnsupportedModelError(f"{type(model).__name__} has no output embedding")
        self.softcap = getattr(config, "final_logit_softcapping", None)
        # Granite divides, Cohere multiplies; others have neither.
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self._whole: tuple[PreTrainedModel, Any] | None = None
        self._check(model)

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[n, d]`` to logits ``[n, vocabulary]``, float32 (float64 of a float64 model)."""
        logits: Tensor = self.linear(hidden) if self._whole is None else self._behind(hidden)
        if logits.dtype != torch.float64:
            logits = logits.float()
        if self._whole is not None:
            return logits
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def _behind(self, hidden: Tensor) -> Tensor:
        """What the model makes of final hidden states ``[n, d]``."""
        assert self._whole is not None
        model, output = self._whole
        base = trunk(model)
        given = copy.copy(output)
        if isinstance(given, tuple):
            given = (hidden[None], *given[1:])
        else:
            given[next(iter(given))] = hidden[None]
        base.forward = lambda *args, **kwargs: given
        try:
            tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits[0]
            return logits
        finally:
            del base.forward  # the class's own is behind it

    def _check(self, model: PreTrainedModel) -> None:
        if model.device.type == "meta":
            return
        tokens = torch.arange(4, device=model.device)[None] % self.linear.weight.shape[0]
        with torch.inference_mode():
            expected = model(input_ids=tokens, use_cache=False).logits[0].float()
            output = trunk(model)(input_ids=tokens, use_cache=False)
            if _close(self(output[0][0]), expected):
                return
            self._whole = (model, output)
            if _close(self(output[0][0]), expected):
                return
        raise UnsupportedModelError(
            f"{type(model).__name__} ({model.config.model_type}) transforms its logits in an unknown way"
        )


def _close(actual: Tensor, expected: Tensor) -> bool:
    # In units of the largest logit: half precision rounds less than that, and small logits are checked too.
    return actual.shape == expected.shape and agrees(actual, expected)


def final_hidden(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Final hidden states ``[sequences, length, d]`` of ``tokens``."""
    states: Tensor = trunk(model)(input_ids=tokens.to(model.device), use_cache=False)[0]
    return states


def check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    """Stops if there is a token that the model has no embedding for.

    Raises:
        DataError: it names the token.
    """
    size = vocabulary_of(model)
    if tokens.numel() and int(tokens.max()) >= size:
        raise DataError(
            f"the text holds token {int(tokens.max())}, but the model has embeddings of {size} tokens only; "
            "the tokenizer is another model's"
        )


def hidden_states(
    model: PreTrainedModel, blocks: Tensor, batch: int, tick: Callable[[int], Any] | None = None
) -> Tensor:
    """Final hidden states of all blocks, ``[sequences, length, d]`` on the CPU in the model's dtype."""
    parts = []
    with torch.inference_mode():
        for rows in blocks.split(batch):
            parts.append(final_hidden(model, rows).to("cpu"))
            if tick:
                tick(len(rows))
    return torch.cat(parts)


@dataclass(frozen=True)
class Scores:
    """Per-sequence results.

    Attributes:
        nll: ``[sequences]`` float64, nats summed over the predicted positions.
        kl: ``[sequences]`` float64, KL(model || reference) summed over all positions; zeros without a reference.
        predicted: positions predicted in each sequence (its length minus one).
    """

    nll: Tensor
    kl: Tensor
    predicted: int

    @property
    def perplexity(self) -> float:
        """exp of the mean loss over all predicted positions."""
        return _exp(float(self.nll.sum()) / (self.predicted * len(self.nll)))

    @property
    def perplexities(self) -> Tensor:
        """``[sequences]``."""
        return (self.nll / self.predicted).exp()

    @property
    def mean_kl(self) -> float:
        """KL summed over positions, averaged over sequences (arXiv 2405.10616, section 3.2)."""
        return float(self.kl.mean())

    def objective(self, kl_weight: float) -> float:
        """Perplexity + ``kl_weight`` x KL."""
        return self.perplexity + kl_weight * self.mean_kl


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def score(
    model: PreTrainedModel,
    head: Head,
    blocks: Tensor,
    batch: int = 4,
    reference: Tensor | None = None,
    slab: int = SLAB,
    tick: Callable[[int], Any] | None = None,
) -> Scores:
    """Losses of ``model`` on ``blocks`` ``[sequences, length]``.

    Args:
        model: the model, in evaluation mode.
        head: its head.
        blocks: token blocks; every position but the first is predicted.
        batch: sequences per forward pass.
        reference: final hidden states of the reference on the same blocks, for the KL term.
        slab: bytes a chunk of logits may take.
        tick: called with the number of sequences done.

    Raises:
        NonFiniteError: a NaN among the losses; names the sequence.
    """
    check_tokens(model, blocks)
    vocabulary = head.linear.weight.shape[0]
    chunk = max(1, slab // (4 * vocabulary))
    losses, divergences = [], []
    with torch.inference_mode():
        for start in range(0, len(blocks), batch):
            rows = blocks[start : start + batch]
            states = final_hidden(model, rows)
            for i, tokens in enumerate(rows):
                known = None if reference is None else reference[start + i]
                nll, kl = _sequence(head, states[i], tokens.to(states.device), known, chunk)
                if math.isnan(nll) or math.isnan(kl):
                    raise NonFiniteError(f"the loss of sequence {start + i} is NaN; try --dtype float32")
                losses.append(nll)
                divergences.append(kl)
            if tick:
                tick(len(rows))
    return Scores(
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(divergences, dtype=torch.float64),
        blocks.shape[1] - 1,
    )


def _sequence(head: Head, states: Tensor, tokens: Tensor, reference: Tensor | None, chunk: int) -> tuple[float, float]:
    """Summed loss and KL of one sequence, ``states`` being ``[length, d]``."""
    length = len(tokens)
    nll = kl = 0.0
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        logits = head(states[start:stop])
        normaliser = logits.logsumexp(dim=-1)
        predicted = min(stop, length - 1) - start
        if predicted > 0:
            targets = tokens[start + 1 : start + 1 + predicted]
            picked = logits[:predicted].gather(1, targets[:, None])[:, 0]
            nll += float((normaliser[:predicted] - picked).double().sum())
        if reference is not None:
            other = head(reference[start:stop].to(states.device))
            # sum_v p (log p - log p_ref), with log p = logits - normaliser; in place, the slab is all there is.
            other_normaliser = other.logsumexp(dim=-1)
            difference = torch.sub(logits, other, out=other)
            probability = logits.sub_(normaliser[:, None]).exp_()
            per_position = (probability * difference).sum(dim=-1) - normaliser + other_normaliser
            kl += float(per_position.double().sum())
    return nll, kl
