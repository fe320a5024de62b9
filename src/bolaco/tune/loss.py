"""The loss of a model that is tuned, as the Trainer needs it, and its mean over a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.errors import NonFiniteError
from bolaco.evaluation.losses import IGNORED, summed_losses
from bolaco.evaluation.objective import Head, final_hidden


class Student(nn.Module):
    """A model with its loss, as the Trainer needs it: batch in, loss out.

    Args:
        model: the model to train, prepared by a mode.
        weight: weight of the distillation term, in [0, 1].
        teacher: the teacher, in evaluation mode; needed if ``weight`` is above 0.
        chunk: see :func:`bolaco.evaluation.losses.summed_losses`.
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
        chunk: see :func:`bolaco.evaluation.losses.summed_losses`.
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
