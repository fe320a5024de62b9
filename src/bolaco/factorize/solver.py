"""The weighted low-rank approximation that every factorizer here is a metric of.

``min ||(W - B A) C^(1/2)||_F`` over rank-r products. With ``U`` the eigenvectors of ``W C W^T`` by descending
eigenvalue, the minimiser is ``B = U_r``, ``A = U_r^T W`` and the squared error the sum of the eigenvalues dropped
(DRONE; AFM; SVD-LLM reaches the same product through a Cholesky factor of C). No inverse of C appears, so a singular
C is harmless. ``W C W^T`` of a tall matrix is never formed: its eigenvectors come from the smaller ``C^(1/2) W^T W
C^(1/2)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Eigenvalues of C below this share of their mean are lifted to it in C^(1/2): directions the calibration text never
# visits then still get an order, by their weight, so that full rank gives back W itself.
_FLOOR = 1e-10


class InputMetric:
    """A symmetric positive semi-definite matrix C over a layer's inputs, ``[in, in]``; its root is computed once.

    One instance serves every matrix that shares the input. ``InputMetric(None)`` is the identity.
    """

    def __init__(self, matrix: Tensor | None) -> None:
        self.matrix = None if matrix is None else matrix.double()

    @cached_property
    def root(self) -> Tensor | None:
        """``[in, in]`` R with R R^T = C, or None for the identity."""
        if self.matrix is None:
            return None
        values, vectors = torch.linalg.eigh(self.matrix)
        floor = _FLOOR * values.clamp(min=0).mean()
        return vectors * values.clamp(min=float(floor)).sqrt()


@dataclass(frozen=True)
class Factors:
    """Factors of one matrix up to some rank; a smaller rank is a slice.

    Attributes:
        expand_t: ``[r_max, out]``, rows are the columns of B, orthonormal.
        reduce: ``[r_max, in]``, the rows of A.
        spectrum: ``[k]`` float64, descending: the squared error of rank r is the sum from r on.
        offset: ``[out]`` mean output W mu, or None when the method has no bias term.
        coordinates: ``[r_max]`` A mu, the mean output in the basis; None with ``offset``.
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
        """Bias of the rank-``rank`` layer, ``[out]``: keeps the mean output exact. None where there is none to have."""
        if self.offset is None or self.coordinates is None:
            return original
        shift = self.offset - self.coordinates[:rank] @ self.expand_t[:rank].to(self.coordinates)
        shift = shift.to(self.reduce.dtype)
        return shift if original is None else original + shift

    def product(self, rank: int) -> Tensor:
        """The rank-``rank`` approximation, ``[out, in]``."""
        return self.expand_t[:rank].T @ self.reduce[:rank]


def low_rank(weight: Tensor, metric: InputMetric, max_rank: int, mean: Tensor | None = None) -> Factors:
    """Factors of ``weight`` ``[out, in]`` up to ``max_rank`` under a metric on its input; computed in float64.

    ``mean`` ``[in]`` adds the bias term ``(I - U_r U_r^T) W mu`` (arXiv 2405.10616, section 3.1).
    """
    dtype = weight.dtype
    w = weight.double()
    out_features, in_features = w.shape
    if out_features <= in_features:
        weighted = w if metric.matrix is None else w @ metric.matrix
        values, vectors = torch.linalg.eigh(_symmetric(weighted @ w.T))
        basis = vectors.flip(1)[:, :max_rank]
    else:
        tall = w if metric.root is None else w @ metric.root
        values, right = torch.linalg.eigh(_symmetric(tall.T @ tall))
        # QR rather than a division by singular values: orthonormal even where those vanish, and the leading subspaces
        # stay.
        basis, triangle = torch.linalg.qr(tall @ right.flip(1)[:, :max_rank])
        basis = basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    reduce = basis.T @ w
    offset = coordinates = None
    if mean is not None:
        mean = mean.double()
        offset, coordinates = (w @ mean).float(), (reduce @ mean).float()
        if dtype == torch.float64:
            offset, coordinates = w @ mean, reduce @ mean
    return Factors(
        expand_t=basis.T.contiguous().to(dtype),
        reduce=reduce.contiguous().to(dtype),
        spectrum=values.flip(0).clamp(min=0),
        offset=offset,
        coordinates=coordinates,
    )


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
