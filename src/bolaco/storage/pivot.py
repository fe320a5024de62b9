"""Pivoted storage of a low-rank product (PIFA, arXiv 2501.19090): lossless, r^2 parameters below two factors.

Of a rank-r matrix ``W'`` only r rows are kept, with the coefficients that make the other rows from them (or the same
with columns). Column-pivoted QR picks rows that are far from dependent, so the coefficients stay small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

# Coefficients above this are a reason to look at the other side too.
_LARGE = 64.0


@dataclass(frozen=True)
class Pivoted:
    """A pivoted product.

    Attributes:
        side: ``rows``: ``first`` is the kept rows ``[r, in]``, ``second`` ``[out - r, r]`` makes the others from
            them, and ``order``
            ``[out]`` says where each output is found in the two put together. ``columns``: ``first`` ``[r, in - r]``
            folds the other inputs into the kept ones, ``second`` ``[out, r]`` is the kept columns, and ``order``
            ``[in]`` lists the inputs, kept ones first.
        growth: largest coefficient in absolute value; rounding errors grow by about this factor.
    """

    side: str
    first: Tensor
    second: Tensor
    order: Tensor
    growth: float

    def state(self, bias: Tensor | None) -> dict[str, Tensor]:
        """State dict of the :class:`bolaco.layers.PivotedLinear` that holds this product and ``bias`` ``[out]``."""
        pivots, others = (self.first, self.second) if self.side == "rows" else (self.second, self.first)
        state = {"pivot.weight": pivots, "rest.weight": others, "order": self.order}
        if bias is not None and self.side == "rows":
            # The kept outputs carry their bias into the others, whose own bias takes that away again.
            placed = bias[torch.argsort(self.order)]
            kept, made = placed[: len(pivots)], placed[len(pivots) :].double()
            state["pivot.bias"] = kept
            state["rest.bias"] = (made - others.double() @ kept.double()).to(bias.dtype)
        elif bias is not None:
            state["pivot.bias"] = bias
        return state


def pivot(expand: Tensor, reduce: Tensor) -> Pivoted:
    """Pivoted form of ``expand @ reduce``, ``[out, r]`` and ``[r, in]``; computed in float64, returned in their dtype.

    The index goes to the smaller side, where moving it costs less; to the other one if coefficients there are smaller
    by far.
    """
    b, a = expand.double().numpy(), reduce.double().numpy()
    by_rows = expand.shape[0] <= reduce.shape[1]
    best = _rows(b, a) if by_rows else _columns(b, a)
    if best[3] > _LARGE:
        other = _columns(b, a) if by_rows else _rows(b, a)
        if other[3] < best[3] / 4:
            best, by_rows = other, not by_rows
    first, second, order, growth = best
    dtype = expand.dtype
    return Pivoted(
        "rows" if by_rows else "columns",
        torch.from_numpy(np.ascontiguousarray(first)).to(dtype),
        torch.from_numpy(np.ascontiguousarray(second)).to(dtype),
        torch.from_numpy(np.ascontiguousarray(order)).to(torch.int32),
        growth,
    )


_Form = tuple[np.ndarray, np.ndarray, np.ndarray, float]


def _coefficients(tall: np.ndarray, wide: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Pivot rows of ``tall @ wide``, then the others, and the coefficients that make the others from the pivots."""
    rank = tall.shape[1]
    # wide = L Q with orthonormal Q: the rows of tall @ L have the lengths and angles of the product's rows.
    lower = scipy.linalg.qr(wide.T, mode="r")[0][:rank].T
    shape = tall @ lower
    triangle, order = scipy.linalg.qr(shape.T, mode="r", pivoting=True)
    triangle = triangle[:rank]
    # A product can have a lower rank than it has components; what depends on nothing new needs no further pivot.
    sizes = np.abs(triangle.diagonal())
    independent = int((sizes > sizes.max(initial=0.0) * rank * np.finfo(np.float64).eps).sum())
    others = np.zeros((len(tall) - rank, rank))
    leading = triangle[:independent, :independent]
    others[:, :independent] = scipy.linalg.solve_triangular(leading, triangle[:independent, rank:]).T
    return order, others, float(np.abs(others).max(initial=0.0))


def _rows(b: np.ndarray, a: np.ndarray) -> _Form:
    order, others, growth = _coefficients(b, a)
    kept = b[order[: b.shape[1]]] @ a
    return kept, others, np.argsort(order), growth


def _columns(b: np.ndarray, a: np.ndarray) -> _Form:
    order, others, growth = _coefficients(a.T, b.T)
    kept = b @ a[:, order[: b.shape[1]]]
    return others.T, kept, order, growth
