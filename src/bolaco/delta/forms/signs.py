"""The sign of every number and one size for all of them (BitDelta, arXiv 2402.10193)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bolaco.delta.form import Form, expect
from bolaco.quantize.packing import pack, packed_bytes, unpack
from bolaco.settings import Values


class Signs(Form):
    """``size * sign(D)``, the sign of zero being positive.

    Args:
        signs: packed, ``[packed bytes]`` uint8, row by row; a set bit is positive.
        size: bfloat16, one number.
        shape: ``[out, in]``.
    """

    name = "signs"
    paper = "arXiv 2402.10193"
    summary = "one bit for each number, one size for all"

    def __init__(self, signs: Tensor, size: Tensor, shape: tuple[int, int]) -> None:
        self.signs, self.size, self.shape = signs, size, shape

    @classmethod
    def of(cls, delta: Tensor, size: Tensor | None = None) -> Signs:
        """The signs of D; its mean absolute value where no size is given, which has the least squared error."""
        scale = delta.abs().mean() if size is None else size
        out, width = delta.shape
        return cls(pack((delta >= 0).to(torch.uint8), 1), scale.to(torch.bfloat16).reshape(1), (out, width))

    def tensors(self) -> dict[str, Tensor]:
        """Signs and size."""
        return {"signs": self.signs, "size": self.size}

    def entry(self) -> Values:
        """Nothing."""
        return {}

    @classmethod
    def read(cls, entry: Values, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Signs:
        """See :meth:`Form.read`."""
        expect(tensors, signs=(torch.uint8, (packed_bytes(shape[0] * shape[1], 1),)), size=(torch.bfloat16, (1,)))
        return cls(tensors["signs"], tensors["size"], shape)

    def dense(self) -> Tensor:
        """D, float32 ``[out, in]``."""
        rows, columns = self.shape
        return self.size.float() * (2 * unpack(self.signs, 1, rows * columns).view(rows, columns).float() - 1)


FORM = Signs
