"""The loss of a model that is tuned: next-token prediction, and KL(teacher || model) if it has a teacher.

Logits take most memory where the vocabulary is large. They are computed for a slab of positions at a time, used and
dropped, and computed again when their gradient is needed. So their memory does not grow with the batch; what is kept
for all positions is the final hidden states, of model and teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bolaco.errors import NonFiniteError
from bolaco.evaluation.objective import SLAB, Head, final_hidden

# The label of positions without loss.
IGNORED = -100


def summed_losses(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    teacher: tuple[Head, Tensor] | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Next-token loss and KL(teacher || model), each summed over all positions with a label, in nats.

    Args:
        head: head of the model.
        hidden: ``[..., d]``, final hidden states of the model.
        labels: ``[...]``, the token to predict at each position; :data:`IGNORED` where there is none.
        teacher: head of the teacher, and its final hidden states ``[..., d of the teacher]`` at the same positions.
            Without a teacher KL is zero.
        chunk: positions whose logits are in memory at once; by default as many as fit into 24 MiB.
    """
    chosen = labels != IGNORED
    states, targets = hidden[chosen], labels[chosen]
    others = None if teacher is None else teacher[1][chosen]
    chunk = chunk or max(1, SLAB // (4 * head.linear.weight.shape[0]))

    def part(states: Tensor, targets: Tensor, others: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = head(states)
        normaliser = logits.logsumexp(dim=-1)
        nll = (normaliser - logits.gather(1, targets[:, None])[:, 0]).sum()
        if teacher is None or others is None:
            return nll, torch.zeros_like(nll)
        with torch.no_grad():
            wanted = teacher[0](others).log_softmax(dim=-1)
            probability = wanted.exp()
            minus_entropy = (probability * wanted).sum()
        # sum_v p (log p - log q) with log q = logits - normaliser
        return nll, minus_entropy - (probability * logits).sum() + normaliser.sum()

    nll = kl = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(states), chunk):
        rows = slice(start, start + chunk)
        sums = checkpoint(
            part, states[rows], targets[rows], None if others is None else others[rows], use_reentrant=False
        )
        nll, kl = nll + sums[0], kl + sums[1]
    return nll, kl


class Student(nn.Module):
    """A model with its loss, as the Trainer needs it: batch in, loss out.

    Args:
        model: the model to train, prepared by a mode.
        weight: weight of the distillation term, in [0, 1].
        teacher: the teacher, in evaluation mode; needed if ``weight`` is above 0.
        chunk: see :func:`summed_losses`.
    """

    # Makes the Trainer pass the number of labels in all forward passes of a step, so that every token counts the same.
    accepts_loss_kwargs = True

    def __init__(
        self,
        model: PreTrainedModel,
        weight: float = 0.0,
        teacher: PreTrainedModel | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.weight, self.chunk = weight, chunk
        # In a tuple, so that no module among them is registered: saved, moved, or put into training mode.
        self._unregistered = Head(model), teacher, None if teacher is None else Head(teacher)

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Any:
        """The mean loss of a batch, in nats a token.

        Args:
            input_ids: ``[sequences, length]``.
            labels: ``[sequences, length]``, the next token of each position, or :data:`IGNORED`.
            num_items_in_batch: what the sum is divided by; default: the number of labels in the batch.
        """
        head, teacher, teacher_head = self._unregistered
        known = None
        if teacher is not None and teacher_head is not None:
            with torch.no_grad():
                known = teacher_head, final_hidden(teacher, input_ids)
        nll, kl = summed_losses(head, final_hidden(self.model, input_ids), labels, known, self.chunk)
        count = num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum()
        return {"loss": ((1 - self.weight) * nll + self.weight * kl) / count}

    def gradient_checkpointing_enable(self, **arguments: Any) -> None:
        """Switches it on in the model; the Trainer calls this if ``trainer.gradient_checkpointing`` is set."""
        self.model.gradient_checkpointing_enable(**arguments)
        self.model.enable_input_require_grads()


def mean_loss(
    model: PreTrainedModel,
    examples: list[dict[str, Tensor]],
    collate: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]],
    batch: int,
    chunk: int | None = None,
    tick: Callable[[int], Any] | None = None,
) -> tuple[float, int]:
    """Mean next-token loss of a model over all labels, in nats a token, and the number of labels.

    Args:
        model: the model, in evaluation mode.
        examples: sequences, ``input_ids`` and ``labels`` ``[length]`` each.
        collate: makes a batch of some of them.
        batch: sequences in a forward pass.
        chunk: see :func:`summed_losses`.
        tick: called after each forward pass with the number of its sequences.

    Raises:
        NonFiniteError: the loss is NaN.
    """
    head = Head(model)
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(examples), batch):
            rows = collate(examples[start : start + batch])
            labels = rows["labels"].to(model.device)
            # A sequence at a time: the sum of a sequence does not depend on the others in its batch.
            for states, targets in zip(final_hidden(model, rows["input_ids"]), labels, strict=True):
                total += float(summed_losses(head, states, targets, chunk=chunk)[0])
            count += int((labels != IGNORED).sum())
            if tick:
                tick(len(labels))
    if math.isnan(total):
        raise NonFiniteError("the loss on the evaluation text is NaN; try --dtype float32")
    return total / count, count
