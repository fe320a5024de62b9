"""Greedy decoding with and without the KV cache agrees token for token, for every way a result is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import bolaco  # noqa: F401 - teaches the auto classes
from bolaco.layers import FollowerLinear, LowRankLinear, PivotedLinear, SplitLinear
from tests.models import compressed_once, slow, token_blocks

# Representation -> the words of a run, and the layer that must be in the result (None: a stock model).
RUNS: dict[str, tuple[dict[str, Any], type[nn.Module] | None]] = {
    "two-factor": ({"method": "afm", "storage": "two-factor"}, LowRankLinear),
    "pivoted": (
        {
            "method": "kfac",
            "storage": "pivoted",
            "preset": "default",
            "search": "spectral",
            "options": {"refinement.steps": 2},
        },
        PivotedLinear,
    ),
    "refined": (
        {"method": "afm", "search": "uniform", "options": {"refinement.fit": True, "refinement.steps": 2}},
        LowRankLinear,
    ),
    "shared": ({"preset": "joint", "search": None, "keep": 0.75}, FollowerLinear),
    "pruned": ({"preset": "lpaf", "search": None, "options": {"method.steps": 3}}, LowRankLinear),
    "chopped": ({"preset": "chop", "search": None}, None),
}
# Grouped queries, sliding windows and per-layer kinds, fused projections (qkv, gate_up, Conv1D), learned positions.
FAMILIES = ("llama", "gemma2", "phi3", "gpt2", "opt")
FUSED = ("phi3", "gpt2")
# Every representation in models of one or two families; the others are left to the slow tests.
QUICK = {
    "two-factor": ("phi3", "opt"),
    "pivoted": ("gemma2", "phi3"),
    "refined": ("gpt2",),
    "shared": ("llama", "gpt2"),
    "pruned": ("phi3",),
    "chopped": ("gemma2",),
}


@pytest.mark.parametrize(
    ("representation", "family"),
    [
        *((name, family) for name, families in QUICK.items() for family in families),
        *(slow(name, family) for name in RUNS for family in FAMILIES if family not in QUICK[name]),
    ],
)
def test_the_same_tokens(representation: str, family: str) -> None:
    words, layer = RUNS[representation]
    run = compressed_once(family, **words, layers=6 if representation == "chopped" else None)
    model = AutoModelForCausalLM.from_pretrained(run.path).eval()
    found = {type(module) for module in model.modules()}
    if layer is None:
        assert type(model) is type(run.original)
        assert model.config.num_hidden_layers == 4
    else:
        assert layer in found
        assert (SplitLinear in found) == (family in FUSED)

    # A batch of two lengths, the shorter one padded on the left, decoded past the sliding window of 12.
    ids = token_blocks(2, 16, seed=7)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    cached, recomputed = (model.generate(ids, use_cache=cache, **settings) for cache in (True, False))
    assert cached.shape == (2, 26)
    assert torch.equal(cached, recomputed)


def test_both_sides_of_pivoted_storage() -> None:
    """The families above hold matrices whose rows, and matrices whose columns, were kept."""
    sides = set()
    for family in QUICK["pivoted"]:
        model = AutoModelForCausalLM.from_pretrained(compressed_once(family, **RUNS["pivoted"][0]).path)
        sides |= {module.side for module in model.modules() if isinstance(module, PivotedLinear)}
    assert sides == {"rows", "columns"}
