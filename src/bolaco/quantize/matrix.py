"""A quantized matrix as it is kept: packed codes, scales and zero points; and rounding to the nearest level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bolaco.errors import CheckpointError, NonFiniteError
from bolaco.quantize.grid import SCALES, ZEROS, Grid, GridSpec, Levels, fit_grid, nearest_codes
from bolaco.quantize.packing import pack, unpack


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix ``[rows, columns]`` in few bits.

    Attributes:
        shape: rows and columns.
        grid: its levels.
        codes: packed row by row, uint8.
    """

    shape: tuple[int, int]
    grid: Grid
    codes: Tensor

    @property
    def stored_bits(self) -> int:
        """Bits of codes, scales and zero points: eight times the bytes of :meth:`tensors`."""
        return sum(8 * tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix ``[rows, columns]``; in float32 it is exact."""
        rows, columns = self.shape
        codes = unpack(self.codes, self.grid.spec.bits, rows * columns).view(rows, columns)
        scale, zero = self.grid.each(rows, columns)
        return ((codes.float() - zero) * scale).to(dtype)

    def transposed(self) -> QuantizedMatrix:
        """``[columns, rows]`` of the same numbers; groups along rows are along columns then."""
        rows, columns = self.shape
        spec = self.grid.spec.model_copy(update={"by_column": not self.grid.spec.by_column})
        codes = unpack(self.codes, spec.bits, rows * columns).view(rows, columns).T
        return from_codes(codes, Grid(spec, self.grid.scales, self.grid.zeros))

    def tensors(self) -> dict[str, Tensor]:
        """What is stored: ``codes``, ``scales`` and, of asymmetric levels, ``zeros``."""
        found = {"codes": self.codes, "scales": self.grid.scales}
        return found if self.grid.zeros is None else found | {"zeros": self.grid.zeros}

    def to(self, device: torch.device) -> QuantizedMatrix:
        """The same on another device."""
        grid = self.grid
        zeros = None if grid.zeros is None else grid.zeros.to(device)
        return QuantizedMatrix(self.shape, Grid(grid.spec, grid.scales.to(device), zeros), self.codes.to(device))


def from_codes(codes: Tensor, grid: Grid) -> QuantizedMatrix:
    """The matrix of codes ``[rows, columns]`` uint8 on a grid."""
    rows, columns = codes.shape
    return QuantizedMatrix((rows, columns), grid, pack(codes, grid.spec.bits))


def from_tensors(tensors: Mapping[str, Tensor], spec: GridSpec, rows: int, columns: int) -> QuantizedMatrix:
    """The matrix that :meth:`QuantizedMatrix.tensors` were stored of.

    Raises:
        CheckpointError: a tensor is missing or superfluous, or of another shape or type.
    """
    shape = spec.groups(rows, columns)
    asymmetric = spec.levels is Levels.ASYMMETRIC
    wanted = {"codes", "scales"} | ({"zeros"} if asymmetric else set())
    if set(tensors) != wanted:
        raise CheckpointError(f"has {', '.join(sorted(tensors)) or 'nothing'}, not {', '.join(sorted(wanted))}")
    for name, dtype in (("scales", SCALES), ("zeros", ZEROS)):
        found = tensors.get(name)
        if found is not None and (found.dtype != dtype or tuple(found.shape) != shape):
            raise CheckpointError(f"{name} are {found.dtype} {tuple(found.shape)}, not {dtype} {shape}")
    scales = tensors["scales"]
    if not torch.isfinite(scales).all():
        raise CheckpointError("scales hold NaN or infinity")
    unpack(tensors["codes"], spec.bits, rows * columns)  # for what it raises
    return QuantizedMatrix((rows, columns), Grid(spec, scales, tensors.get("zeros")), tensors["codes"])


def check_finite(weight: Tensor, what: str = "the matrix") -> None:
    """Raises NonFiniteError for NaN and infinity, which have no code."""
    if not torch.isfinite(weight).all():
        raise NonFiniteError(f"{what} to quantize holds NaN or infinity")


def round_to_nearest(weight: Tensor, spec: GridSpec) -> QuantizedMatrix:
    """``weight`` ``[rows, columns]``, each number at its nearest level.

    Raises:
        NonFiniteError: NaN or infinity.
    """
    check_finite(weight)
    grid = fit_grid(weight, spec)
    scale, zero = grid.each(*weight.shape)
    exact: Tensor | float = zero.double() if isinstance(zero, Tensor) else zero
    codes = nearest_codes(weight.double(), scale.double(), exact, spec.top)
    return from_codes(codes.to(torch.uint8), grid)
