"""GPTQ (arXiv 2210.17323): columns are quantized one by one, and those still to come make up for the error.

The levels are those of :func:`bolaco.quantize.grid.fit_grid` of the matrix as it was given: groups are runs of columns
where they lie, and their scales are there before the first column is quantized ("static groups"). So the order of the
columns is free, and the result is stored without a permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bolaco.errors import NonFiniteError
from bolaco.quantize.grid import GridSpec, fit_grid, nearest_codes
from bolaco.quantize.matrix import QuantizedMatrix, check_finite, from_codes

# Columns whose errors reach the columns behind them in one product.
_BLOCK = 128


class Feedback:
    """What the Hessian of a matrix's inputs says of errors; made once for all matrices with the same input.

    Args:
        hessian: ``[columns, columns]``, positive semi-definite: a second moment of the inputs, in any unit.
        damping: this share of the mean of its diagonal is added to it.
        act_order: columns go by descending diagonal, so that those that count most are quantized first; else from left
            to right.

    Raises:
        NonFiniteError: NaN or infinity in it, or a matrix that is far from positive semi-definite.
    """

    def __init__(self, hessian: Tensor, damping: float = 0.01, act_order: bool = True) -> None:
        self.hessian = hessian.double()
        check_finite(self.hessian, "the Hessian of a matrix")
        diagonal = self.hessian.diagonal()
        self.order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
        self.order = self.order.to(hessian.device)
        mean = float(diagonal.mean())
        # Inputs that are always zero: no error counts, and there is nothing to make up for.
        self.upper: Tensor | None = None if mean <= 0 else self._factor(max(damping, 1e-8) * mean)

    def _factor(self, shift: float) -> Tensor:
        """The upper Cholesky factor of the inverse, columns in their order."""
        damped = self.hessian[self.order][:, self.order]
        damped.diagonal().add_(shift)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            raise NonFiniteError("the Hessian of a matrix to quantize is not positive semi-definite")
        found: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        return found

    def error(self, difference: Tensor) -> Tensor:
        """``[rows]``: what a difference ``[rows, columns]`` adds to the squared error of each output."""
        return ((difference @ self.hessian) * difference).sum(1)


def gptq(weight: Tensor, feedback: Feedback, spec: GridSpec) -> QuantizedMatrix:
    """``weight`` ``[rows, columns]`` quantized so that its outputs change little; computed in float64.

    A row that is nearer with each number at its nearest level, which error feedback does not rule out, is taken so: no
    row's error under the Hessian is above that of :func:`bolaco.quantize.matrix.round_to_nearest`.

    Raises:
        NonFiniteError: NaN or infinity.
    """
    check_finite(weight)
    exact, grid = weight.double(), fit_grid(weight, spec)
    scale, each = grid.each(*weight.shape)
    scale, zero = scale.double(), each.double() if isinstance(each, Tensor) else torch.full_like(exact, each)
    nearest = nearest_codes(exact, scale, zero, spec.top)
    if feedback.upper is None:
        return from_codes(nearest.to(torch.uint8), grid)
    order = feedback.order
    codes = torch.empty_like(exact)
    codes[:, order] = _with_feedback(exact[:, order], scale[:, order], zero[:, order], spec.top, feedback.upper)
    errors = [feedback.error((found - zero) * scale - exact) for found in (codes, nearest)]
    codes = torch.where((errors[0] <= errors[1])[:, None], codes, nearest)
    return from_codes(codes.to(torch.uint8), grid)


def _with_feedback(weight: Tensor, scale: Tensor, zero: Tensor, top: int, upper: Tensor) -> Tensor:
    """Codes ``[rows, columns]``, as floats, of columns in the order in which they are quantized."""
    left, codes = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], _BLOCK):
        stop = min(start + _BLOCK, weight.shape[1])
        block, errors = left[:, start:stop], torch.empty_like(left[:, start:stop])
        for at in range(stop - start):
            column = start + at
            number, step, origin = block[:, at], scale[:, column], zero[:, column]
            code = nearest_codes(number, step, origin, top)
            codes[:, column] = code
            errors[:, at] = (number - (code - origin) * step) / upper[column, column]
            block[:, at + 1 :] -= errors[:, at, None] * upper[column, column + 1 : stop]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes
