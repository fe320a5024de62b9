"""The most used types of models, end to end; all of them in benchmarks/families.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bolaco.models.load import load_model
from tests.models import compress_tiny, slow
from tests.types import BENCHMARKS, of_type, tiny, tokens_for

# Mixtures of experts, hybrid attention, state spaces, latent attention, per-layer embeddings, parallel blocks.
USED = (
    "qwen3_moe",
    "qwen3_5_text",
    "gpt_oss",
    "mixtral",
    "deepseek_v3",
    "gemma3",
    "gemma3n_text",
    "gemma4_text",
    "llama4_text",
    "falcon",
    "gpt_neox",
    "mamba2",
    "jamba",
    "zaya",
)


# What is new in these is in the others too.
LEFT_OUT = ("gemma3n_text", "gpt_neox")


@pytest.mark.parametrize("model_type", [slow(name) if name in LEFT_OUT else name for name in USED])
def test_compressed_loaded_and_generating(model_type, tmp_path: Path):
    model = of_type(model_type)
    tokens = tokens_for(model, 2)
    options = {"refinement.steps": 1, "calibration.gradient_sequences": 4}
    run = compress_tiny(model, tmp_path / "out", preset="default", options=options)
    assert run.info.keep_linears <= 0.7
    assert type(run.original) is type(model)
    loaded, again = load_model(str(run.path)), load_model(str(run.path))
    with torch.no_grad():
        assert torch.equal(
            loaded(input_ids=tokens, use_cache=False).logits, again(input_ids=tokens, use_cache=False).logits
        )
    equal, _ = tiny().generates(loaded, tokens)
    assert equal


@pytest.mark.slow
def test_at_least_160_types_work():
    """docs/families.md is what this prints."""
    command = [sys.executable, str(BENCHMARKS / "families.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (head,) = [line for line in done.stdout.splitlines() if "types work; of" in line]
    words = head.split()
    assert int(words[0]) >= 160, head
    assert int(words[-1].rstrip(".")) >= 44, head
