"""Two thin matrices, ``[out, r]`` and ``[r, in]``: ``r (out + in)`` parameters."""

from bolaco.layers import FactoredLinear, LowRankLinear
from bolaco.models.structure import Site
from bolaco.storage.storage import Storage, pair_cost, pair_max_rank


class TwoFactor(Storage):
    """As a matrix is trained."""

    name = LowRankLinear.kind
    paper = ""
    summary = "two thin matrices, r (out + in) parameters"

    def cost(self, site: Site, rank: int) -> int:
        """Both factors."""
        return pair_cost(site, rank)

    def max_rank(self, site: Site, multiple: int) -> int:
        """Below ``out in / (out + in)``."""
        return pair_max_rank(site, multiple)

    def pack(self, layer: FactoredLinear) -> FactoredLinear:
        """The layer itself."""
        return layer


STORAGE = TwoFactor()
