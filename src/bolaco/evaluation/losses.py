"""Losses that are trained on: next-token prediction, and KL(teacher || model), with gradients.

Logits take most memory where the vocabulary is large. They are computed for a slab of positions at a time, used and
dropped, and computed again when their gradient is needed. So their memory does not grow with the batch; what is kept
for all positions is the final hidden states, of model and teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bolaco.evaluation.objective import SLAB, Head

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
