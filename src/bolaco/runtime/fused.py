"""Layers whose products are laid out for this machine; those on one input meet it in one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bolaco.runtime.pieces import Lay, Piece, State, with_outputs


class Joint(nn.Module):
    """Matrices on one input. The first one that is called computes what meets the input for all of them."""

    def __init__(
        self, forms: Sequence[type[Piece]], layers: Sequence[nn.Module], states: Sequence[State], lay: Lay
    ) -> None:
        super().__init__()
        pieces = [form(lay) for form in forms]
        rows = [piece.rows(layer, state) for piece, layer, state in zip(pieces, layers, states, strict=True)]
        self.pieces = nn.ModuleList(pieces)
        self.sizes = [len(weight) for weight, _ in rows]
        self._biased = [bias is not None for _, bias in rows]
        bias = None
        if any(self._biased):
            bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in rows])
        self.first = lay(torch.cat([weight for weight, _ in rows]), bias) if any(self.sizes) else None
        self._kept: tuple[Tensor, int, list[Tensor | None]] | None = None

    def output(self, index: int, x: Tensor) -> Tensor:
        """What matrix number ``index`` makes of ``x`` ``[..., in]``."""
        piece = self.pieces[index]
        y: Tensor = piece(self._result(index, x) if piece.stacked else x)
        return y

    def _result(self, index: int, x: Tensor) -> Tensor:
        assert self.first is not None  # the piece has rows in it
        if len(self.sizes) == 1:
            result: Tensor = self.first(x)
            return result
        # Tensors of inference mode have no version.
        version = 0 if x.is_inference() else x._version
        kept = self._kept
        if kept is None or kept[0] is not x or kept[1] != version or kept[2][index] is None:
            made: Tensor = self.first(x)
            self._kept = kept = (x, version, list(made.split(self.sizes, dim=-1)))
        found = kept[2][index]
        assert found is not None
        kept[2][index] = None
        if all(z is None or not piece.stacked for z, piece in zip(kept[2], self.pieces, strict=True)):
            self._kept = None
        return found

    def states(self) -> list[State]:
        """The states of the layers, as they were given."""
        weight, bias = (torch.empty(0), None) if self.first is None else (self.first.weight, self.first.bias)
        rows = weight.split(self.sizes)
        biases = bias.split(self.sizes) if bias is not None else [None] * len(rows)
        return [
            piece.state(own, offset if biased else None)  # type: ignore[operator]
            for piece, own, offset, biased in zip(self.pieces, rows, biases, self._biased, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}


class FusedLinear(nn.Module):
    """A layer, dense or factored, as part of a :class:`Joint`. Its state dict is that of the layer.

    Attributes:
        in_features, out_features: of the matrix.
        placed: the order in which it gives its outputs, ``[out]``; None as the layer does.
    """

    placed: Tensor | None

    def __init__(self, layer: nn.Module, joint: Joint, index: int, placed: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.index = layer.in_features, layer.out_features, index
        self.register_buffer("placed", placed, persistent=False)
        # The layer is kept without its tensors. What is shared is a child of the first one only, so that it is
        # converted once.
        self._layer = (layer.to("meta"),)
        self._joint = (joint,)
        if index == 0:
            self.joint = joint
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        return self._joint[0].output(self.index, x)

    def state(self) -> State:
        """The layer's state dict."""
        state = self._joint[0].states()[self.index]
        return state if self.placed is None else with_outputs(self._layer[0], state, torch.argsort(self.placed))

    def layer(self) -> nn.Module:
        """The layer again, with its tensors."""
        (layer,) = self._layer
        layer.load_state_dict({name: tensor.contiguous() for name, tensor in self.state().items()}, assign=True)
        return layer.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The weight of a dense matrix, for parents that look at it."""
        found = self.state().get("weight")
        if found is None:
            raise AttributeError("a factored matrix has no weight")
        return found

    @property
    def bias(self) -> Tensor | None:
        """The bias of a dense matrix."""
        return self.state().get("bias")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # In the order of the layer's own state dict.
        state = self.state()
        destination.update({prefix + name: state[name].contiguous() for name in self._layer[0].state_dict()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        args[-1].append(f"{prefix}: this matrix is fused; bolaco.unfuse(model) before tensors are loaded into it")

    def extra_repr(self) -> str:
        """What it is in place of."""
        return f"{type(self._layer[0]).__name__}, {self._layer[0].extra_repr()}"
