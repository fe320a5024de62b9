"""What benchmarks/fuzz.py mutates: tiny models, results of them, a comparison, a recipe, and texts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bolaco import api
from bolaco.models.load import load_model
from bolaco.recipe.recipe import make_recipe

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
WORDS = (
    "the",
    "river",
    "a",
    "house",
    "finds",
    "some",
    "garden",
    "child",
    "every",
    "teacher",
    "near",
    "engine",
    "of",
    "road",
)
POSITIONS = 64
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "phi3": _SIZES | {"original_max_position_embeddings": POSITIONS},
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS},
    "mixtral": _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
_SMALL = {
    "calibration.sequences": 4,
    "calibration.gradient_sequences": 2,
    "evaluation.windows": 2,
    "refinement.steps": 1,
    "refinement.sequences": 2,
    "search.rank_multiple": 4,
}
_SEARCH = {
    "calibration.sequences": 4,
    "evaluation.windows": 2,
    "search.rank_multiple": 4,
    "search.trials": 2,
    "search.initial": 2,
    "validation.candidates": 4,
    "validation.sequences": 2,
    "validation.allocations": 2,
}


@dataclass(frozen=True)
class Inputs:
    """The folder of everything that is read: ``models/NAME``, ``results/NAME``, and files beside them."""

    folder: Path

    @property
    def models(self) -> list[Path]:
        return sorted((self.folder / "models").iterdir())

    @property
    def results(self) -> list[Path]:
        return sorted((self.folder / "results").iterdir())

    @property
    def tuned(self) -> list[Path]:
        """Of models that were tuned: adapters beside one that was compressed, and one that was not compressed."""
        return sorted((self.folder / "tuned").glob("*"))

    @property
    def deltas(self) -> list[Path]:
        """Of a model over another, one of each form."""
        return sorted((self.folder / "deltas").iterdir())

    @property
    def text(self) -> str:
        return str(self.folder / "text.txt")


def make_inputs(folder: Path, models: Sequence[str] = tuple(MODELS), more: bool = True) -> Inputs:
    """Makes the inputs; ``more`` is results of every storage and tuned ones, beside that of the default recipe."""
    inputs = Inputs(folder)
    tokenizer = _tokenizer()
    for name in models:
        _write_model(folder / "models" / name, name, tokenizer)
    draw = random.Random(0)
    text = "\n".join(" ".join(draw.choices(WORDS, k=40)) for _ in range(60))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    texts = {"calibration": inputs.text, "seq_len": 16}
    llama = str(folder / "models" / "llama")
    results = folder / "results"
    api.compress(llama, 0.7, results / "default", **texts, options=_SMALL)
    if more:
        for preset, model in (("joint", "llama"), ("svd-llm", "phi3"), ("svd-llm", "mixtral")):
            options = {name: value for name, value in _SMALL.items() if not name.startswith("refinement")}
            options.pop("calibration.gradient_sequences")
            out = results / f"{preset}-{model}"
            api.compress(str(folder / "models" / model), 0.7, out, preset=preset, **texts, options=options)
        api.compress(llama, 0.7, results / "search", preset="bolaco-5x1", **texts, options=_SEARCH)
        common = {"data": inputs.text, "seq_len": 16, "max_steps": 2, "batch": 2}
        fields = {"evaluation.windows": 2}
        default = str(results / "default")
        api.tune(default, "factors", out=results / "tuned", options=fields, **common)
        sketched = fields | {"options.sequences": 2}
        api.tune(default, "sketch", out=results / "sketch", options=sketched, **common)
        for mode, model in (("tt-lora", default), ("lora", default), ("continued", llama)):
            api.tune(model, mode, out=folder / "tuned" / mode, options=fields, **common)
    _write_model(folder / "other", "llama", tokenizer, seed=1)
    for method in ("lowrank", "ultradelta"):
        api.delta(llama, str(folder / "other"), folder / "deltas" / method, method=method, ratio="1/2")
    few = {"options.steps": 0, "calibration.sequences": 4, "evaluation.windows": 2}
    words = {"method": "bitdelta", "ratio": "1/8", "options": few}
    api.delta(llama, str(folder / "other"), folder / "deltas" / "bitdelta", **texts, **words)
    for result in inputs.results:
        _shard(result)
    compared = {name: value for name, value in _SMALL.items() if not name.startswith("refinement")}
    api.compare(llama, ["kfac-svd", "asvd"], [0.8, 0.6], folder / "compared", **texts, options=compared)
    recipe = make_recipe({"model": llama, "keep": 0.7, "calibration": {"source": inputs.text, "seq_len": 16}})
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    _write_rows(folder)
    return inputs


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL[0]))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=POSITIONS, **names)


def _write_model(folder: Path, kind: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> None:
    ids = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(MODELS[kind] | ids)), dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)


def _shard(result: Path) -> None:
    """Writes the weights of a result again, in several files with an index."""
    model = load_model(str(result), adapters="leave")
    for file in result.glob("model*.safetensors"):
        file.unlink()
    model.save_pretrained(result, max_shard_size="8KB")


def _write_rows(folder: Path) -> None:
    said = [" ".join(WORDS[i : i + 4]) for i in range(12)]
    rows: list[dict[str, Any]] = [{"prompt": a, "response": b} for a, b in zip(said[:4], said[4:8], strict=True)]
    rows += [{"instruction": a, "input": b, "output": a} for a, b in zip(said[:4], said[8:], strict=True)]
    turns = [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
    rows += [{"messages": turns}] * 4
    questions = [{"query": a, "choices": [b, a], "gold": 0} for a, b in zip(said[:4], said[4:8], strict=True)]
    texts = [{"text": " ".join(said), "meta": i} for i in range(4)]
    for name, found in (("instructions", rows), ("questions", questions), ("texts", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
