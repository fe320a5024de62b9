"""The product with one matrix, whose weight lies in memory as the machine reads it fastest."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of input that are timed: one token, and a piece of a prompt.
_TIMED = (1, 64)
_REPEATS = 3
# How much slower prompts may become for the sake of single tokens.
_SLOWER = 1.1
# Bytes that are read before a call, so that the weight comes from memory as in a model, and not from a cache.
_CACHES = 2**25


class Product(nn.Module):
    """``y = x W^T + b``. Its weight is no parameter: it may lie in a form that torch cannot train or convert.

    Attributes:
        out_features, in_features: of the matrix.
        bias: ``[out]``, or None.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias, persistent=False)
        self._hold(weight)

    def _hold(self, weight: Tensor) -> None:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weight, ``[out, in]``, exactly as it was given."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Product:
        # Conversions to another type or device: of the plain weight, which is laid out again.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._hold(fn(self.weight))
        return self


class RowProduct(Product):
    """As torch stores it: ``[out, in]``."""

    def _hold(self, weight: Tensor) -> None:
        self._rows = weight.contiguous()

    @property
    def weight(self) -> Tensor:
        """What is held."""
        return self._rows

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        return F.linear(x, self._rows, self.bias)


class ColumnProduct(Product):
    """Transposed: ``[in, out]``, which products with a single vector read as one stream."""

    def _hold(self, weight: Tensor) -> None:
        self._columns = weight.t().contiguous()

    @property
    def weight(self) -> Tensor:
        """What is held, transposed back."""
        return self._columns.t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        return F.linear(x, self._columns.t(), self.bias)


class MixedProduct(ColumnProduct):
    """Transposed: one vector as BLAS does it, whose calls take a microsecond; several as oneDNN does."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        if x.numel() == self.in_features or (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._columns.t(), self.bias, "none", [], "")
        return y


class PackedProduct(Product):
    """In oneDNN's blocks. Without them, bfloat16 weights are brought into blocks anew in every call."""

    def _hold(self, weight: Tensor) -> None:
        if not packable(weight):
            raise ValueError(f"a weight of {weight.dtype} on {weight.device} cannot be packed")
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)

    @property
    def weight(self) -> Tensor:
        """What is held, out of its blocks."""
        return self._packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``; where gradients flow through it, with the plain weight."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y

    def __getstate__(self) -> dict[str, Any]:
        # Blocks can be neither copied nor pickled.
        state = self.__dict__.copy()
        state["_packed"] = self.weight
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._hold(state["_packed"])


def packable(weight: Tensor) -> bool:
    """Whether this machine has oneDNN's blocks for a weight."""
    known = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    if not known or not torch.backends.mkldnn.is_available() or not all(weight.shape):
        return False
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _other(device: torch.device) -> Tensor:
    return torch.zeros(_CACHES // 4, dtype=torch.int32, device=device)


def seconds_of(action: Callable[[Tensor], object], width: int, like: Tensor, rows: int) -> float:
    """The shortest of some calls with ``[1, rows, width]`` of the type and device of ``like``."""
    x = torch.ones(1, rows, width, dtype=like.dtype, device=like.device)
    times = []
    for _ in range(_REPEATS):
        if rows == 1:
            _other(like.device).max()
        start = time.perf_counter()
        action(x)
        if like.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


Cost = tuple[float, float]


def cost_of(action: Callable[[Tensor], object], width: int, like: Tensor) -> Cost:
    """Seconds of one token, and of a piece of a prompt."""
    with torch.inference_mode():
        action(torch.ones(1, 1, width, dtype=like.dtype, device=like.device))  # what the first call prepares
        one, many = (seconds_of(action, width, like, rows) for rows in _TIMED)
    return one, many


def cheapest(costs: list[Cost]) -> int:
    """The fastest for one token among those whose prompts take at most a tenth longer than the fastest ones."""
    limit = _SLOWER * min(many for _, many in costs)
    return min((index for index, (_, many) in enumerate(costs) if many <= limit), key=lambda index: costs[index][0])


class Layouts:
    """Lays weights out, each size of matrix as was fastest when it was measured.

    Matrices whose sides have the same power of two count as one size, so that a model takes about a second.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], type[Product]] = {}

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        """The product with ``weight`` ``[out, in]`` and ``bias`` ``[out]``."""
        key = (weight.dtype, weight.device, *(size.bit_length() for size in weight.shape))
        if key not in self._known:
            self._known[key] = self._fastest(weight)
        kind = self._known[key]
        return (kind if all(weight.shape) else RowProduct)(weight, bias)

    @staticmethod
    def _fastest(weight: Tensor) -> type[Product]:
        if not all(weight.shape):
            return RowProduct
        kinds: list[type[Product]] = [
            RowProduct,
            ColumnProduct,
            *([MixedProduct, PackedProduct] if packable(weight) else []),
        ]
        costs = [cost_of(kind(weight, None), weight.shape[1], weight) for kind in kinds]
        return kinds[cheapest(costs)]
