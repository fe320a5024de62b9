"""Some rows or columns of the product, and what makes the others from them: ``r (out + in - r)`` parameters.

The same product as two factors in r^2 fewer parameters, and never more than the dense matrix (PIFA, arXiv 2501.19090).
"""

import torch

from bolaco.layers import FactoredLinear, PivotedLinear
from bolaco.models.structure import Site, Stack
from bolaco.storage.pivot import pivot
from bolaco.storage.storage import Storage


class PivotedStorage(Storage):
    """Pivots and coefficients, with an index that says where each of them belongs."""

    name = PivotedLinear.kind
    paper = "arXiv 2501.19090"
    summary = "rows or columns that make the others, r (out + in - r) parameters (PIFA)"
    fragile = "rows are made of other rows there, so that the rounding of both adds up"

    def cost(self, site: Site, rank: int) -> int:
        """Pivots and coefficients; the index is no parameter."""
        return rank * (site.out_features + site.in_features - rank)

    def max_rank(self, site: Site, multiple: int) -> int:
        """Below the smaller side."""
        return (min(site.out_features, site.in_features) - 1) // multiple * multiple

    def bits(self, site: Site, rank: int | None, dtype: torch.dtype) -> int:
        """With the index, 32 bits for each element of the pivoted side (the smaller one, as a rule)."""
        index = 0 if rank is None or isinstance(site, Stack) else 32 * min(site.out_features, site.in_features)
        return super().bits(site, rank, dtype) + index

    def pack(self, layer: FactoredLinear) -> FactoredLinear:
        """The pivoted form of the product, computed in float64 on the CPU."""
        expand, reduce = (factor.detach() for factor in layer.factors())
        bias = layer.dense_bias()
        form = pivot(expand.cpu(), reduce.cpu())
        with torch.device("meta"):
            made = PivotedLinear(layer.in_features, layer.out_features, layer.rank, bias is not None, form.side)
        made.load_state_dict(form.state(None if bias is None else bias.detach().cpu()), assign=True)
        return made.to(expand.device).requires_grad_(False)


STORAGE = PivotedStorage()
