"""What a matrix contributes to a joint product: the rows that meet the input, and what is made of their results.

Nothing is rounded: the tensors of the layer are found again, bit by bit, in what is laid out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bolaco.layers import LowRankLinear, PivotedLinear
from bolaco.runtime.product import Product

State = dict[str, Tensor]


class Lay(Protocol):
    """Makes a product of a weight and a bias."""

    def __call__(self, weight: Tensor, bias: Tensor | None) -> Product:
        """The product, laid out."""


class Piece(nn.Module):
    """One matrix in the form in which it is computed.

    Attributes:
        stacked: whether rows of it meet the input together with those of others; else it takes the input itself.
        lay: lays out what is its own.
    """

    stacked: ClassVar[bool] = True

    def __init__(self, lay: Lay) -> None:
        super().__init__()
        self.lay = lay

    @abstractmethod
    def rows(self, layer: nn.Module, state: State) -> tuple[Tensor, Tensor | None]:
        """Takes what is its own out of a layer's state; gives the rows ``[s, in]`` and their bias ``[s]``."""

    @abstractmethod
    def state(self, rows: Tensor, bias: Tensor | None) -> State:
        """The layer's state again, from these rows and what is its own."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"lay": None}  # what it was needed for is done


class DensePiece(Piece):
    """All of it meets the input."""

    def rows(self, layer: nn.Module, state: State) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        return state["weight"], state.get("bias")

    def forward(self, z: Tensor) -> Tensor:
        """What it is given."""
        return z

    def state(self, rows: Tensor, bias: Tensor | None) -> State:
        """Weight and bias."""
        return _named("", rows, bias)


class FactorPiece(Piece):
    """Two factors: the first one meets the input."""

    def rows(self, layer: nn.Module, state: State) -> tuple[Tensor, Tensor | None]:
        """The first factor."""
        self.second = self.lay(state["expand.weight"], state.get("expand.bias"))
        return state["reduce.weight"], None

    def forward(self, z: Tensor) -> Tensor:
        """Maps ``[..., rank]`` by the second factor."""
        y: Tensor = self.second(z)
        return y

    def state(self, rows: Tensor, bias: Tensor | None) -> State:
        """Both factors."""
        return {"reduce.weight": rows} | _named("expand.", self.second.weight, self.second.bias)


class _Ordered(Piece):
    """A pivoted matrix."""

    order: Tensor

    def _take_order(self, state: State) -> None:
        self.register_buffer("order", state["order"], persistent=False)


class RowsPiece(_Ordered):
    """Pivot rows meet the input; the others are made of their results, and all are put in place."""

    def rows(self, layer: nn.Module, state: State) -> tuple[Tensor, Tensor | None]:
        """The pivots."""
        self._take_order(state)
        self.others = self.lay(state["rest.weight"], state.get("rest.bias"))
        return state["pivot.weight"], state.get("pivot.bias")

    def forward(self, z: Tensor) -> Tensor:
        """Results of the pivots among those of the others."""
        return torch.cat([z, self.others(z)], dim=-1).index_select(-1, self.order)

    def state(self, rows: Tensor, bias: Tensor | None) -> State:
        """Pivots, the others and their order."""
        others = _named("rest.", self.others.weight, self.others.bias)
        return {"order": self.order} | _named("pivot.", rows, bias) | others


class SpreadRowsPiece(_Ordered):
    """The same with the coefficients of the pivots, ones and zeros, written out: r² more numbers, one product."""

    def rows(self, layer: nn.Module, state: State) -> tuple[Tensor, Tensor | None]:
        """The pivots."""
        self._take_order(state)
        rest, bias, rank = state["rest.weight"], state.get("rest.bias"), len(state["pivot.weight"])
        offset = None if bias is None else torch.cat([bias.new_zeros(rank), bias])[self.order]
        self.second = self.lay(torch.cat([_one(rank, rest), rest])[self.order], offset)
        return state["pivot.weight"], state.get("pivot.bias")

    def forward(self, z: Tensor) -> Tensor:
        """All outputs from the results of the pivots."""
        y: Tensor = self.second(z)
        return y

    def state(self, rows: Tensor, bias: Tensor | None) -> State:
        """Pivots, the others and their order."""
        where, offset = torch.argsort(self.order)[len(rows) :], self.second.bias
        others = _named("rest.", self.second.weight[where], None if offset is None else offset[where])
        return {"order": self.order} | _named("pivot.", rows, bias) | others


class ColumnsPiece(_Ordered):
    """Pivot columns as they are stored. Every matrix folds the input in its own way, so nothing of it is stacked.

    Attributes:
        moved: its inputs come with those that are kept first, because what makes them writes them so.
    """

    stacked = False
    moved = False

    def rows(self, layer: nn.Module, state: State) -> tuple[Tensor, Tensor | None]:
        """None."""
        self._take_order(state)
        self.fold = self.lay(state["rest.weight"], None)
        self.second = self.lay(state["pivot.weight"], state.get("pivot.bias"))
        return state["rest.weight"].new_empty(0, len(self.order)), None

    def forward(self, x: Tensor) -> Tensor:
        """Maps the input itself, ``[..., in]``."""
        if not self.moved:
            x = x.index_select(-1, self.order)
        rank = self.fold.out_features
        y: Tensor = self.second(x[..., :rank] + self.fold(x[..., rank:]))
        return y

    def state(self, rows: Tensor, bias: Tensor | None) -> State:
        """Pivots, the others and their order."""
        folded = {"order": self.order, "rest.weight": self.fold.weight}
        return folded | _named("pivot.", self.second.weight, self.second.bias)


class SpreadColumnsPiece(_Ordered):
    """Pivot columns, with the ones of the inputs that are kept written out: r² more numbers, and nothing is moved."""

    def rows(self, layer: nn.Module, state: State) -> tuple[Tensor, Tensor | None]:
        """What folds the input, the kept inputs included."""
        self._take_order(state)
        rest = state["rest.weight"]
        self.second = self.lay(state["pivot.weight"], state.get("pivot.bias"))
        return torch.cat([_one(len(rest), rest), rest], dim=1)[:, torch.argsort(self.order)], None

    def forward(self, z: Tensor) -> Tensor:
        """Maps ``[..., rank]`` by the pivots."""
        y: Tensor = self.second(z)
        return y

    def state(self, rows: Tensor, bias: Tensor | None) -> State:
        """Pivots, the others and their order."""
        folded = {"order": self.order, "rest.weight": rows[:, self.order[len(rows) :]]}
        return folded | _named("pivot.", self.second.weight, self.second.bias)


class MultipliedPiece(Piece):
    """The factors multiplied: one product with as many numbers as the dense matrix has. The factors are kept beside."""

    def rows(self, layer: nn.Module, state: State) -> tuple[Tensor, Tensor | None]:
        """The matrix and its bias, computed in float64."""
        self._names = list(state)
        for name, tensor in state.items():
            self.register_buffer(name.replace(".", "_"), tensor, persistent=False)
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        like = next(tensor for tensor in state.values() if tensor.is_floating_point())
        size = int(layer.in_features)  # type: ignore[arg-type]
        inputs = torch.eye(size + 1, size, dtype=torch.float64, device=like.device)  # the last one is zero
        made = functional_call(layer, wide, (inputs,))
        bias = made[-1].to(like.dtype) if any(name.endswith("bias") for name in state) else None
        return (made[:-1] - made[-1]).t().to(like.dtype).contiguous(), bias

    def forward(self, z: Tensor) -> Tensor:
        """What it is given."""
        return z

    def state(self, rows: Tensor, bias: Tensor | None) -> State:
        """What was kept."""
        return {name: getattr(self, name.replace(".", "_")) for name in self._names}


def pieces_of(layer: nn.Module) -> Sequence[type[Piece]]:
    """The forms that a layer can be computed in: as it is stored first, then with more numbers; none if unknown."""
    if not all(type(child) is nn.Linear for child in layer.children()):
        return ()  # coded, or adapted
    if isinstance(layer, PivotedLinear):
        return (RowsPiece, SpreadRowsPiece) if layer.side == "rows" else (ColumnsPiece, SpreadColumnsPiece)
    return {nn.Linear: (DensePiece,), LowRankLinear: (FactorPiece,)}.get(type(layer), ())


def with_outputs(layer: nn.Module, state: State, order: Tensor) -> State:
    """The state of a layer of the same class whose outputs are those of ``state`` in the order ``[out]``."""
    if isinstance(layer, PivotedLinear) and layer.side == "rows":
        return state | {"order": state["order"][order]}
    last = {nn.Linear: "", LowRankLinear: "expand.", PivotedLinear: "pivot."}[type(layer)]
    return state | {
        f"{last}{name}": state[f"{last}{name}"][order] for name in ("weight", "bias") if f"{last}{name}" in state
    }


def _one(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _named(prefix: str, weight: Tensor, bias: Tensor | None) -> State:
    return {f"{prefix}weight": weight} | ({} if bias is None else {f"{prefix}bias": bias})
