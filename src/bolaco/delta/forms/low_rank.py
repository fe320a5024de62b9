"""Products of thin matrices, in groups of singular directions that have a number of bits each (arXiv 2406.08903)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from bolaco.delta.form import Form, values_of
from bolaco.errors import CheckpointError
from bolaco.quantize.grid import GridSpec
from bolaco.quantize.matrix import QuantizedMatrix, from_tensors
from bolaco.settings import Section, Values

# A factor that is not quantized is kept in this format.
HALF = torch.bfloat16


class GroupEntry(Section):
    """A group of directions: how many, the levels of both factors (null is 16 bits), and whether there are values."""

    rank: int = Field(gt=0, lt=2**20)
    scaled: bool
    left: GridSpec | None
    right: GridSpec | None


class LowRankEntry(Section):
    """The groups in their order."""

    groups: tuple[GroupEntry, ...]


@dataclass(frozen=True)
class Group:
    """Some directions of D: ``left diag(scale) right``.

    Attributes:
        left: ``[out, rank]``, quantized or bfloat16.
        right: ``[rank, in]``, likewise.
        scale: ``[rank]`` bfloat16, singular values; None where the factors have them in them.
    """

    left: QuantizedMatrix | Tensor
    right: QuantizedMatrix | Tensor
    scale: Tensor | None = None

    @property
    def rank(self) -> int:
        """Directions."""
        return int(self.right.shape[0])

    @property
    def code_bits(self) -> tuple[int, int]:
        """Of a number of each factor, scales not counted."""
        return _bits(self.left), _bits(self.right)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B ``[out, rank]`` and A ``[rank, in]``, float32."""
        left, right = _dense(self.left), _dense(self.right)
        return (left if self.scale is None else left * self.scale.float()), right

    def tensors(self) -> dict[str, Tensor]:
        """What is stored of it."""
        found = {} if self.scale is None else {"scale": self.scale}
        for side, factor in (("left", self.left), ("right", self.right)):
            parts = {"": factor} if isinstance(factor, Tensor) else factor.tensors()
            found |= {f"{side}.{name}".rstrip("."): tensor for name, tensor in parts.items()}
        return found


class LowRank(Form):
    """The sum of groups; no groups are zero."""

    name = "low-rank"
    paper = "arXiv 2406.08903"
    summary = "groups of singular directions, each with its own bits"

    def __init__(self, groups: tuple[Group, ...], shape: tuple[int, int]) -> None:
        self.groups, self.shape = groups, shape

    @property
    def rank(self) -> int:
        """Of all groups together."""
        return sum(group.rank for group in self.groups)

    def tensors(self) -> dict[str, Tensor]:
        """Those of the groups."""
        return {
            f"{i}.{name}": tensor for i, group in enumerate(self.groups) for name, tensor in group.tensors().items()
        }

    def entry(self) -> Values:
        """A :class:`LowRankEntry`."""
        groups = tuple(
            GroupEntry(rank=g.rank, scaled=g.scale is not None, left=_spec(g.left), right=_spec(g.right))
            for g in self.groups
        )
        return LowRankEntry(groups=groups).model_dump(mode="json")

    @classmethod
    def read(cls, entry: Values, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> LowRank:
        """See :meth:`Form.read`."""
        groups, used = [], 0
        for i, group in enumerate(values_of(LowRankEntry, entry).groups):
            own = {name.removeprefix(f"{i}."): t for name, t in tensors.items() if name.startswith(f"{i}.")}
            used += len(own)
            left = _read(own, "left", group.left, shape[0], group.rank)
            right = _read(own, "right", group.right, group.rank, shape[1])
            scale = own.get("scale")
            known = None if scale is None else (scale.dtype, tuple(scale.shape))
            if known != ((HALF, (group.rank,)) if group.scaled else None):
                raise CheckpointError(f"group {i}: its values are {known}, where {group.rank} are due")
            groups.append(Group(left, right, scale))
        if used != len(tensors):
            raise CheckpointError(f"{len(tensors) - used} tensors belong to no group")
        return cls(tuple(groups), shape)

    def dense(self) -> Tensor:
        """D, float32 ``[out, in]``."""
        found = self.factors()
        return found[0] @ found[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        """All groups side by side."""
        if not self.groups:
            return torch.zeros(self.shape[0], 0), torch.zeros(0, self.shape[1])
        parts = [group.factors() for group in self.groups]
        return torch.cat([left for left, _ in parts], dim=1), torch.cat([right for _, right in parts])

    def times(self, x: Tensor) -> Tensor:
        """``x D^T`` through the thin side."""
        left, right = self.factors()
        return (x @ right.to(x.dtype).T) @ left.to(x.dtype).T

    def plan(self) -> str:
        """Such as ``2 x 8 + 16 x 3 + 70 x 2 bits``."""
        parts = []
        for group in self.groups:
            left, right = group.code_bits
            parts.append(f"{group.rank} x {left}" + ("" if left == right else f"/{right}"))
        return f"{' + '.join(parts)} bits" if parts else "nothing"


def _bits(factor: QuantizedMatrix | Tensor) -> int:
    return 8 * factor.element_size() if isinstance(factor, Tensor) else factor.grid.spec.bits


def _spec(factor: QuantizedMatrix | Tensor) -> GridSpec | None:
    return None if isinstance(factor, Tensor) else factor.grid.spec


def _dense(factor: QuantizedMatrix | Tensor) -> Tensor:
    return factor.float() if isinstance(factor, Tensor) else factor.dense()


def _read(
    tensors: Mapping[str, Tensor], side: str, spec: GridSpec | None, rows: int, columns: int
) -> QuantizedMatrix | Tensor:
    """One factor of a group."""
    if spec is not None:
        ending = f"{side}."
        own = {name.removeprefix(ending): t for name, t in tensors.items() if name.startswith(ending)}
        try:
            return from_tensors(own, spec, rows, columns)
        except CheckpointError as error:
            raise CheckpointError(f"{side} factor {error}") from None
    found = tensors.get(side)
    if found is None or found.dtype != HALF or tuple(found.shape) != (rows, columns):
        raise CheckpointError(f"the {side} factor is not {str(HALF).removeprefix('torch.')} [{rows}, {columns}]")
    return found


FORM = LowRank
