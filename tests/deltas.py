"""Tiny pairs of a base and what could have been fine-tuned from it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.models import english, save_tiny, tiny_llama


def fine_tuned(base: PreTrainedModel, seed: int = 1, size: float = 0.05, norms: bool = False) -> PreTrainedModel:
    """A copy with a change of falling singular values on each matrix of its blocks, embeddings as they were.

    ``norms``: vectors change too.
    """
    tuned = copy.deepcopy(base)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.ndim == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                noise = torch.randn(parameter.shape, generator=draw)
                left, values, right = torch.linalg.svd(noise, full_matrices=False)
                falling = values * torch.linspace(1, 0, len(values)) ** 3
                parameter.add_(size * (left * falling) @ right)
            elif parameter.ndim == 1 and norms:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return tuned


def save_pair(folder: Path, base: PreTrainedModel | None = None, tokenizer: Any = None, **change: Any) -> Path:
    """``base`` and ``tuned`` in a folder, with ``text.txt``; returns it."""
    model = base if base is not None else tiny_llama()
    save_tiny(folder / "base", model, tokenizer)
    save_tiny(folder / "tuned", fine_tuned(model, **change), tokenizer)
    (folder / "text.txt").write_text(english(1500, 3), encoding="utf-8")
    return folder


# Of a run on such a pair: the other settings are the defaults.
SMALL = {
    "calibration.sequences": 8,
    "calibration.gradient_sequences": 4,
    "evaluation.windows": 4,
}


def delta_words(out: str, *more: str, ratio: str = "1/4", method: str = "default", **changes: Any) -> list[str]:
    """The words of a small ``bolaco delta``; ``options_rounds=1`` adds ``--set options.rounds=1``."""
    words = ["delta", "base", "tuned", "-o", out, "--ratio", ratio, "--method", method]
    words += ["--calibration", "text.txt", "--seq-len", "32"]
    for name, value in (SMALL | {name.replace("_", ".", 1): value for name, value in changes.items()}).items():
        words += ["--set", f"{name}={value}"]
    return [*words, *more]
