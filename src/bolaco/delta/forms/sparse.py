"""Few numbers in four bits, and the gaps between them in a Golomb code (UltraDelta, arXiv 2505.13563).

A gap g is the zeros before a number, in the order of the rows. It is coded after Rice, the Golomb code whose parameter
is a power of two: ``g >> low`` in unary and the lowest bits as they are. Both halves are a stream of their own, which
costs no bit more than one stream and is read without a loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from bolaco.delta.form import Form, expect, values_of
from bolaco.errors import CheckpointError
from bolaco.quantize.packing import pack, packed_bytes, unpack
from bolaco.settings import Section, Values


class SparseEntry(Section):
    """Numbers that are kept, the bits of each, and of a gap the bits that are not in unary."""

    count: int = Field(ge=0, lt=2**40)
    bits: int = Field(ge=1, le=8)
    low: int = Field(ge=0, le=24)


class Sparse(Form):
    """``(code - zero) * size`` where there is a code, else zero.

    Args:
        codes: packed, of the numbers that are kept.
        unary: packed, one bit each: gaps without their lowest bits, as many zeros as that and a one.
        lowest: the lowest bits of the gaps, ``low`` bits each in bytes; empty where ``low`` is 0.
        size: bfloat16, one number.
        entry: the rest.
        shape: ``[out, in]``.
    """

    name = "sparse"
    paper = "arXiv 2505.13563"
    summary = "few numbers in few bits, and where they are"

    def __init__(
        self, codes: Tensor, unary: Tensor, lowest: Tensor, size: Tensor, entry: SparseEntry, shape: tuple[int, int]
    ) -> None:
        self.codes, self.unary, self.lowest, self.size, self.shape = codes, unary, lowest, size, shape
        self._entry = entry

    @classmethod
    def of(cls, codes: Tensor, kept: Tensor, size: Tensor, bits: int) -> Sparse:
        """The numbers of codes ``[out, in]`` (uint8, around ``2 ** (bits - 1)``) at places ``kept`` (bool)."""
        rows, columns = codes.shape
        places = kept.reshape(-1).nonzero()[:, 0]
        gaps = torch.diff(places, prepend=places.new_tensor([-1])) - 1
        low = rice_parameter(len(places) / max(codes.numel(), 1))
        above = gaps >> low
        ends = torch.cumsum(above + 1, 0) - 1
        unary = torch.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=torch.uint8)
        unary[ends] = 1
        return cls(
            pack(codes.reshape(-1)[places], bits),
            pack(unary, 1),
            pack(_bits_of(gaps, low), 1),
            size.to(torch.bfloat16).reshape(1),
            SparseEntry(count=len(places), bits=bits, low=low),
            (rows, columns),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Codes, both halves of the gaps, size."""
        return {"codes": self.codes, "unary": self.unary, "lowest": self.lowest, "size": self.size}

    def entry(self) -> Values:
        """A :class:`SparseEntry`."""
        return self._entry.model_dump(mode="json")

    @classmethod
    def read(cls, entry: Values, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Sparse:
        """See :meth:`Form.read`."""
        known = values_of(SparseEntry, entry)
        unary = tensors.get("unary", torch.empty(0))
        expect(
            tensors,
            codes=(torch.uint8, (packed_bytes(known.count, known.bits),)),
            unary=(torch.uint8, (len(unary) if unary.ndim == 1 else -1,)),
            lowest=(torch.uint8, (packed_bytes(known.count * known.low, 1),)),
            size=(torch.bfloat16, (1,)),
        )
        found = cls(tensors["codes"], unary, tensors["lowest"], tensors["size"], known, shape)
        places = found._places()
        if len(places) != known.count or (known.count and int(places[-1]) >= shape[0] * shape[1]):
            raise CheckpointError("the places of its numbers are not in the matrix")
        return found

    def _places(self) -> Tensor:
        """Where the numbers are, ascending, ``[count]``."""
        known = self._entry
        ends = unpack(self.unary, 1, 8 * len(self.unary)).nonzero()[:, 0]
        gaps = (torch.diff(ends, prepend=ends.new_tensor([-1])) - 1) << known.low
        if known.low and len(ends) == known.count:
            bits = unpack(self.lowest, 1, known.count * known.low).view(known.count, known.low).long()
            gaps += (bits << torch.arange(known.low)).sum(1)
        return torch.cumsum(gaps + 1, 0) - 1

    def dense(self) -> Tensor:
        """D, float32 ``[out, in]``."""
        known = self._entry
        dense = torch.zeros(self.shape[0] * self.shape[1])
        codes = unpack(self.codes, known.bits, known.count).float()
        dense[self._places()] = (codes - (1 << known.bits - 1)) * self.size.float()
        return dense.view(self.shape)

    def plan(self) -> str:
        """Such as ``0.118 of the numbers in 4 bits``."""
        return (
            f"{self._entry.count / max(self.shape[0] * self.shape[1], 1):.3f} of the numbers in {self._entry.bits} bits"
        )


def rice_parameter(density: float) -> int:
    """Of a gap the bits that are not in unary, where so large a share of the numbers is kept (Golomb 1966)."""
    if not 0 < density < 1:
        return 0
    return max(0, round(math.log2(math.log(2) / -math.log1p(-density))))


def gap_bits(density: float) -> float:
    """Bits that a gap takes on average."""
    if density <= 0:
        return 0.0
    low = rice_parameter(density)
    # Zeros before a number are geometric: the mean of those above ``low`` bits is that of 2 ** low tries at once.
    missed = (1 - density) ** (1 << low)
    return low + 1 + missed / (1 - missed)


def _bits_of(gaps: Tensor, low: int) -> Tensor:
    """The lowest bits of every gap, lowest first, ``[gaps * low]``."""
    return ((gaps[:, None] >> torch.arange(low)) & 1).to(torch.uint8).reshape(-1)


FORM = Sparse
