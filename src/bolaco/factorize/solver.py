"""The weighted low-rank approximation behind every method; what a method chooses is the metric.

``min ||(W - B A) C^(1/2)||_F`` over rank-r products. With ``U`` the eigenvectors of ``W C W^T`` by descending
eigenvalue, the minimiser is ``B = U_r``, ``A = U_r^T W`` and the squared error the sum of the eigenvalues dropped
(DRONE; AFM; SVD-LLM reaches the same product through a Cholesky factor of C). No inverse of C appears, so a singular
C is harmless. ``W C W^T`` of a tall matrix is never formed: its eigenvectors come from the smaller ``R^T W^T W R``,
where ``R R^T = C``. A metric G on the output is taken in by its Cholesky factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bolaco.statistics.symmetric import BlockDiagonal, lower_root

# A singular C gets this share of its mean eigenvalue on its diagonal where it needs a root: directions that the
# calibration text never visits then still get an order, by their weight, so that full rank gives back W itself.
_FLOOR = 1e-10
# Mean squared gradients below this are scaled before anything is computed with them.
_TINY = 1e-40


class InputMetric:
    """A symmetric positive semi-definite matrix C over a layer's inputs; its root is computed once.

    ``[in, in]``, or ``[in]`` for a diagonal one. One instance serves every matrix that shares the input.
    ``InputMetric(None)`` is the identity.
    """

    def __init__(self, matrix: Tensor | None) -> None:
        self.matrix = None if matrix is None else matrix.double()

    @cached_property
    def root(self) -> Tensor | None:
        """R with R R^T = C, of the shape of C, or None for the identity."""
        if self.matrix is None:
            return None
        diagonal = self.matrix.ndim == 1
        # Inputs that are always zero have no mean to take a share of: all directions count alike then.
        mean = float((self.matrix if diagonal else self.matrix.diagonal()).clamp(min=0).mean())
        floor = _FLOOR * mean or 1.0
        return self.matrix.clamp(min=floor).sqrt() if diagonal else lower_root(self.matrix, floor)

    def times(self, w: Tensor) -> Tensor:
        """``w @ C`` for float64 ``w`` ``[n, in]``."""
        return _times(w, self.matrix)

    def times_root(self, w: Tensor) -> Tensor:
        """``w @ R`` for float64 ``w`` ``[n, in]``."""
        return _times(w, self.root)


class OutputMetric:
    """A symmetric positive definite matrix G over a layer's outputs, from an estimate ``[out, out]``.

    ``shrinkage`` mixes in that share of the mean eigenvalue times the identity, which makes G invertible.
    ``OutputMetric(None)`` is the identity.
    """

    def __init__(self, matrix: Tensor | BlockDiagonal | None, shrinkage: float = 0.0) -> None:
        self.matrix: Tensor | BlockDiagonal | None = None
        self.reached, self.scale = True, 1.0
        if matrix is None:
            return
        # Where all gradients are zero every output counts alike, and no error costs anything.
        mean = float(matrix.diagonal().double().mean())
        if 0 < mean < _TINY:
            # Products of two such matrices underflow. A power of two changes nothing else, and is put back in errors.
            self.scale = 2.0 ** round(math.log2(mean))
            matrix = (
                matrix.double().scaled(1 / self.scale, 0.0)
                if isinstance(matrix, BlockDiagonal)
                else matrix.double() / self.scale
            )
            mean /= self.scale
        self.reached, self._mean = mean > 0, mean or 1.0
        if isinstance(matrix, BlockDiagonal):
            self.matrix = matrix.double().scaled(1 - shrinkage, (shrinkage + _FLOOR) * self._mean)
            return
        self.matrix = (1 - shrinkage) * matrix.double()
        self.matrix.diagonal().add_((shrinkage + _FLOOR) * self._mean)

    def times(self, w: Tensor) -> Tensor:
        """``G @ w`` for float64 ``w`` ``[out, n]``."""
        return w if self.matrix is None else self.matrix @ w

    @cached_property
    def lower(self) -> BlockDiagonal:
        """L with L L^T = G, lower triangular; one block where G has one.

        A product with L^T is as good a start as one with the symmetric root, for a tenth of the time
        (benchmarks/eigen.py): the low-rank approximation depends on G alone.
        """
        assert self.matrix is not None
        blocks = self.matrix.blocks if isinstance(self.matrix, BlockDiagonal) else (self.matrix,)
        return BlockDiagonal(tuple(lower_root(block, _FLOOR * self._mean) for block in blocks))

    def times_root(self, w: Tensor) -> Tensor:
        """``L^T @ w`` for float64 ``w`` ``[out, n]``."""
        return w if self.matrix is None else self.lower.transposed() @ w

    def over_root(self, w: Tensor) -> Tensor:
        """``L^-T @ w`` for float64 ``w`` ``[out, n]``."""
        if self.matrix is None:
            return w
        parts = zip(self.lower.blocks, w.split([len(block) for block in self.lower.blocks]), strict=True)
        return torch.cat([torch.linalg.solve_triangular(block.T, part, upper=True) for block, part in parts])


@dataclass(frozen=True)
class Factors:
    """Factors of one matrix up to some rank; a smaller rank is a slice.

    Attributes:
        expand_t: ``[r_max, out]``, rows are the columns of B (orthonormal under a one-sided metric).
        reduce: ``[r_max, in]``, the rows of A.
        spectrum: ``[k]`` float64, descending: the squared error of rank r is the sum from r on.
        offset: ``[out]`` mean output W mu, or None when the method has no bias term.
        coordinates: ``[r_max]`` A mu of the A stored here (it may be rounded to half precision, and mu be large); None
            with ``offset``.
    """

    expand_t: Tensor
    reduce: Tensor
    spectrum: Tensor
    offset: Tensor | None = None
    coordinates: Tensor | None = None

    @property
    def max_rank(self) -> int:
        """Highest rank that can be sliced."""
        return len(self.reduce)

    def error(self, rank: int) -> float:
        """Squared weighted error of rank ``rank``, without building anything."""
        return float(self.spectrum[rank:].sum())

    def bias(self, rank: int, original: Tensor | None) -> Tensor | None:
        """Bias of the rank-``rank`` layer, ``[out]``: keeps the mean output exact. None if there is none."""
        if self.offset is None or self.coordinates is None:
            return original
        shift = self.offset - self.coordinates[:rank] @ self.expand_t[:rank].to(self.coordinates)
        return (shift if original is None else original + shift).to(self.reduce.dtype)

    def product(self, rank: int) -> Tensor:
        """The rank-``rank`` approximation, ``[out, in]``."""
        return self.expand_t[:rank].T @ self.reduce[:rank]


def low_rank(
    weight: Tensor,
    metric: InputMetric,
    max_rank: int,
    mean: Tensor | None = None,
    output: OutputMetric | None = None,
) -> Factors:
    """Factors of ``weight`` ``[out, in]`` up to ``max_rank`` under a metric on its input; computed in float64.

    ``mean`` ``[in]`` adds the bias term ``(I - U_r U_r^T) W mu`` (arXiv 2405.10616, section 3.1). With a metric G on
    the output the problem is that of ``G^(1/2) W``, whose basis is then mapped back by ``G^(-1/2)``.
    """
    dtype, w = weight.dtype, weight.double()
    output = OutputMetric(None) if output is None else output
    values, basis, exact = (_tall if w.shape[0] > w.shape[1] else _wide)(w, metric, output, max_rank)
    if not output.reached or output.scale != 1:
        values = values * (output.scale if output.reached else 0.0)
    if output.matrix is not None:
        # G is as small as gradients are, its inverse root as large: unit columns keep both factors in a dtype's range.
        norms = basis.norm(dim=0)
        basis, exact = basis / norms, exact * norms[:, None]
    reduce = exact.to(dtype).contiguous()
    offset = coordinates = None
    if mean is not None:
        mean, kept = mean.double(), dtype if dtype == torch.float64 else torch.float32
        offset, coordinates = (w @ mean).to(kept), (reduce.double() @ mean).to(kept)
    return Factors(
        expand_t=basis.T.to(dtype).contiguous(),
        reduce=reduce,
        spectrum=values.flip(0).clamp(min=0),
        offset=offset,
        coordinates=coordinates,
    )


def _wide(w: Tensor, metric: InputMetric, output: OutputMetric, max_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ascending squared singular values ``[out]``, the basis B ``[out, r]`` and A ``[r, in]``, of a matrix not tall."""
    sided = output.times_root(w)
    values, vectors = torch.linalg.eigh(_symmetric(metric.times(sided) @ sided.T))
    leading = vectors.flip(1)[:, :max_rank]
    # B is orthonormal in G, so that A = B^T G W = U^T L^T W.
    return values, output.over_root(leading), leading.T @ sided


