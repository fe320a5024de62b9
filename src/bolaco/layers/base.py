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
Builder = Callable[[Any, Entry], nn.Module]

# Rows or columns of a matrix that nobody has.
LARGEST = 2**24

BUILDERS: dict[str, Builder] = {}
# Kinds whose builder is given the module that the layer takes the place of, because parts of that go on living in it.
OF_MODULE: set[str] = set()


def builds(kind: str, of_module: bool = False) -> Callable[[Builder], Builder]:
    """Decorates the function that makes a layer of this kind from its input size and its entry.

    With ``of_module`` it is given the module whose place the layer takes instead of the input size.
    """

    def register(builder: Builder) -> Builder:
        BUILDERS[kind] = builder
        if of_module:
            OF_MODULE.add(kind)
        return builder

    return register


def build_layer(in_features: Any, entry: Entry) -> nn.Module:
    """The layer that an entry describes, on ``in_features`` inputs (for some kinds the module it replaces).

    Raises:
        ValueError: its kind is not known here, or it is no entry of that kind.
    """
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in BUILDERS:
        raise ValueError(f"unknown kind of layer {kind!r}; known are {', '.join(BUILDERS)}")
    return BUILDERS[kind](in_features, entry)


@builds("dense")
def _dense(in_features: int, entry: Entry) -> nn.Linear:
    return nn.Linear(in_features, size_in(entry, "out", LARGEST), bias=bias_in(entry))


def size_in(entry: Entry, name: str, most: int) -> int:
    """A whole number from 1 to ``most`` in an entry.

    Raises:
        ValueError: it is none, or is not there.
    """
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise ValueError(f"{name} must be a number from 1 to {most}, not {str(value)[:40]!r}")
    return value


def bias_in(entry: Entry) -> bool:
    """Whether the layer of an entry has a bias; ValueError if it does not say so."""
    value = entry.get("bias")
    if not isinstance(value, bool):
        raise ValueError(f"bias must be true or false, not {str(value)[:40]!r}")
    return value


def parts_in(entry: Entry) -> list[Entry]:
    """The entries of the layers inside a layer; ValueError if they are none."""
    parts = entry.get("parts")
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError("parts must be a list of entries")
    return parts


def named_parts(entry: Entry) -> dict[str, Entry]:
    """The same by their names, which must be names of attributes and not twice the same."""
    found: dict[str, Entry] = {}
    for part in parts_in(entry):
        name = part.get("name")
        if not isinstance(name, str) or not name.isidentifier() or name in found or hasattr(nn.ModuleDict, name):
            raise ValueError(f"a part must have a name of its own, not {str(name)[:40]!r}")
        found[name] = part
    return found


def inner_in(entry: Entry) -> Entry:
    """The entry of the layer inside a layer; ValueError if it is none."""
    layer = entry.get("layer")
    if not isinstance(layer, dict):
        raise ValueError(f"layer must be an entry, not {str(layer)[:40]!r}")
    return layer


def module_at(root: nn.Module, name: str) -> nn.Module:
    """The module at a dotted name inside ``root``; ValueError if there is none."""
    try:
        found = root.get_submodule(name)
    except AttributeError:
        found = root
    if found is root:
        raise ValueError(f"the model has no {name[:200]!r}")
    return found


def put_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the module at a dotted name inside ``root``."""
    parent, _, attribute = name.rpartition(".")
    setattr(root.get_submodule(parent), attribute, module)


def grouped_linear(x: Tensor, sizes: list[int], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows ``[n, in]`` in consecutive runs of ``sizes``, each through its own matrix ``[experts, out, in]``."""
    grouped = getattr(torch.nn.functional, "grouped_mm", None)
    if grouped is not None and x.is_cuda and weight.dtype == torch.bfloat16:
        ends = torch.tensor(sizes, device=x.device).cumsum(0).to(torch.int32)
        y: Tensor = grouped(x.to(weight.dtype), weight.transpose(1, 2), offs=ends)
        if bias is not None:
            y = y + bias.repeat_interleave(torch.tensor(sizes, device=x.device), dim=0)
        return y
    runs = [
        nn.functional.linear(run, weight[i], None if bias is None else bias[i])
        for i, run in enumerate(x.split(sizes))
        if len(run)
    ]
    return torch.cat(runs) if runs else x.new_zeros(0, weight.shape[1])


def matrix_in(in_features: int, entry: Entry) -> tuple[int, int, bool]:
    """Output size, rank and bias of a factored matrix in its entry; ValueError if one of them cannot be."""
    out = size_in(entry, "out", LARGEST)
    return out, size_in(entry, "rank", max(in_features, out)), bias_in(entry)


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
