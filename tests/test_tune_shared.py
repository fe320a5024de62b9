"""Tuning models whose matrices share a factor, and models with fewer blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bolaco.layers import FollowerLinear, LeadLinear
from bolaco.models.load import load_model
from bolaco.tune.mode import MODES
from tests.models import FAMILIES, compressed_once, save_tiny, slow
from tests.test_tune import logits, prepared, tune

JOINT = {"preset": "joint", "search": None, "keep": 0.75}
# Modes that leave the factors themselves as they are, or code them.
BESIDE = ("sketch", "tt-lora")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "phi3") for name in MODES.built_in if name not in BESIDE),
        ("factors", "llama"),
        *(slow(name, "llama") for name in MODES.built_in if name not in (*BESIDE, "factors")),
    ],
)
def test_both_matrices_and_their_factor_are_tuned_and_stay_together(name: str, family: str, tmp_path: Path) -> None:
    source = compressed_once(family, **JOINT)
    model = load_model(str(source.path))
    before = logits(model)
    original = {"original": str(save_tiny(tmp_path / "original", FAMILIES[family]()))} if name == "mixed-rank" else {}
    made = prepared(MODES.get(name), model, source, **original)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(logits(made.finish()), before, rtol=1e-4, atol=1e-4)

    options = {f"options.{key}": value for key, value in original.items()}
    record = tune(source.path, tmp_path / "out", name, options).info
    assert record.ranks == source.info.ranks
    assert record.tuning.frozen_sha256["before"] == record.tuning.frozen_sha256["after"]
    old, new = load_model(str(source.path)), load_model(str(tmp_path / "out"))
    assert sum(p.numel() for p in new.parameters()) == sum(p.numel() for p in old.parameters())
    pairs = [
        (left, right)
        for left, right in zip(old.modules(), new.modules(), strict=True)
        if isinstance(left, FollowerLinear)
    ]
    assert pairs
    for left, right in pairs:
        assert isinstance(right, FollowerLinear)
        assert not torch.equal(left.dense(), right.dense())
        assert torch.equal(left.lead.reduce.weight, right.lead.reduce.weight) == (name == "diagonal")
    # What was measured at the end is what was trained: the same numbers as before the model was written.
    assert record.tuning.perplexity.after != record.tuning.perplexity.before


@pytest.mark.parametrize(
    ("name", "family"),
    [("sketch", "phi3"), ("tt-lora", "llama"), slow("sketch", "llama"), slow("tt-lora", "phi3")],
)
def test_codes_and_adapters_go_with_shared_factors_too(name: str, family: str, tmp_path: Path) -> None:
    source = compressed_once(family, **JOINT)
    record = tune(source.path, tmp_path / "out", name).info.tuning
    assert record.frozen_sha256["before"] == record.frozen_sha256["after"]
    model = load_model(str(tmp_path / "out"))
    followers = [module for module in model.modules() if isinstance(module, FollowerLinear)]
    assert followers
    assert all(isinstance(module.lead, LeadLinear) for module in followers)
    # As the run measured it, the shared product is computed by whichever layer now stands for it.
    before = logits(model)
    for module in followers:
        module.lead._kept = None
    assert torch.equal(logits(model), before)


def test_a_chopped_model_is_trained_on(tmp_path: Path) -> None:
    """As the paper of the removal does: the result is a stock model still, and inspect and card know both."""
    source = compressed_once("llama", layers=6, preset="chop", search=None)
    result = tune(source.path, tmp_path / "out", "continued", max_steps=6)
    assert result.info.layers == source.info.layers
    assert result.info.tuning.perplexity.after < result.info.tuning.perplexity.before
    card = (tmp_path / "out" / "README.md").read_text()
    assert "4 of 6 decoder blocks stay" in card
    assert "bolaco tune --mode continued" in card
    assert "trust_remote_code" not in card