def _tall(w: Tensor, metric: InputMetric, output: OutputMetric, max_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the smaller side of a tall matrix.

    No root of the output metric is taken: the basis is made orthonormal in it by a Cholesky factor, which keeps the
    span of every leading part.
    """
    tall = metric.times_root(w)
    values, right = torch.linalg.eigh(_symmetric(tall.T @ output.times(tall)))
    # QR rather than a division by singular values: orthonormal even where those vanish, and the leading subspaces stay.
    basis, triangle = torch.linalg.qr(tall @ right.flip(1)[:, :max_rank])
    basis = basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    if output.matrix is None:
        return values, basis, basis.T @ w
    weighted = output.times(basis)
    lower = torch.linalg.cholesky(_symmetric(basis.T @ weighted))
    exact = torch.linalg.solve_triangular(lower, weighted.T @ w, upper=False)
    return values, torch.linalg.solve_triangular(lower, basis.T, upper=False).T, exact


def corrected(weight: Tensor, drift: Tensor, inputs: Tensor, damping: float = 0.0) -> Tensor:
    """The matrix ``[out, in]`` that maps a compressed model's inputs x' nearest to ``weight @ x``, x the original's.

    With ``inputs`` = E[x' x'^T] and ``drift`` = E[(x - x') x'^T] (both centred or both not) it is the least-squares
    solution ``W + W drift inputs^-1``, ``damping`` times the mean eigenvalue added to ``inputs``. Approximating it
    under the metric ``inputs`` is then the error-aware problem (arXiv 2604.02119): the rest of the error is constant.
    Without drift it is ``weight`` itself.
    """
    metric = inputs.double().clone()
    metric.diagonal().add_(max(damping, _FLOOR) * float(metric.diagonal().mean()) or 1.0)
    shift: Tensor = torch.linalg.solve(metric, drift.double().T).T
    return (weight.double() + weight.double() @ shift).to(weight.dtype)


def _times(w: Tensor, matrix: Tensor | None) -> Tensor:
    """``w @ matrix``, of a whole matrix, a diagonal or (None) the identity."""
    if matrix is None:
        return w
    return w * matrix if matrix.ndim == 1 else w @ matrix


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
