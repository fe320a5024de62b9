"""What a storage is: the parameters a rank costs, and the layer that a trained product is packed into."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable

import torch

from bolaco.layers import FactoredLinear, FollowerLinear, LeadLinear, LowRankLinear
from bolaco.models.structure import Site, Stack, Structure
from bolaco.plugins import Registry, in_folder


class Storage(ABC):
    """One way to store factored matrices; there is a single instance of each.

    Attributes:
        name: what ``--storage`` takes.
        paper: where it is from.
        summary: one line for ``bolaco methods``.
        stacks: whether its units are stacks of several matrices; not every allocation and fit can do with those. A
            stack that is offered beside the units of another storage is stored as two factors.
        dense_types: matrix types it leaves dense unless the recipe names others; None leaves that to the allocation.
        unit: what costs are counted in.
        fragile: why it does not keep what it stores in few bits; empty where it does. A recipe that asks for bits and
            not for a storage has two factors in its place.
    """

    name: str
    paper: str
    summary: str
    stacks: bool = False
    dense_types: tuple[str, ...] | None = None
    unit: str = "parameters"
    fragile: str = ""

    def units(self, structure: Structure, dense_types: Iterable[str]) -> Structure:
        """The structure with one site for each matrix, or stack of matrices, that is factored as one."""
        return structure

    @abstractmethod
    def cost(self, site: Site, rank: int) -> int:
        """Parameters of a site at a rank, biases not counted; grows with the rank up to :meth:`max_rank`."""

    @abstractmethod
    def max_rank(self, site: Site, multiple: int) -> int:
        """Largest multiple of ``multiple`` that is stored in less than the dense matrix; 0 if there is none."""

    @abstractmethod
    def pack(self, layer: FactoredLinear) -> FactoredLinear:
        """The layer in its stored form, of the same rank and product.

        Args:
            layer: in the form in which it is trained: a :class:`bolaco.layers.LowRankLinear`, or of a stack a
                :class:`bolaco.layers.LeadLinear` and its :class:`bolaco.layers.FollowerLinear` s.
        """

    def bits(self, site: Site, rank: int | None, dtype: torch.dtype) -> int:
        """Bits on disk of a site at a rank, of the dense matrix for None; biases not counted."""
        return 8 * dtype.itemsize * self.parameters(site, rank)

    def parameters(self, site: Site, rank: int | None) -> int:
        """Parameters of a site at a rank; of the dense matrix for None."""
        if rank is None:
            return self.dense_cost(site)
        return pair_cost(site, rank) if self._offered(site) else self.cost(site, rank)

    def dense_cost(self, site: Site) -> int:
        """Parameters of the dense matrix."""
        return site.size

    def top(self, site: Site, multiple: int) -> int:
        """:meth:`max_rank` of a unit of this storage, or of a stack that is offered beside them."""
        return pair_max_rank(site, multiple) if self._offered(site) else self.max_rank(site, multiple)

    def packed(self, layer: FactoredLinear) -> FactoredLinear:
        """:meth:`pack`; what shares its input factor, and is no unit of this storage, stays as it is trained."""
        shares = isinstance(layer, LeadLinear | FollowerLinear)
        return layer if shares and not self.stacks else self.pack(layer)

    def _offered(self, site: Site) -> bool:
        return isinstance(site, Stack) and not self.stacks

    def rank_for(self, site: Site, keep: float, multiple: int) -> int | None:
        """The largest multiple stored in a share ``keep`` of what the dense matrix costs, but at least one multiple.

        None (dense) for keep >= 1, and for a matrix too small to be factored at all.
        """
        top = self.max_rank(site, multiple)
        if keep >= 1 or top == 0:
            return None
        # The guard keeps a ratio that was computed from a rank from rounding down to the rank below.
        allowed = keep * self.dense_cost(site) + 1e-5
        steps = range(multiple, top + 1, multiple)
        return multiple * max(bisect_right(steps, allowed, key=lambda rank: self.cost(site, rank)), 1)


def pair_cost(site: Site, rank: int) -> int:
    """Parameters of two factors, ``[out, rank]`` and ``[rank, in]``."""
    return rank * (site.out_features + site.in_features)


def pair_max_rank(site: Site, multiple: int) -> int:
    """The largest multiple below ``out in / (out + in)``."""
    return (site.size - 1) // (site.out_features + site.in_features) // multiple * multiple


# What matrices are trained in, and what takes the place of a storage that does not keep in few bits.
TWO_FACTORS = LowRankLinear.kind

STORAGES: Registry[Storage] = Registry(
    "storage",
    "storage",
    Storage,  # type: ignore[type-abstract]  # instances of subclasses
    in_folder("bolaco.storage.storages", "STORAGE"),
    group="bolaco.storages",
)
