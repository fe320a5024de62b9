"""Matrices on one input that have one input factor in common, which is computed once (arXiv 2402.16319)."""

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
        return self.__dict__ | {"_kept": None}


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
