"""Published recipes, and ours: values that a recipe starts from, and the systems that ``--method`` takes by name.

Data only, so that ``--help`` can list the names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_PLAIN = {"fit": False, "steps": 0}
# Of what fits matrices again: the text that this is done on, all of it.
_FIT = {"fit": True, "sequences": 32, "held_out": 0}


def one_shot(method: str, storage: str = "two-factor", search: str = "uniform") -> dict[str, Any]:
    """A method as its paper has it: two factors, one ratio for all unless it says otherwise, nothing afterwards."""
    return {"method": {"name": method}, "storage": storage, "search": {"name": search}, "refinement": _PLAIN}


# What a result is to be best at, for the same bytes. Two factors are the faster form (docs/results.md): two products,
# nothing is moved, and those of q, k and v, or gate and up, meet their input in one. Pivoted storage loses less.
OPTIMIZED: dict[str, dict[str, str]] = {"size": {}, "speed": {"storage": "two-factor"}}
# The settings of arXiv 2405.10616. The pool the 100 validation sequences are chosen from is not published;
# 400 is ours. Constrained proposals are kept as they are there: no filling up, a tenth of slack.
PAPER: dict[str, Any] = {
    "calibration": {"source": "allenai/c4", "sequences": 1024, "seq_len": 4096, "groups": 32},
    "validation": {
        "source": "wikimedia/wikipedia:20231101.en",
        "sequences": 100,
        "candidates": 400,
        "seq_len": 4096,
        "allocations": 20,
    },
    "method": {"name": "afm"},
    "storage": "two-factor",
    "search": {
        "name": "5x1",
        "trials": 50,
        "initial": 0,
        "slack": 0.1,
        "fill": False,
        "surrogate": "paper",
        "objective": "ppl+kl",
        "kl_weight": 1e-3,
        "dense_types": ("v",),
        "rank_multiple": 8,
        "min_keep": 0.2,
    },
    "refinement": _PLAIN,
    "evaluation": {"source": "Salesforce/wikitext:wikitext-2-raw-v1:test", "seq_len": 4096, "windows": None},
}
# All but "paper" are run on the default's text. Where they deviate from their papers is said in docs/methods.md.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"method": {"name": "kfac"}, "storage": "pivoted", "search": {"name": "spectral"}},
    "paper": PAPER,
    "bolaco-5x1": one_shot("afm", search="5x1"),
    "bolaco-5x4": one_shot("afm", search="5x4"),
    "svd-llm": one_shot("svd-llm"),
    "kfac-svd": one_shot("kfac", search="spectral"),
    "asvd": one_shot("asvd"),
    "fwsvd": one_shot("fwsvd"),
    "welore": one_shot("svd", search="welore"),
    "aa-svd": one_shot("svd-llm")
    | {
        "refinement": _FIT | {"drift": 1.0, "steps": 200, "logit_steps": 0, "learning_rate": 1e-4, "weight_decay": 0.01}
    },
    "mpifa": one_shot("svd-llm", storage="pivoted") | {"refinement": _FIT | {"drift": 0.25, "steps": 0}},
    "lpaf": one_shot("lpaf"),
    "joint": one_shot("svd", storage="shared"),
    "chop": {"method": {"name": "chop"}},
}


@dataclass(frozen=True)
class System:
    """A name that ``--method`` takes for a whole recipe.

    Attributes:
        kind: which part of a run is its own: ``factorization``, ``allocation`` or ``transform``.
        paper: where it is from, such as ``arXiv 2405.10616``.
        summary: one line for ``bolaco methods``.
        presets: recipes that are this system; the first is what the name alone means.
        because: why other values contradict it, for whoever asks for one.
        fixed: fields of the recipe that can only have the values that they have in these presets.
    """

    kind: str
    paper: str
    summary: str
    presets: tuple[str, ...]
    because: str
    fixed: tuple[str, ...] = ()


SYSTEMS: dict[str, System] = {
    "bolaco": System(
        kind="allocation",
        paper="arXiv 2405.10616",
        summary="afm factors, ranks by Bayesian search of a keep ratio for each matrix type (--search 5x1 or 5x4)",
        presets=("bolaco-5x1", "bolaco-5x4", "paper"),
        fixed=("search.name",),
        because="its ranks come from a search",
    ),
    "welore": System(
        kind="allocation",
        paper="arXiv 2407.11239",
        summary="svd factors, ranks by one threshold on all normalised singular values (WeLore)",
        presets=("welore",),
        fixed=("search.name",),
        because="it is a rule for ranks itself",
    ),
    "joint": System(
        kind="factorization",
        paper="arXiv 2402.16319",
        summary="svd of q over k and of gate over up, one input factor for both; reads no text",
        presets=("joint",),
        fixed=("storage",),
        because="its matrices share a factor",
    ),
    "lpaf": System(
        kind="factorization",
        paper="arXiv 2306.14152",
        summary="gradual first-order pruning, then SVD of the sparse weights by their importance (LPAF)",
        presets=("lpaf",),
        fixed=("search.name",),
        because="its matrices all keep one ratio",
    ),
    "chop": System(
        kind="transform",
        paper="arXiv 2305.14864",
        summary="whole decoder blocks are removed, the first and the last stay; a stock checkpoint (Just CHOP)",
        presets=("chop",),
        because="it removes blocks and factors nothing",
    ),
}
