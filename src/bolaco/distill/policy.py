"""What a policy-gradient step descends, by the name of the algorithm.

Both take the leave-one-out baseline (RLOO, arXiv 2402.14740): a text is compared with the others of its label in the
same batch, which needs no value head. TRL is not used: its trainers train one adapter behind texts to go on from, and
here a batch has a prompt for each label, no text before it, and a reward that looks at earlier samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Algorithm:
    """A way to use a batch of samples.

    Attributes:
        passes: optimiser steps on each batch.
        loss: log-probabilities of the tokens now and when they were sampled ``[batch, length]``, the mask of what is a
            token, and advantages ``[batch]``, to the loss.
    """

    passes: int
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """Rewards over the mean reward of the others in the same group, over the deviation of all.

    Args:
        rewards: ``[batch]``.
        groups: ``[batch]``; one that is alone in its group is compared with all others.
    """
    same = groups[:, None] == groups[None]
    same.fill_diagonal_(False)
    alone = ~same.any(1)
    others = ~torch.eye(len(rewards), dtype=torch.bool, device=rewards.device)
    compared = torch.where(alone[:, None], others, same).to(rewards.dtype)
    found = rewards - compared @ rewards / compared.sum(1)
    return found / (found.std() + 1e-6)


def _reinforce(now: Tensor, before: Tensor, mask: Tensor, advantage: Tensor) -> Tensor:
    """REINFORCE: the log-probability of a text, times its advantage; a mean over texts and of tokens' mean length."""
    return -(advantage * (now * mask).sum(1)).sum() / mask.sum()


_CLIP = 0.2


def _ppo(now: Tensor, before: Tensor, mask: Tensor, advantage: Tensor) -> Tensor:
    """The clipped surrogate of PPO (arXiv 1707.06347), a mean over tokens."""
    ratio = (now - before).exp()
    gain = torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - _CLIP, 1 + _CLIP) * advantage[:, None])
    return -(gain * mask).sum() / mask.sum()


ALGORITHMS = {"rloo": Algorithm(1, _reinforce), "ppo": Algorithm(4, _ppo)}
