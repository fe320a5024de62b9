"""A low-rank matrix as the product of two thin ones."""

from torch import Tensor, nn

from bolaco.layers.base import Entry, FactoredLinear, builds, grouped_linear, matrix_in


class LowRankLinear(FactoredLinear):
    """``y = expand(reduce(x))``: two plain Linears, bias on the second."""

    kind = "two-factor"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__(in_features, out_features, rank)
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.expand = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        expanded: Tensor = self.expand(self.reduce(x))
        return expanded

    def reduced(self, x: Tensor) -> Tensor:
        """``reduce(x)``, ``[..., rank]``."""
        reduced: Tensor = self.reduce(x)
        return reduced

    def grouped(self, x: Tensor, sizes: list[int]) -> Tensor:
        """:meth:`forward` of all experts at once, each of its run of ``x`` ``[n, in]``; its tensors are stacked."""
        reduced = grouped_linear(x, sizes, self.reduce.weight)
        return grouped_linear(reduced, sizes, self.expand.weight, self.expand.bias)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The weights of ``expand`` and ``reduce``."""
        return self.expand.weight, self.reduce.weight

    def dense_bias(self) -> Tensor | None:
        """The bias of ``expand``."""
        return self.expand.bias


@builds(LowRankLinear.kind)
def _low_rank(in_features: int, entry: Entry) -> LowRankLinear:
    return LowRankLinear(in_features, *matrix_in(in_features, entry))
