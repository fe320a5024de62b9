"""A low-rank matrix as some of its rows or columns, and what makes the others from them (PIFA, arXiv 2501.19090)."""

import torch
from torch import Tensor, nn

from bolaco.layers.base import Entry, FactoredLinear, builds, grouped_linear, matrix_in


class PivotedLinear(FactoredLinear):
    """A matrix of rank r in ``r (in + out - r)`` parameters, never more than the dense matrix has.

    ``side="rows"``: ``pivot`` computes r outputs, ``rest`` the others from those, ``order`` puts them in place.
    ``side="columns"``: ``order`` puts r inputs first, ``rest`` folds the others into them, ``pivot`` maps them on.
    """

    kind = "pivoted"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, side: str) -> None:
        super().__init__(in_features, out_features, rank)
        self.side = side
        if side == "rows":
            self.pivot = nn.Linear(in_features, rank, bias=bias)
            self.rest = nn.Linear(rank, out_features - rank, bias=bias)
        else:
            self.rest = nn.Linear(in_features - rank, rank, bias=False)
            self.pivot = nn.Linear(rank, out_features, bias=bias)
        size = out_features if side == "rows" else in_features
        self.register_buffer("order", torch.arange(size, dtype=torch.int32))
        self.order: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        if self.side == "rows":
            first = self.pivot(x)
            return torch.cat([first, self.rest(first)], dim=-1).index_select(-1, self.order)
        x = x.index_select(-1, self.order)
        mapped: Tensor = self.pivot(x[..., : self.rank] + self.rest(x[..., self.rank :]))
        return mapped

    def grouped(self, x: Tensor, sizes: list[int]) -> Tensor:
        """:meth:`forward` of all experts at once, each of its run of ``x`` ``[n, in]``; its tensors are stacked."""
        order = self.order.repeat_interleave(torch.tensor(sizes, device=x.device), dim=0).long()
        if self.side == "rows":
            first = grouped_linear(x, sizes, self.pivot.weight, self.pivot.bias)
            rest = grouped_linear(first, sizes, self.rest.weight, self.rest.bias)
            return torch.cat([first, rest], dim=-1).gather(-1, order)
        x = x.gather(-1, order)
        kept = x[:, : self.rank] + grouped_linear(x[:, self.rank :], sizes, self.rest.weight)
        return grouped_linear(kept, sizes, self.pivot.weight, self.pivot.bias)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The pivots are one factor as they are; the other has the identity in their place."""
        kept, rest = self.pivot.weight, self.rest.weight
        one = torch.eye(self.rank, dtype=kept.dtype, device=kept.device)
        if self.side == "rows":
            return torch.cat([one, rest])[self.order], kept
        return kept, torch.cat([one, rest], dim=1)[:, torch.argsort(self.order)]

    def dense(self) -> Tensor:
        """The matrix, ``[out, in]``: the pivots as they are, the others made from them."""
        kept, rest = self.pivot.weight, self.rest.weight
        if self.side == "rows":
            return torch.cat([kept, rest @ kept])[self.order]
        return torch.cat([kept, kept @ rest], dim=1)[:, torch.argsort(self.order)]

    def dense_bias(self) -> Tensor | None:
        """The bias, ``[out]``, or None."""
        bias = self.pivot.bias
        if self.side == "rows" and bias is not None:
            # Weights can be of another type: trained ones are float32 whatever is frozen.
            made = self.rest.weight.to(bias.dtype) @ bias + self.rest.bias
            return torch.cat([bias, made])[self.order]
        return bias

    def growth(self) -> float:
        """The largest coefficient in absolute value."""
        rest = self.rest.weight.detach()
        return float(rest.abs().max()) if rest.numel() else 0.0

    def entry(self) -> Entry:
        """With the side of its pivots."""
        return super().entry() | {"side": self.side}

    def extra_repr(self) -> str:
        """Shape, rank and side, for printing a model."""
        return f"{super().extra_repr()}, side={self.side}"


@builds(PivotedLinear.kind)
def _pivoted(in_features: int, entry: Entry) -> PivotedLinear:
    out, rank, bias = matrix_in(in_features, entry)
    side = entry.get("side")
    if side not in ("rows", "columns"):
        raise ValueError(f"side must be rows or columns, not {str(side)[:40]!r}")
    if rank > (out if side == "rows" else in_features):
        raise ValueError(f"rank {rank} is more than the {side} of a matrix of {out} x {in_features}")
    return PivotedLinear(in_features, out, rank, bias, side)
