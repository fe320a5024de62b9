"""Coding weights as entries of small tables: weighted k-means, and error feedback as in GPTQ (arXiv 2410.06364).

The columns of a matrix ``[out, in]`` are divided into runs of ``ceil(in / groups)``. Each row has a table of
``2**bits`` numbers for each run, and every weight is replaced by a number in its table. The tables are the centres of a
k-means clustering in which a column weighs more the more its errors cost. The codes (indices into the tables) are
chosen column by column, those whose errors cost most first. The error of a column is then made up for in the columns
that follow, as far as their inputs correlate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bolaco.layers import SketchLinear
from bolaco.layers.sketch import pack
from bolaco.models.structure import weight_of

# The feedback of so many columns is applied together to all columns after them.
_PANEL = 128
# Iterations of k-means, at most.
_ITERATIONS = 100
# k-means of more centres than this is also started from k-means++.
_EVEN = 8


@dataclass(frozen=True)
class Coded:
    """A coded matrix.

    Attributes:
        lut: the tables, ``[out, groups, 2**bits]``, each in ascending order.
        codes: index of every weight in its table, ``[out, in]``, uint8.
    """

    lut: Tensor
    codes: Tensor

    @property
    def weight(self) -> Tensor:
        """The matrix that it stands for, ``[out, in]``."""
        size = -(-self.codes.shape[1] // self.lut.shape[1])
        group = torch.arange(self.codes.shape[1], device=self.codes.device) // size
        rows = torch.arange(len(self.codes), device=self.codes.device)[:, None]
        found: Tensor = self.lut[rows, group, self.codes.long()]
        return found


def inverse_factor(second_moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """What error feedback needs to know of the inputs x: ``H = 2 E[x x^T]``, in the form that :func:`code` takes.

    Args:
        second_moment: ``E[x x^T]``, ``[in, in]``.
        damping: this times the mean of H's diagonal is added to the diagonal. If all inputs are zero, 1 is.

    Returns:
        ``(order, U)``: the columns in order of falling second moment, ``[in]``; and the upper triangular U with
        ``U^T U = H^-1`` for columns in that order, ``[in, in]``, float64.
    """
    hessian = 2 * second_moment.double()
    mean = hessian.diagonal().mean()
    hessian = hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (
        damping * mean if mean > 0 else 1.0
    )
    order = hessian.diagonal().argsort(descending=True, stable=True)
    lower = torch.linalg.cholesky(hessian[order][:, order])
    return order, torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def code(weight: Tensor, feedback: tuple[Tensor, Tensor], bits: int, groups: int, power: float) -> Coded:
    """Codes a matrix.

    Args:
        weight: the matrix, ``[out, in]``.
        feedback: :func:`inverse_factor` of its inputs.
        bits: length of a code, 1 to 4.
        groups: number of tables for each row.
        power: in k-means, the weight of a column is ``diag(U)**-power``.
    """
    (out, columns), (order, upper) = weight.shape, feedback
    importance = torch.empty_like(order, dtype=torch.float64)
    importance[order] = (upper.diagonal() / upper.diagonal().max()) ** -power
    left = weight.double()
    size = -(-columns // groups)
    luts = [
        kmeans(left[:, start : start + size], importance[start : start + size], 2**bits)
        for start in range(0, columns, size)
    ]
    # Where columns run out before groups do, the remaining tables are not referred to.
    luts += [torch.zeros_like(luts[0])] * (groups - len(luts))
    lut = torch.stack(luts, dim=1).to(weight.dtype)
    tables = lut.double()
    middles = (tables[..., 1:] + tables[..., :-1]) / 2
    left, codes = left[:, order], torch.empty(out, columns, dtype=torch.uint8, device=weight.device)
    group = (order // size).tolist()
    for start in range(0, columns, _PANEL):
        panel = range(start, min(start + _PANEL, columns))
        errors = torch.empty(out, len(panel), dtype=torch.float64, device=weight.device)
        for j in panel:
            column = left[:, j]
            chosen = (column[:, None] > middles[:, group[j]]).sum(1)
            error = (column - tables[:, group[j]].gather(1, chosen[:, None])[:, 0]) / upper[j, j]
            left[:, j + 1 : panel.stop] -= error[:, None] * upper[j, j + 1 : panel.stop]
            errors[:, j - start] = error
            codes[:, j] = chosen.to(torch.uint8)
        left[:, panel.stop :] -= errors @ upper[start : panel.stop, panel.stop :]
    return Coded(lut, codes[:, torch.argsort(order)])


def kmeans(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """Weighted k-means in one dimension, of each row by itself.

    Lloyd's iteration is started from evenly spaced centres. For more than eight centres it is started from k-means++
    (seeded) as well, and each row takes the better result. So no row is worse off than on an even grid.

    Args:
        values: ``[rows, n]``.
        weights: ``[n]``.
        count: number of centres.

    Returns:
        The centres in ascending order, ``[rows, count]``.
    """
    ordered, order = values.contiguous().sort(dim=1)
    mass = weights.expand_as(values).gather(1, order)
    low, high = ordered[:, :1], ordered[:, -1:]
    even = low + (high - low) * torch.linspace(0, 1, count, dtype=values.dtype, device=values.device)
    best = _lloyd(ordered, mass, even)
    if count <= _EVEN:
        return best
    other = _lloyd(ordered, mass, _spread(ordered, mass, count))
    better = clustering_error(ordered, mass, other) < clustering_error(ordered, mass, best)
    return torch.where(better[:, None], other, best)


def clustering_error(values: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """Weighted sum of squared distances between values and their nearest centres, by row.

    Args:
        values: ``[rows, n]``.
        weights: ``[rows, n]`` or ``[n]``.
        centres: ``[rows, count]``, in ascending order.

    Returns:
        ``[rows]``.
    """
    middles = (centres[:, 1:] + centres[:, :-1]) / 2
    nearest = centres.gather(1, torch.searchsorted(middles.contiguous(), values.contiguous()))
    return (weights * (values - nearest) ** 2).sum(1)


def _lloyd(ordered: Tensor, mass: Tensor, centres: Tensor) -> Tensor:
    """Lloyd's iteration until nothing moves, on sorted rows, where the values of a centre are consecutive.

    So their sum is a difference of two cumulative sums.

    Args:
        ordered: values ``[rows, n]``, in ascending order.
        mass: their weights ``[rows, n]``.
        centres: where to start, ``[rows, count]``.

    Returns:
        Centres in ascending order, ``[rows, count]``.
    """
    start = torch.zeros_like(ordered[:, :1])
    sums = torch.cat([start, (mass * ordered).cumsum(1)], dim=1)
    masses = torch.cat([start, mass.cumsum(1)], dim=1)
    ends = torch.zeros(len(ordered), 1, dtype=torch.int64, device=ordered.device)
    for _ in range(_ITERATIONS):
        cuts = torch.searchsorted(ordered, ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous())
        bounds = torch.cat([ends, cuts, ends + ordered.shape[1]], dim=1)
        total, weight = sums.gather(1, bounds).diff(dim=1), masses.gather(1, bounds).diff(dim=1)
        # A centre without values stays where it is.
        moved = torch.where((bounds.diff(dim=1) > 0) & (weight > 0), total / weight, centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres.sort(dim=1).values


def _spread(ordered: Tensor, mass: Tensor, count: int) -> Tensor:
    """Starting centres of k-means++, ``[rows, count]``.

    The probability that a value is drawn as the next centre is proportional to its weight times its squared distance
    from the nearest centre so far.
    """
    draw = torch.Generator().manual_seed(0)
    chosen: list[Tensor] = []
    distance = torch.ones_like(ordered)
    for _ in range(count):
        reached = (mass * distance**2).cumsum(1)
        level = torch.rand(len(ordered), 1, generator=draw, dtype=torch.float64).to(ordered) * reached[:, -1:]
        at = torch.searchsorted(reached, level).clamp(max=ordered.shape[1] - 1)
        chosen.append(ordered.gather(1, at))
        away = (ordered - chosen[-1]).abs()
        distance = away if len(chosen) == 1 else torch.minimum(distance, away)
    return torch.cat(chosen, dim=1).sort(dim=1).values


def coded_layer(module: nn.Module, coded: Coded, bits: int) -> SketchLinear:
    """The layer of a coded matrix, to replace ``module``, a Linear or Conv1D, whose bias it takes over."""
    weight, bias = weight_of(module), module.bias
    out, columns = weight.shape
    made = SketchLinear(columns, out, bias is not None, bits, coded.lut.shape[1]).to(weight.device, weight.dtype)
    made.requires_grad_(False)
    made.lut.copy_(coded.lut)
    padded = nn.functional.pad(coded.codes, (0, made.groups * made.size - columns))
    made.codes.copy_(pack(padded, bits))
    if made.bias is not None:
        assert isinstance(bias, Tensor)
        made.bias.copy_(bias)
    return made
