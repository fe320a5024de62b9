"""What matrices cost in bits: a storage as a budget of bytes sees it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from bolaco.layers import FactoredLinear
from bolaco.models.structure import Site, Structure
from bolaco.quantize.settings import WHOLE, grid_spec
from bolaco.storage.storage import Storage


class CodedStorage(Storage):
    """A storage of two factors whose costs are bits on disk, scales counted, in place of parameters.

    Args:
        inner: how factored matrices are stored.
        choices: bits that a matrix can have, :data:`bolaco.quantize.settings.WHOLE` for no codes; costs are those of
            the most.
        group: numbers of a row that share a scale.
        dtype: number format of what has no codes.
    """

    unit = "bits"

    def __init__(self, inner: Storage, choices: Sequence[int], group: int, dtype: torch.dtype) -> None:
        self.inner, self.choices, self.group, self.dtype = inner, tuple(choices), group, dtype
        self.code_bits = max(self.choices)
        self.name, self.paper, self.summary = inner.name, inner.paper, inner.summary
        self.stacks, self.dense_types = inner.stacks, inner.dense_types

    def at(self, bits: int) -> CodedStorage:
        """The same with codes of so many bits."""
        return CodedStorage(self.inner, (bits,), self.group, self.dtype)

    def cheapest(self) -> CodedStorage:
        """The same with the fewest bits there are."""
        return self.at(min(self.choices))

    def units(self, structure: Structure, dense_types: Iterable[str]) -> Structure:
        """Those of the storage."""
        return self.inner.units(structure, dense_types)

    def cost(self, site: Site, rank: int) -> int:
        """Bits of a site at a rank."""
        if self.code_bits == WHOLE:
            return self.inner.bits(site, rank, self.dtype)
        return self._coded(rank, site.in_features) + sum(self._coded(m.out_features, rank) for m in site.members)

    def dense_cost(self, site: Site) -> int:
        """Bits of the dense matrix."""
        if self.code_bits == WHOLE:
            return 8 * self.dtype.itemsize * site.size
        return sum(self._coded(member.out_features, member.in_features) for member in site.members)

    def _coded(self, rows: int, columns: int) -> int:
        return grid_spec(self.code_bits, self.group).stored_bits(rows, columns)

    def max_rank(self, site: Site, multiple: int) -> int:
        """That of the storage: a rank that saves no parameter is not worth its error."""
        return self.inner.max_rank(site, multiple)

    def pack(self, layer: FactoredLinear) -> FactoredLinear:
        """As the storage does."""
        return self.inner.pack(layer)
