"""Tuning: what holds for every mode, and the run around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bolaco import api
from bolaco.layers import LowRankLinear, PivotedLinear
from bolaco.models.load import load_model
from bolaco.pipeline import Result
from bolaco.tune.mode import Context, Mode, matrices_of
from bolaco.tune.registry import MODES, get_mode
from bolaco.tune.settings import make_settings, resolve
from tests.models import FAMILIES, Compressed, compress_tiny, scratch, text_file, token_blocks

SMALL = {"evaluation.windows": 4, "training.autocast": False, "training.warmup": 0}
# Options with which a mode's promises hold on tiny models.
OPTIONS: dict[str, dict[str, Any]] = {}
FAMILY_NAMES = ("llama", "gpt2", "phi3")


def folder_of(family: str, storage: str = "pivoted") -> Compressed:
    """A tiny model compressed once for all tests; leave the folder as it is."""
    out = scratch() / f"tune-{family}-{storage}"
    if out not in _made:
        options = {"factorization.storage": storage}
        _made[out] = compress_tiny(FAMILIES[family](), out, keep=0.7, method="afm", options=options)
    return _made[out]


_made: dict[Path, Compressed] = {}


def tune(model: Path | str, out: Path, mode: str, options: dict[str, Any] | None = None, **words: Any) -> Result:
    """A run of a few steps."""
    given = {"max_steps": 3, "batch": 4, "seq_len": 32, "learning_rate": 1e-3, "data": str(text_file())} | words
    data = given.pop("data")
    changes = SMALL | {f"options.{key}": value for key, value in OPTIONS.get(mode, {}).items()} | (options or {})
    result = api.tune(str(model), mode, data, out, options=changes, **given)
    assert result is not None
    return result


def prepared(mode: Mode, model: Any, info: dict[str, Any] | None = None, **options: Any) -> Any:
    """What the mode makes of a loaded model."""
    options = OPTIONS.get(mode.name, {}) | options
    settings = make_settings("m", {"mode": mode.name, "data": "x"}, {f"options.{k}": v for k, v in options.items()})
    settings, checked = resolve(settings, mode)
    model.requires_grad_(False)
    return mode.prepare(
        Context(model, settings, checked, info or {}, lambda n: [b[None] for b in token_blocks(n, 32)], lambda: model)
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_blocks(2, 24, seed=8), use_cache=False).logits


def ranks(model: Any) -> dict[str, int]:
    return {
        matrix.name: module.rank
        for matrix in matrices_of(model)
        if isinstance(module := matrix.of(model), LowRankLinear | PivotedLinear)
    }


# --- every mode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("name", MODES)
def test_nothing_is_changed_before_the_first_step(name: str, family: str) -> None:
    mode, run = get_mode(name), folder_of(family)
    model = load_model(str(run.path))
    before = logits(model)
    made = prepared(mode, model, run.info)
    if mode.exact_start:
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        finished = made.finish()
    if mode.exact_start:
        torch.testing.assert_close(logits(finished), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("name", MODES)
def test_result_of_every_mode(name: str, family: str, tmp_path: Path) -> None:
    mode, run = get_mode(name), folder_of(family)
    result = tune(run.path, tmp_path / "out", name)
    record = result.info["tuning"]
    assert record["mode"] == name
    assert record["steps"] == 3
    assert len(record["curve"]) == 3
    assert record["trainable_parameters"] > 0
    assert record["frozen_sha256"]["before"] == record["frozen_sha256"]["after"]
    assert record["perplexity"]["after"] != record["perplexity"]["before"]
    assert result.info["ranks"] == run.info["ranks"]
    assert result.info["recipe"] == run.info["recipe"]
    assert json.loads((tmp_path / "out" / "bolaco.json").read_text()) == result.info
    assert not (tmp_path / "out.work").exists()
    assert not [file for file in (tmp_path / "out").rglob("*") if file.suffix in (".pt", ".bin", ".pkl", ".pth")]
    old, new = load_model(str(run.path)), load_model(str(result.path))
    if mode.same_ranks:
        assert ranks(new) == ranks(old)
        assert sum(p.numel() for p in new.parameters()) == sum(p.numel() for p in old.parameters())
    again = AutoModelForCausalLM.from_pretrained(result.path, trust_remote_code=True)
    torch.testing.assert_close(logits(again), logits(new))
