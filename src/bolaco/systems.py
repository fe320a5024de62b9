"""Published systems that are more than a metric: what ``--method NAME`` means for them, and what contradicts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """A name that ``--method`` takes for a whole recipe.

    Attributes:
        kind: which part of a run is its own: ``factorization``, ``allocation`` or ``transform``.
        paper: where it is from, such as ``arXiv 2405.10616``.
        summary: one line for ``bolaco methods``.
        presets: recipes that are this system; the first is what the name alone means.
        fixed: field of the recipe -> the values it can have in this system.
        because: why, for whoever asks for another value.
    """

    kind: str
    paper: str
    summary: str
    presets: tuple[str, ...]
    fixed: Mapping[str, tuple[str, ...]]
    because: str


SYSTEMS: dict[str, System] = {
    "bolaco": System(
        kind="allocation",
        paper="arXiv 2405.10616",
        summary="afm factors, ranks by Bayesian search of a keep ratio for each matrix type (--search 5x1 or 5x4)",
        presets=("bolaco-5x1", "bolaco-5x4", "paper"),
        fixed={"search.space": ("5x1", "5x4")},
        because="its ranks come from a search",
    ),
    "welore": System(
        kind="allocation",
        paper="arXiv 2407.11239",
        summary="svd factors, ranks by one threshold on all normalised singular values (WeLore)",
        presets=("welore",),
        fixed={"search.space": ("welore",)},
        because="it is a rule for ranks itself",
    ),
    "joint": System(
        kind="factorization",
        paper="arXiv 2402.16319",
        summary="svd of q over k and of gate over up, one input factor for both; reads no text",
        presets=("joint",),
        fixed={"factorization.storage": ("shared",)},
        because="its matrices share a factor",
    ),
    "lpaf": System(
        kind="factorization",
        paper="arXiv 2306.14152",
        summary="gradual first-order pruning, then SVD of the sparse weights by their importance (LPAF)",
        presets=("lpaf",),
        fixed={"search.space": ("uniform",)},
        because="its matrices all keep one ratio",
    ),
    "chop": System(
        kind="transform",
        paper="arXiv 2305.14864",
        summary="whole decoder blocks are removed, the first and the last stay; a stock checkpoint (Just CHOP)",
        presets=("chop",),
        fixed={"factorization.storage": ("dense",), "search.space": ("none",)},
        because="it removes blocks and factors nothing",
    ),
}
