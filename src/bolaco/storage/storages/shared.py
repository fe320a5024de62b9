"""One input factor for matrices on one input: q and k, gate and up (joint rank-k, arXiv 2402.16319).

The matrices are stacked and factored as one ``[out1 + out2, in]``: ``r (out1 + out2 + in)`` parameters.
"""

from collections.abc import Iterable

from bolaco.models.structure import Structure, stacked
from bolaco.storage.storages.two_factor import TwoFactor


class Shared(TwoFactor):
    """Two factors of each stack; the second matrix of a stack uses the first one's input factor."""

    name = "shared"
    paper = "arXiv 2402.16319"
    summary = "q and k, gate and up have one input factor, r (out + out + in) parameters for both"
    stacks = True
    dense_types = ("v", "o", "down")

    def units(self, structure: Structure, dense_types: Iterable[str]) -> Structure:
        """Stacks, where all their matrices may be factored."""
        return stacked(structure, dense_types)


STORAGE = Shared()
