"""What a block is trained towards: the original block's output, in one of two metrics or a mix of both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# From outputs [sequences, length, d], those wanted and the rows of the text that they are of, to a mean over tokens.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

_TINY = 1e-12


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Each token's squared error over the squared norm of the output wanted, averaged (AA-SVD, arXiv 2604.02119).

    Tokens with massive activations count as much as the others.
    """
    error = output.float() - target.float()
    size = target.float().square().sum(dim=-1).clamp(min=_TINY)
    return (error.square().sum(dim=-1) / size).mean()


def curved_error(output: Tensor, target: Tensor, curvature: Tensor) -> Tensor:
    """``e^T R e / 2`` of each token, averaged: nats, to second order, if R is the Fisher information of the output.

    Args:
        output, target: ``[..., d]``.
        curvature: R, ``[d, d]``, symmetric.
    """
    error = output.float() - target.float()
    return ((error @ curvature) * error).sum(dim=-1).mean() / 2


class OutputLoss:
    """A mix of :func:`relative_error` and :func:`curved_error`, each over what it is before anything is trained.

    Args:
        curvature: Fisher information of the output, ``[d, d]``; None where it is not known.
        share: of the second one in the mix.

    Attributes:
        scale: what each of the two is divided by.
    """

    def __init__(self, curvature: Tensor | None = None, share: float = 0.0) -> None:
        self.curvature = None if curvature is None or share == 0 else curvature.float()
        self.share = share
        self.scale = 1.0, 1.0

    def begin(self, output: Tensor, target: Tensor) -> tuple[float, float]:
        """Takes what both errors are before training, so that they count by how much of them is left; returns that."""
        if self.curvature is not None:
            plain, curved = relative_error(output, target), curved_error(output, target, self.curvature)
            self.scale = max(float(plain), _TINY), max(float(curved), torch.finfo(torch.float32).tiny)
        return self.scale

    def __call__(self, output: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        """The loss of one batch."""
        if self.curvature is None:
            return relative_error(output, target)
        plain, curved = relative_error(output, target), curved_error(output, target, self.curvature)
        return (1 - self.share) * plain / self.scale[0] + self.share * curved / self.scale[1]
