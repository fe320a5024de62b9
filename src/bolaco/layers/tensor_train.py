"""A matrix as a train of small cores, and the layer that adds one to another (TT-LoRA, arXiv 2408.01008).

With in = m_1 ... m_p and out = n_1 ... n_q the cores are G_t ``[r_{t-1}, s_t, r_t]`` for the sizes
``s = (m_1, ..., m_p, n_q, ..., n_1)``, inputs first and outputs reversed, and ``r_0 = r_{p+q} = 1``. An input index is
``(i_1, ..., i_p)`` and an output index ``(j_1, ..., j_q)``, both with the last digit fastest, and

    dW[j, i] = G_1[i_1] ... G_p[i_p] G_{p+1}[j_q] ... G_{p+q}[j_1],

a product of small matrices. Multiplying the cores into one tensor and reshaping that to ``[in, out]`` leaves the output
digits in the order of the cores, ``j_q`` slowest: a different operator, which this is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# (in, out) -> factors of both as published; outputs in the order n_1, n_2, ...
PUBLISHED: dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]] = {
    (768, 768): ((64, 4, 3), (64, 4, 3)),
    (2048, 2048): ((16, 8, 4, 4), (16, 8, 4, 4)),
    (2048, 512): ((16, 16, 4, 2), (16, 16, 2)),
}


def train_sizes(in_features: int, out_features: int, rank: int, factors: int) -> tuple[tuple[int, ...], ...]:
    """Factors of both sizes: the published ones where there are some, else those of :func:`factorization`."""
    known = PUBLISHED.get((in_features, out_features))
    return known or (factorization(in_features, rank, factors), factorization(out_features, rank, factors))


@cache
def factorization(size: int, rank: int, factors: int) -> tuple[int, ...]:
    """``size`` as a product of at most ``factors`` numbers above 1, largest first, with the smallest cores.

    The first factor's core has one neighbour and ``rank`` numbers for each index, the others ``rank`` squared. Of equal
    choices it takes the one with fewer factors, then the one with the smaller first. A prime is its own and only
    factor, and 1 is ``(1,)``.
    """

    def cost(choice: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        return rank * choice[0] + rank * rank * sum(choice[1:]), len(choice), choice

    return min(_products(size, factors, size), key=cost) if size > 1 else (1,)


def _products(size: int, factors: int, largest: int) -> Iterator[tuple[int, ...]]:
    """Every way to write ``size`` as at most ``factors`` numbers between 2 and ``largest`` that do not increase."""
    if size <= largest:
        yield (size,)
    if factors > 1:
        for first in range(2, min(largest, size // 2) + 1):
            if size % first == 0:
                for rest in _products(size // first, factors - 1, first):
                    yield (first, *rest)


class TensorTrain(nn.Module):
    """The operator dW; zero at first, because its last core is.

    Args:
        inputs: m_1, ..., m_p.
        outputs: n_1, ..., n_q.
        rank: of every bond inside.
        generator: of the other cores, which are drawn so that each contraction keeps the variance.
        dtype, device: of the cores.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        rank: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.rank = inputs, outputs, rank
        sizes = (*inputs, *reversed(outputs))
        bonds = (1, *[rank] * (len(sizes) - 1), 1)
        cores = []
        for t, size in enumerate(sizes):
            summed = bonds[t] * (size if t < len(inputs) else 1)
            core = torch.randn(bonds[t], size, bonds[t + 1], generator=generator) / math.sqrt(summed)
            cores.append(nn.Parameter((core * (t < len(sizes) - 1)).to(device, dtype)))
        self.cores = nn.ParameterList(cores)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``, core by core; dW is never formed."""
        z = x.reshape(-1, 1, x.shape[-1])
        count = len(z)
        for t, core in enumerate(self.cores):
            before, size, after = core.shape
            if t < len(self.inputs):  # [b, before, size * rest] -> [b, after, rest]
                z = core.reshape(before * size, after).T @ z.reshape(count, before * size, -1)
            else:  # [b, before, done] -> [b, after, size * done]
                z = (core.permute(2, 1, 0).reshape(after * size, before) @ z).reshape(count, after, -1)
        return z.reshape(*x.shape[:-1], -1)

    def dense(self) -> Tensor:
        """dW, ``[out, in]``, in float64."""
        cores = [core.detach().double() for core in self.cores]
        left = torch.ones(1, 1, dtype=torch.float64, device=cores[0].device)
        for core in cores[: len(self.inputs)]:
            left = torch.einsum("ia,amb->imb", left, core).reshape(-1, core.shape[2])
        right = left.new_ones(1, 1)
        for core in reversed(cores[len(self.inputs) :]):  # from n_1 on
            right = torch.einsum("anb,bj->ajn", core, right).reshape(core.shape[0], -1)
        return (left @ right).T


class TrainAdapter(nn.Module):
    """``y = layer(x) + alpha dW x``, around any layer that maps vectors."""

    def __init__(self, layer: nn.Module, train: TensorTrain, alpha: float) -> None:
        super().__init__()
        self.layer, self.train_of_cores, self.alpha = layer, train, alpha

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        adapted: Tensor = self.layer(x) + self.alpha * self.train_of_cores(x)
        return adapted

    def merged(self) -> nn.Module:
        """The dense layer with ``alpha dW`` in its weight, computed in float64."""
        weight = self.layer.weight.data
        assert isinstance(weight, Tensor)
        change = self.alpha * self.train_of_cores.dense()
        weight.copy_(weight.double() + (change.T if isinstance(self.layer, Conv1D) else change))
        return self.layer


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a layer."""
    if isinstance(layer, Conv1D):
        return int(layer.nx), int(layer.nf)
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
