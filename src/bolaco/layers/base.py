"""What all layers of a compressed model have in common: how an entry of the configuration becomes one of them.

The files of this folder import torch and transformers only. A checkpoint carries those that it uses, joined into its
modelling file, so that it loads where bolaco is not installed.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# An entry of ``config.lowrank["matrices"]``: ``"kind"``, and what the builder of that kind needs.
Entry = dict[str, Any]
Builder = Callable[[int, Entry], nn.Module]

BUILDERS: dict[str, Builder] = {}


def builds(kind: str) -> Callable[[Builder], Builder]:
    """Decorates the function that makes a layer of this kind from its input size and its entry."""

    def register(builder: Builder) -> Builder:
        BUILDERS[kind] = builder
        return builder

    return register


def build_layer(in_features: int, entry: Entry) -> nn.Module:
    """The layer that an entry describes, on ``in_features`` inputs.

    Raises:
        ValueError: its kind is not known here.
    """
    kind = entry.get("kind")
    if kind not in BUILDERS:
        raise ValueError(f"unknown kind of layer {kind!r}; known are {', '.join(BUILDERS)}")
    return BUILDERS[kind](in_features, entry)


@builds("dense")
def _dense(in_features: int, entry: Entry) -> nn.Linear:
    return nn.Linear(in_features, entry["out"], bias=entry["bias"])


def put_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the module at a dotted name inside ``root``."""
    parent, _, attribute = name.rpartition(".")
    setattr(root.get_submodule(parent), attribute, module)


class FactoredLinear(nn.Module):
    """A matrix ``[out, in]`` of a given rank. How its factors are stored is up to the subclass.

    Attributes:
        kind: name of the subclass in entries of the configuration.
        in_features, out_features, rank: of the matrix.
    """

    kind: ClassVar[str]

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """Two factors ``[out, rank]`` and ``[rank, in]`` whose product is the matrix."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The matrix, ``[out, in]``; the product is computed in float32 at least."""
        expand, reduce = self.factors()
        wide = torch.promote_types(expand.dtype, torch.float32)
        return (expand.to(wide) @ reduce.to(wide)).to(expand.dtype)

    def dense_bias(self) -> Tensor | None:
        """The bias, ``[out]``, or None."""
        raise NotImplementedError

    def linears(self) -> dict[str, nn.Linear]:
        """The Linears it consists of and owns, by their names in it; coded ones are none any more."""
        return {name: child for name, child in self.named_children() if isinstance(child, nn.Linear)}

    def growth(self) -> float | None:
        """The factor by which rounding errors can grow in this form; None where they do not."""
        return None

    def entry(self) -> Entry:
        """Its entry in the configuration, from which :func:`build_layer` makes it."""
        bias = self.dense_bias() is not None
        return {"kind": self.kind, "out": self.out_features, "rank": self.rank, "bias": bias}

    def connect(self, base_model: nn.Module) -> None:
        """Called once all layers of a model are in place, for those that refer to one another."""

    def extra_repr(self) -> str:
        """Shape and rank, for printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
