"""Weights as entries of small tables: weighted k-means, and codes with the feedback of GPTQ (arXiv 2410.06364).

A matrix ``[out, in]`` has a table of ``2**bits`` numbers for each row and each run of ``ceil(in / groups)`` columns.
The tables are k-means centres, where a column counts by how much its errors cost. The codes are chosen column by
column, the costly ones first; what a column loses is made up for by those after it, as far as the inputs correlate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bolaco.layers import SketchLinear
from bolaco.layers.sketch import pack
from bolaco.models.structure import weight_of

# Columns between two updates of all that follow.
_PANEL = 128
_ITERATIONS = 100
# Tables of this size and below start evenly spaced only.
_EVEN = 8


@dataclass(frozen=True)
class Coded:
    """Tables ``[out, groups, 2**bits]``, ascending, and codes ``[out, in]``, uint8."""

    lut: Tensor
    codes: Tensor

    @property
    def weight(self) -> Tensor:
        """``[out, in]``."""
        size = -(-self.codes.shape[1] // self.lut.shape[1])
        group = torch.arange(self.codes.shape[1], device=self.codes.device) // size
        rows = torch.arange(len(self.codes), device=self.codes.device)[:, None]
        found: Tensor = self.lut[rows, group, self.codes.long()]
        return found


def inverse_factor(second_moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``(order, U)``: columns by falling second moment, and upper U with ``U^T U = H^-1`` in that order; float64.

    ``H = 2 E[x x^T]`` with ``damping`` times its mean diagonal on the diagonal; the identity where all inputs are zero.
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
        weight: ``[out, in]``.
        feedback: order of the columns and U, by :func:`inverse_factor` of its inputs.
        bits: of a code, 1 to 4.
        groups: tables of a row.
        power: a column weighs ``diag(U)**-power`` in k-means.
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
    # A row that has fewer runs of columns than groups has tables that nothing refers to.
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
    """Centres ``[rows, count]``, ascending, of each row of ``values`` ``[rows, n]`` with ``weights`` ``[n]``.

    Lloyd's iteration to its fixed point, from evenly spaced centres; of more than eight centres also from k-means++
    (seeded), and the better one of each row is taken. So no row is worse than rounded to nearest on an even grid.
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
    """Weighted squared distance of each row's values from their nearest centre, ``[rows]``; centres ascend."""
    middles = (centres[:, 1:] + centres[:, :-1]) / 2
    nearest = centres.gather(1, torch.searchsorted(middles.contiguous(), values.contiguous()))
    return (weights * (values - nearest) ** 2).sum(1)


def _lloyd(ordered: Tensor, mass: Tensor, centres: Tensor) -> Tensor:
    """The iteration, on sums from the left: a centre's values are a run of the sorted ones."""
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
    """Starting centres of k-means++: each next one drawn by weight times squared distance from those there are."""
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
    """The layer of these codes and tables with the bias of ``module``, a Linear or Conv1D."""
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
