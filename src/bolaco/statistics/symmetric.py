"""Symmetric matrices in half the numbers: one triangle, folded into a rectangle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor


def folded_size(n: int) -> int:
    """Numbers of a folded ``[n, n]`` matrix."""
    return n * (n + 1) // 2


def fold(matrix: Tensor) -> Tensor:
    """The lower triangle of a symmetric ``[n, n]`` matrix as ``[n/2, n+1]``, of an odd one as ``[n, (n+1)/2]``.

    Its lower right block is turned into the empty half of the upper left one, so whole blocks are copied and no index
    of single elements is made.
    """
    n = len(matrix)
    half = (n + 1) // 2
    rest = n - half
    block = matrix.new_zeros(half, rest + 1)
    block[:, :half] = matrix[:half, :half].tril()
    block[:rest, 1:] += matrix[half:, half:].triu()
    return torch.cat([block, matrix[half:, :half]], dim=0 if n % 2 else 1)


def unfold(folded: Tensor) -> Tensor:
    """The symmetric matrix that :func:`fold` was given.

    Raises:
        ValueError: no folded matrix has this shape.
    """
    rows, columns = folded.shape
    odd = rows == 2 * columns - 1
    if not odd and columns != 2 * rows + 1:
        raise ValueError(f"{rows} x {columns} is no folded symmetric matrix")
    half = columns if odd else rows
    rest = half - odd
    block, corner = folded.split([half, rest], dim=0) if odd else folded.split([rest + 1, half], dim=1)
    matrix = folded.new_zeros(half + rest, half + rest)
    matrix[:half, :half] = block[:, :half].tril()
    matrix[half:, half:] = block[:rest, 1:].triu().T
    matrix[half:, :half] = corner
    return matrix + matrix.tril(-1).T


@dataclass(frozen=True)
class BlockDiagonal:
    """A matrix with these blocks on its diagonal and zeros elsewhere, of which only the blocks exist."""

    blocks: tuple[Tensor, ...]

    def __len__(self) -> int:
        return sum(len(block) for block in self.blocks)

    def double(self) -> BlockDiagonal:
        """In float64."""
        return BlockDiagonal(tuple(block.double() for block in self.blocks))

    def diagonal(self) -> Tensor:
        """``[n]``."""
        return torch.cat([block.diagonal() for block in self.blocks])

    def transposed(self) -> BlockDiagonal:
        """Its transpose: of blocks that are triangles, not symmetric."""
        return BlockDiagonal(tuple(block.T for block in self.blocks))

    def scaled(self, factor: float, shift: float) -> BlockDiagonal:
        """``factor`` times it, plus ``shift`` times the identity."""
        blocks = []
        for block in self.blocks:
            changed = factor * block
            changed.diagonal().add_(shift)
            blocks.append(changed)
        return BlockDiagonal(tuple(blocks))

    def __matmul__(self, other: Tensor) -> Tensor:
        sizes = [len(block) for block in self.blocks]
        return torch.cat([block @ part for block, part in zip(self.blocks, other.split(sizes), strict=True)])

    def dense(self) -> Tensor:
        """The whole matrix."""
        whole: Tensor = torch.block_diag(*self.blocks)
        return whole


def lower_root(matrix: Tensor, floor: float) -> Tensor:
    """L with L L^T = ``matrix``, lower triangular: its Cholesky factor, where it has one.

    A matrix that is singular, or nearly so (a pivot below ``floor``), is decomposed with ``floor`` times the identity
    added; if rounding makes that indefinite too, its eigenvalues are lifted to ``floor``.

    Args:
        matrix: ``[n, n]``, positive semi-definite.
        floor: above zero.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if not failed and bool((lower.diagonal().square() >= floor).all()):
        return cast(Tensor, lower)
    lifted = matrix.clone()
    lifted.diagonal().add_(floor)
    lower, failed = torch.linalg.cholesky_ex(lifted)
    if not failed:
        return cast(Tensor, lower)
    values, vectors = torch.linalg.eigh(lifted)
    triangle = torch.linalg.qr((vectors * values.clamp(min=floor).sqrt()).T, mode="r").R
    return cast(Tensor, triangle.T * torch.where(triangle.diagonal() < 0, -1.0, 1.0))
