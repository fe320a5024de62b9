"""One base and several deltas: each row of a batch is answered as its own fine-tune would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco import DeltaModel
from bolaco.delta.folder import Delta, read_delta
from bolaco.errors import CheckpointError, RecipeError
from bolaco.models.load import load_model
from tests.command import ok
from tests.deltas import delta_words, fine_tuned, save_pair
from tests.models import FAMILIES, save_tiny, tiny_llama, token_blocks

NAMES = ("a", "b", "c")


def several(folder: Path, base: PreTrainedModel, methods: tuple[str, ...]) -> Path:
    """A base and deltas a, b, c of three fine-tunes, of which the first changes norms as well."""
    save_pair(folder, base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, (name, method) in enumerate(zip(NAMES, methods, strict=True), 5):
            save_tiny(folder / "tuned", fine_tuned(base, seed, size=0.2, norms=name == "a"))
            ok(*delta_words(name, method=method, ratio="1/2"))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With deltas of three forms; leave it as it is."""
    return several(tmp_path_factory.mktemp("several"), tiny_llama(), ("lowrank", "ultradelta", "delta-come"))


@pytest.fixture(scope="module")
def merged(place: Path) -> dict[str, PreTrainedModel]:
    """What each row is compared with."""
    return {"base": load_model(str(place / "base"))} | {name: load_model(str(place / name)) for name in NAMES}


def served(place: Path, unpacked: int = 1) -> DeltaModel:
    return DeltaModel(str(place / "base"), {name: place / name for name in NAMES}, unpacked=unpacked)


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=tokens).logits
    return found


@pytest.mark.parametrize("unpacked", [0, 1, 4])
def test_a_mixed_batch_is_each_row_alone(place: Path, merged: dict[str, PreTrainedModel], unpacked: int) -> None:
    model = served(place, unpacked)
    rows = ("b", "base", "a", "c", "a", "b")
    tokens = token_blocks(len(rows), 12)
    with torch.inference_mode():
        found = model(tokens, rows).logits
    for i, name in enumerate(rows):
        assert torch.allclose(found[i : i + 1], logits(merged[name], tokens[i : i + 1]), atol=2e-4), name
        assert not torch.allclose(found[i], found[(i + 1) % len(rows)], atol=1e-2)
        with torch.inference_mode():
            assert torch.allclose(model(tokens[i : i + 1], name).logits, found[i : i + 1], atol=2e-4)
    assert torch.equal(logits(model.model, tokens), logits(merged["base"], tokens))  # nothing is left behind


def test_rows_are_generated_with_a_cache(place: Path, merged: dict[str, PreTrainedModel]) -> None:
    model = served(place)
    rows = ("a", "b", "base", "c")
    tokens = token_blocks(len(rows), 6)
    words = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 3, "eos_token_id": None}
    found = model.generate(tokens, rows, **words)
    for i, name in enumerate(rows):
        expected = merged[name].generate(tokens[i : i + 1], **words)
        assert torch.equal(found[i : i + 1], expected), name
        assert torch.equal(model.generate(tokens[i : i + 1], name, **words), expected)
    beams = model.generate(tokens[:2], ("a", "b"), num_beams=2, **words)
    for i, name in enumerate(("a", "b")):
        assert torch.equal(beams[i : i + 1], merged[name].generate(tokens[i : i + 1], num_beams=2, **words))


def test_padded_rows(place: Path, merged: dict[str, PreTrainedModel]) -> None:
    """A short row is padded on the left."""
    model, tokens = served(place), token_blocks(2, 8)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    words = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 3, "eos_token_id": None}
    found = model.generate(tokens, ("a", "c"), attention_mask=mask, **words)
    assert torch.equal(found[1, 3:], merged["c"].generate(tokens[1:, 3:], **words)[0])


def test_memory_is_packed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = served(place)
    packed = sum(read_delta(place / name).info.bits.total // 8 for name in NAMES)
    assert model.bytes["deltas"] == packed
    assert model.bytes["base"] == 4 * sum(p.numel() for p in model.model.parameters())
    assert model.bytes["unpacked"] == 0
    tokens = token_blocks(1, 4)
    calls: list[str] = []
    parts = DeltaModel._parts
    monkeypatch.setattr(DeltaModel, "_parts", lambda self, form: calls.append(form.name) or parts(self, form))
    model(tokens, "a")
    first = model.bytes["unpacked"]
    delta: Delta = read_delta(place / "a")
    assert first == 4 * sum(sum(f.numel() for f in form.factors()) for form in delta.forms.values())
    assert len(calls) == 14
    model(tokens, "a")
    assert len(calls) == 14  # they were kept
    model(tokens, "c")
    assert len(calls) == 28
    model(tokens, "a")
    assert len(calls) == 42  # one delta is kept, and that was c
    model.unpacked = 0
    model.remove("a")
    assert model.names == ["b", "c"]


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma2"])
def test_other_families(family: str, tmp_path: Path) -> None:
    several(tmp_path, FAMILIES[family](), ("lowrank", "lowrank", "lowrank"))
    model, rows, tokens = served(tmp_path), ("a", "base", "b"), token_blocks(3, 10)
    with torch.inference_mode():
        found = model(tokens, rows).logits
    for i, name in enumerate(rows):
        expected = logits(load_model(str(tmp_path / name)), tokens[i : i + 1])
        assert torch.allclose(found[i : i + 1], expected, atol=5e-4), name


def test_tied_embeddings_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a row is that row's embeddings too."""
    base = tiny_llama(tie_word_embeddings=True)
    monkeypatch.chdir(save_pair(tmp_path, base))
    tuned = fine_tuned(base)
    with torch.no_grad():
        tuned.model.embed_tokens.weight.mul_(1.1)
    tuned.save_pretrained(tmp_path / "tuned")
    ok(*delta_words("a", method="lowrank", ratio="1/2"))
    model, tokens = DeltaModel("base", {"a": "a"}), token_blocks(2, 10)
    with torch.inference_mode():
        found = model(tokens, ("base", "a")).logits
    for i, name in enumerate(("base", "a")):
        assert torch.allclose(found[i : i + 1], logits(load_model(name), tokens[i : i + 1]), atol=2e-4)


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    model, tokens = served(place), token_blocks(2, 4)
    with pytest.raises(RecipeError, match="delta 'd': there is none of this name"):
        model(tokens, "d")
    with pytest.raises(RecipeError, match="3 deltas for a batch of 2 rows"):
        model(tokens, ("a", "b", "c"))
    with pytest.raises(RecipeError, match="the name is taken"):
        model.add("a", place / "a")
    with pytest.raises(RecipeError, match="the name is taken"):
        model.add("base", place / "a")
    with pytest.raises(RecipeError, match="unpacked -1"):
        DeltaModel(str(place / "base"), unpacked=-1)
    other = tiny_llama()
    other.model.norm.weight.data[0] += 1
    with pytest.raises(CheckpointError, match="take the base it was made from"):
        DeltaModel(other, {"a": place / "a"})
