"""Matrices on one input that have one input factor in common, which is computed once (arXiv 2402.16319)."""

import weakref
from typing import Any

from torch import Tensor, nn

from bolaco.layers.base import Entry, FactoredLinear, builds, matrix_in, module_at
from bolaco.layers.low_rank import LowRankLinear


class LeadLinear(LowRankLinear):
    """The matrix that owns the common ``reduce``, as q does for k: it keeps what it reduced for the others.

    What it keeps belongs to one input tensor and is used once; it is not part of the module's state.
    """

    kind = "lead"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__(in_features, out_features, rank, bias)
        self._kept: tuple[Tensor, Tensor] | None = None
        self._replicas: list[weakref.ref[Any]] = []
        self._replicas_taken = False

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        reduced = self.reduce(x)
        self._kept = (x, reduced)
        expanded: Tensor = self.expand(reduced)
        return expanded

    def reduced(self, x: Tensor) -> Tensor:
        """``reduce(x)``, ``[..., rank]``: what was kept if it is of this very tensor, else computed; none is kept."""
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] is x:
            return kept[1]
        reduced: Tensor = self.reduce(x)
        return reduced

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "_replicas": [], "_replicas_taken": False}

    def _replicate_for_data_parallel(self) -> Any:
        """A copy for another device, which the followers' copies find in :meth:`replica`."""
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        if self._replicas_taken:
            self._replicas, self._replicas_taken = [], False
        self._replicas.append(weakref.ref(replica))
        replica._kept, replica._replicas = None, []
        return replica

    def replica(self, index: int) -> "LeadLinear | None":
        """The copy of that index among those that were made last; None if there are not so many."""
        self._replicas_taken = True
        found: LeadLinear | None = self._replicas[index]() if index < len(self._replicas) else None
        return found


class FollowerLinear(FactoredLinear):
    """A matrix that uses the ``reduce`` of another one, its lead; only ``expand`` is its own.

    Where lead and follower are called with the same tensor, one after the other, the common product is computed once.
    Called with another tensor, or without its lead having been called, the follower computes the product itself.

    Attributes:
        lead_name: name of its lead in the base model.
    """

    kind = "follower"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, lead_name: str = "") -> None:
        super().__init__(in_features, out_features, rank)
        self.expand = nn.Linear(rank, out_features, bias=bias)
        self.lead_name = lead_name
        self._lead: tuple[LeadLinear, ...] = ()
        self._replicas_of: tuple[list[Any], int] = ([], 0)

    @property
    def lead(self) -> LeadLinear:
        """The matrix whose ``reduce`` it uses."""
        return self._lead[0]

    def follow(self, module: nn.Module) -> None:
        """Takes ``module`` for its lead; ValueError if it is no :class:`LeadLinear` of this rank."""
        if not isinstance(module, LeadLinear) or module.rank != self.rank:
            what = " ".join(str(module).split())[:80]
            raise ValueError(f"a factored matrix of rank {self.rank} cannot share the factor of {what}")
        # In a tuple, so that it is not registered as a child: its parameters are counted and stored once.
        self._lead = (module,)

    def connect(self, base_model: nn.Module) -> None:
        """Finds its lead by name; ValueError if there is none."""
        self.follow(module_at(base_model, self.lead_name))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_replicas_of": ([], 0)}

    def _replicate_for_data_parallel(self) -> Any:
        """A copy for another device, with the copy of its lead for that device.

        torch makes the copies of one module for all devices, then those of the next one. It connects registered modules
        only, so copies are paired by their number here. A follower that is copied without its lead keeps the lead.
        """
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        for lead in self._lead:
            made, index = self._replicas_of
            index = index + 1 if made is lead._replicas else 0
            self._replicas_of = (lead._replicas, index)
            replica._lead = (lead.replica(index) or lead,)
        replica._replicas_of = ([], 0)
        return replica

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        expanded: Tensor = self.expand(self.reduced(x))
        return expanded

    def reduced(self, x: Tensor) -> Tensor:
        """The lead's ``reduce(x)``, ``[..., rank]``."""
        return self.lead.reduced(x)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The weight of its ``expand``, and of its lead's ``reduce``."""
        return self.expand.weight, self.lead.reduce.weight

    def dense_bias(self) -> Tensor | None:
        """The bias of ``expand``."""
        return self.expand.bias

    def entry(self) -> Entry:
        """With the name of its lead."""
        return super().entry() | {"lead": self.lead_name}


@builds(LeadLinear.kind)
def _lead(in_features: int, entry: Entry) -> LeadLinear:
    return LeadLinear(in_features, *matrix_in(in_features, entry))


@builds(FollowerLinear.kind)
def _follower(in_features: int, entry: Entry) -> FollowerLinear:
    lead = entry.get("lead")
    if not isinstance(lead, str):
        raise ValueError(f"lead must be the name of a matrix, not {str(lead)[:40]!r}")
    return FollowerLinear(in_features, *matrix_in(in_features, entry), lead)
