"""Where the levels of a quantized matrix are: a scale, and perhaps a zero point, for each group of its numbers.

A number is ``(code - zero) * scale``. Scales are bfloat16, so every level is a float32 without rounding, and no range
of weights is too small or too large for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bolaco.errors import NonFiniteError
from bolaco.settings import Section

SCALES = torch.bfloat16
ZEROS = torch.int16
_BITS_OF_A_SCALE = 16
# Shares of the range that are tried when scales are fitted, from where one-bit levels of heavy tails are.
_SHARES = [0.06 * 1.125**step for step in range(25)]


class Levels(Enum):
    """How the levels of a group lie about zero.

    ``asymmetric`` spans the group from its least to its largest number, zero always among the levels (arXiv
    2210.17323); it alone has zero points. ``symmetric`` spans as far to both sides, with zero and one level more below
    than above it. ``midrise`` has as many levels on both sides and none at zero, which is best for few bits: one bit is
    plus or minus the scale's half.
    """

    ASYMMETRIC = "asymmetric"
    SYMMETRIC = "symmetric"
    MIDRISE = "midrise"

    def zero(self, bits: int) -> float:
        """The zero point of the levels that have a fixed one."""
        return (1 << bits) / 2 - (0.5 if self is Levels.MIDRISE else 0)

    def reach(self, bits: int) -> float:
        """Steps from zero to the outermost level that both sides have."""
        return (1 << bits) / 2 - (1 if self is Levels.SYMMETRIC else 0.5)


class GridSpec(Section):
    """What decides on the levels of a matrix ``[rows, columns]``."""

    bits: int = Field(ge=1, le=8, description="of a code")
    group: int | None = Field(128, gt=0, description="numbers that share a scale, along a row; null: a whole row")
    levels: Levels = Field(Levels.ASYMMETRIC, description="asymmetric, symmetric or midrise")
    fitted: bool = Field(
        False, description="scales of least squared error, which clip outliers; else levels span all numbers"
    )
    by_column: bool = Field(False, description="groups run along a column instead")

    @model_validator(mode="after")
    def _has_levels(self) -> GridSpec:
        if self.bits == 1 and self.levels is Levels.SYMMETRIC:
            raise ValueError("symmetric levels need 2 bits; with one bit take midrise")
        return self

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales: rows, or columns with ``by_column``, and groups of each; the last can be shorter."""
        outer, inner = (columns, rows) if self.by_column else (rows, columns)
        return outer, -(-inner // (self.group or max(inner, 1)))

    def stored_bits(self, rows: int, columns: int) -> int:
        """Bits of a matrix ``[rows, columns]`` as it is stored: codes in whole bytes, scales and zero points."""
        outer, count = self.groups(rows, columns)
        scales = _BITS_OF_A_SCALE * outer * count * (2 if self.levels is Levels.ASYMMETRIC else 1)
        return 8 * -(-rows * columns * self.bits // 8) + scales


@dataclass(frozen=True)
class Grid:
    """The levels of one matrix.

    Attributes:
        spec: what was asked for.
        scales: ``[rows, groups]`` (columns for rows with ``by_column``) bfloat16.
        zeros: of the same shape int16, of asymmetric levels; else None.
    """

    spec: GridSpec
    scales: Tensor
    zeros: Tensor | None

    def each(self, rows: int, columns: int) -> tuple[Tensor, Tensor | float]:
        """Scale and zero point of every number, float32 ``[rows, columns]``; a zero point that all share is a float."""
        scale = self._each(self.scales, rows, columns)
        if self.zeros is None:
            return scale, self.spec.levels.zero(self.spec.bits)
        return scale, self._each(self.zeros, rows, columns)

    def _each(self, values: Tensor, rows: int, columns: int) -> Tensor:
        inner = rows if self.spec.by_column else columns
        wide = values.float().repeat_interleave(self.spec.group or max(inner, 1), dim=1)[:, :inner]
        return wide.T if self.spec.by_column else wide


def fit_grid(weight: Tensor, spec: GridSpec) -> Grid:
    """The levels for a finite matrix ``[rows, columns]``.

    Raises:
        NonFiniteError: a step between two levels that a number cannot hold.
    """
    lines = (weight.T if spec.by_column else weight).double()
    outer, inner = lines.shape
    group = spec.group or max(inner, 1)
    count = -(-inner // group)
    # Zeros behind a shorter last group change neither its range, which has zero in it, nor its error, see below.
    padded = lines.new_zeros(outer, count * group)
    padded[:, :inner] = lines
    whole = inner == count * group
    there = torch.zeros(count * group, dtype=torch.bool, device=lines.device)
    there[:inner] = True
    groups, there = padded.view(outer, count, group), there.view(1, count, group)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if spec.levels is not Levels.ASYMMETRIC:
        high = torch.maximum(-low, high)
        low = -high
    if not torch.isfinite((high - low).to(SCALES)).all():
        raise NonFiniteError("numbers of a matrix to quantize are too large (3e38 and more apart)")
    if not spec.fitted:
        scales, zeros = _spanning(low, high, spec, upwards=True)
        return Grid(spec, scales, zeros)
    best: tuple[Tensor, Tensor | None, Tensor] | None = None
    for share in _SHARES:
        scales, zeros = _spanning(low * share, high * share, spec, upwards=False)
        error = _nearest(groups, scales, zeros, spec).sub_(groups).square_()
        error = (error if whole else error.mul_(there)).sum(2)
        if best is None:
            best = scales, zeros, error
            continue
        better = error < best[2]
        chosen = None if zeros is None or best[1] is None else torch.where(better, zeros, best[1])
        best = torch.where(better, scales, best[0]), chosen, torch.where(better, error, best[2])
    assert best is not None
    return Grid(spec, best[0], best[1])


def _spanning(low: Tensor, high: Tensor, spec: GridSpec, upwards: bool) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of levels from ``low`` to ``high``; ``upwards`` never rounds a scale down."""
    if spec.levels is not Levels.ASYMMETRIC:
        return _rounded(high / spec.levels.reach(spec.bits), upwards), None
    scales = _rounded((high - low) / spec.top, upwards)
    exact = scales.double()
    zeros = torch.where(exact > 0, (-low / exact.where(exact > 0, 1.0)).round(), 0.0)
    return scales, zeros.clamp_(0, spec.top).to(ZEROS)


def _rounded(scales: Tensor, upwards: bool) -> Tensor:
    found = scales.to(SCALES)
    if upwards:
        found = torch.where(found.double() < scales, torch.nextafter(found, torch.full_like(found, torch.inf)), found)
    return found


def _nearest(groups: Tensor, scales: Tensor, zeros: Tensor | None, spec: GridSpec) -> Tensor:
    scale = scales.double()[..., None]
    zero: Tensor | float = spec.levels.zero(spec.bits) if zeros is None else zeros.double()[..., None]
    return (nearest_codes(groups, scale, zero, spec.top) - zero) * scale


def nearest_codes(numbers: Tensor, scale: Tensor, zero: Tensor | float, top: int) -> Tensor:
    """The codes, as floats, of the levels that are nearest to numbers; where the scale is 0 any would do."""
    return (numbers / scale.where(scale > 0, 1.0) + zero).round_().clamp_(0, top)
