"""Two thin matrices, ``[out, r]`` and ``[r, in]``: ``r (out + in)`` parameters."""

from bolaco.layers import FactoredLinear, LowRankLinear
from bolaco.models.structure import Site
from bolaco.storage.storage import Storage


class TwoFactor(Storage):
    """As a matrix is trained."""

    name = LowRankLinear.kind
    paper = ""
    summary = "two thin matrices, r (out + in) parameters"

    def cost(self, site: Site, rank: int) -> int:
        """Both factors."""
        return rank * (site.out_features + site.in_features)

    def max_rank(self, site: Site, multiple: int) -> int:
        """Below ``out in / (out + in)``."""
        return (site.size - 1) // (site.out_features + site.in_features) // multiple * multiple

    def pack(self, layer: FactoredLinear) -> FactoredLinear:
        """The layer itself."""
        return layer


STORAGE = TwoFactor()
