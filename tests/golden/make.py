"""Writes `v1`: results and recipes of format 1, for the test that they still load.

It was run once, at commit 3e4de75, the last one that writes format 1, with that commit's source:

    git worktree add --detach BEFORE 3e4de75
    OMP_NUM_THREADS=1 PYTHONPATH=BEFORE/src python tests/golden/make.py

Another source writes another format, so what is there is never written again: `v1` must not exist.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import bolaco
from bolaco.recipe import load_recipe

HERE = Path(__file__).resolve().parent
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
VOCABULARY, POSITIONS = 96, 64
_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    # The first and the last block are never removed.
    "llama-deep": _SIZES | {"num_hidden_layers": 4},
    "phi3": _SIZES | {"original_max_position_embeddings": POSITIONS},
    "gpt2": {"n_embd": 16, "n_inner": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS},
}
_TEXT = ("--calibration", "pydoc", "--seq-len", "32", "--set", "calibration.sequences=8")
_TEXT += ("--set", "calibration.gradient_sequences=4", "--set", "evaluation.windows=4")
_RANKS = ("--set", "search.rank_multiple=1")
_STEPS = ("--set", "refinement.steps=2", "--set", "refinement.sequences=4")
_SEARCH = ("--trials", "3", "--set", "search.initial=1", "--set", "validation.candidates=4")
_SEARCH += ("--set", "validation.sequences=2", "--set", "validation.allocations=2")
# So few steps change little otherwise.
_TUNE = ("--data", "pydoc", "--seq-len", "32", "--max-steps", "3", "--learning-rate", "0.01")
_TUNE += ("--set", "evaluation.windows=4", "--set", "training.warmup=0")


def _compress(model: str, *words: str, keep: float = 0.7) -> tuple[str, ...]:
    return ("compress", f"models/{model}", "--keep", str(keep), *_TEXT, *words)


COMMANDS: dict[str, tuple[str, ...]] = {
    "pivoted": _compress("llama", *_RANKS, *_STEPS),
    "two-factor": _compress("llama", "--preset", "bolaco-5x1", *_RANKS, *_SEARCH),
    "shared": _compress("llama", "--preset", "joint", *_RANKS),
    "phi3-split": _compress("phi3", *_RANKS, *_STEPS, "--set", "search.dense_types=[v, up]"),
    "gpt2": _compress("gpt2", *_RANKS, *_STEPS),
    "chop": _compress("llama-deep", "--preset", "chop", keep=0.5),
    "tuned": ("tune", "pivoted", "--mode", "factors", *_TUNE),
    "sketch": ("tune", "pivoted", "--mode", "sketch", *_TUNE, "--set", "options.sequences=8"),
    "tt-lora": ("tune", "pivoted", "--mode", "tt-lora", *_TUNE),
    "compared": ("compare", "models/llama", "--methods", "default,svd-llm", "--keep", "0.8,0.6", *_TEXT, *_RANKS),
}
COMMANDS["compared"] += ("--set", "default:refinement.steps=2")
RECIPES = {name: ("--preset", name) for name in ("default", "paper", "lpaf", "chop")}
# Pages, pictures and cards are written anew from the rest; a comparison is its results.
UNNEEDED = ("report.html", "README.md")


def write_models(folder: Path) -> None:
    """Tiny random models, with a tokenizer of the most frequent words of pydoc's text."""
    cut, lower = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    counts: Counter[str] = Counter()
    for text in topics.values():
        counts.update(word for word, _ in cut.pre_tokenize_str(lower.normalize_str(text)))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - len(SPECIAL)]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *frequent])}, unk_token=SPECIAL[0]))
    words.normalizer, words.pre_tokenizer = lower, cut
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=POSITIONS, **names)
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    for seed, (name, sizes) in enumerate(MODELS.items()):
        kind = name.partition("-")[0]
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(sizes | ids)), dtype=torch.float32)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                noise = torch.randn(parameter.shape, generator=draw)
                if parameter.ndim == 1:  # biases and norms count too: away from zero and one
                    parameter.add_(0.3 * noise)
                else:
                    parameter.copy_(noise / 4)  # unit gain at hidden size 16
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_logits(folder: Path) -> None:
    """What this source computes, after loading the folder as its users do."""
    tokens = torch.randint(len(SPECIAL), VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    model = bolaco.load(str(folder))
    with torch.no_grad():
        logits = model(tokens).logits
    save_file({"tokens": tokens, "logits": logits.float().contiguous()}, folder / "logits.safetensors")


def main() -> None:
    out = HERE / "v1"
    if out.exists():
        raise SystemExit(f"{out}: exists already")
    cli = [sys.executable, "-m", "bolaco.cli"]
    with tempfile.TemporaryDirectory(prefix="bolaco-golden-") as scratch:
        made = Path(scratch)
        write_models(made / "models")
        for name, words in COMMANDS.items():
            # Relative names: results say what they were made of, and that must not be a path of this machine.
            subprocess.run([*cli, *words, "-o", name], cwd=made, check=True)
        (made / "v1").mkdir()
        for name, words in COMMANDS.items():
            target = made / "v1" / name
            if words[0] == "compare":
                target.mkdir()
                shutil.copy(made / name / "results.json", target)
            else:
                shutil.copytree(made / name, target, ignore=shutil.ignore_patterns(*UNNEEDED))
                write_logits(target)
        for name, words in RECIPES.items():
            path = made / "v1" / f"recipe-{name}.yaml"
            command = [*cli, "compress", "smollm2-135m", "--keep", "0.8", *words, "--print-recipe"]
            path.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            load_recipe(path)
        shutil.copytree(made / "v1", out)


if __name__ == "__main__":
    main()
