"""Deltas end to end on tiny pairs: what is written, what it gives back, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import bolaco
from bolaco.delta.folder import read_delta
from bolaco.delta.method import DELTA_METHODS
from bolaco.delta.pair import base_digest
from bolaco.delta.record import read_record
from bolaco.errors import CheckpointError, UnsupportedModelError
from bolaco.models.load import load_model
from bolaco.models.structure import weight_of
from tests.command import bolaco as call
from tests.command import compress, digest, ok
from tests.deltas import delta_words, fine_tuned, save_pair
from tests.models import FAMILIES, english, mostly_slow, save_tiny, tiny_llama, tiny_tokenizer, token_blocks
from tests.types import of_type

# Ratios at which each fits a matrix of 32 x 32, and settings that take a moment.
RATIOS = {"default": "1/4", "delta-come": "1/2", "lowrank": "1/4", "ultradelta": "1/4", "bitdelta": "1/8"}
OPTIONS: dict[str, dict[str, Any]] = {"bitdelta": {"options_steps": 2, "options_length": 32}}


def made(method: str, out: str = "", *more: str, **changes: Any) -> str:
    """A delta of the pair in the current folder."""
    place = out or method
    ok(*delta_words(place, *more, method=method, ratio=RATIOS[method], **(OPTIONS.get(method, {}) | changes)))
    return place


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair with a delta by every method; leave it as it is."""
    folder = save_pair(tmp_path_factory.mktemp("pair"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for method in RATIOS:
            made(method)
    return folder


@pytest.fixture
def here(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own as the current one, with what the pair's folder has by links."""
    for place in pair.iterdir():
        (tmp_path / place.name).symlink_to(place)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logits(model: PreTrainedModel, tokens: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=token_blocks(2, 16) if tokens is None else tokens).logits
    return found


def test_every_method_has_a_row() -> None:
    assert set(RATIOS) == set(DELTA_METHODS.built_in)
    listed = ok("methods").out
    assert all(method in listed for method in RATIOS)
    assert "options.act_order" in ok("methods", "delta-come").out


@pytest.mark.parametrize("method", RATIOS)
def test_what_is_written(method: str, here: Path) -> None:
    delta = read_delta(method)
    info = delta.info
    # Counted bits are those of the file, to the last one, and within the budget.
    with safe_open(f"{method}/delta.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - not a dict
    stored = sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)
    assert stored == info.bits.total == info.bits.matrices
    assert 0 < info.bits.matrices <= info.bits.budget
    assert info.bits.matrices > 0.5 * info.bits.budget or method == "bitdelta"
    assert len(info.matrices) == 14
    assert {record.form for record in info.matrices.values()} <= {"low-rank", "signs", "sparse"}
    # The base with it is the base plus the forms, to the rounding of float32.
    base, tuned, result = load_model("base"), load_model("tuned"), load_model(method)
    for name, form in delta.forms.items():
        before, after, wanted = (weight_of(m.get_submodule(name)).detach() for m in (base, result, tuned))
        assert torch.allclose(after, before + form.dense(), atol=1e-6)
        gone = float((wanted - after).square().sum() / (wanted - before).square().sum())
        assert gone == pytest.approx(info.matrices[name].error, rel=1e-3)
    if info.quality is not None:
        assert 0 < info.quality.divergence < 2 * info.quality.divergence_base
    card = (here / method / "README.md").read_text()
    assert info.base_sha256[:12] in card
    page = (here / method / "report.html").read_text()
    assert "<script" not in page
    assert "layer 1 down" in page
    shown = ok("inspect", method).out
    assert "scales counted" in shown
    assert json.loads(ok("inspect", method, "--json").out)["method"] == method


def test_the_default_is_nearer_than_the_others(here: Path) -> None:
    """On a delta with falling singular values, in each number of bits; nearer in divergence too than 16-bit factors."""
    errors = {}
    for method in ("default", "lowrank", "ultradelta"):
        info = read_delta(method).info
        errors[method] = sum(record.error for record in info.matrices.values()) / len(info.matrices)
    assert errors["default"] < 0.7 * errors["lowrank"]
    assert errors["default"] < errors["ultradelta"]
    made("default", "as-much", options_inputs=1, options_outputs=1)
    found = read_delta("delta-come").info
    ok(*delta_words("same", ratio=f"{found.bits.matrices}/{found.bits.dense}", options_inputs=1, options_outputs=1))
    mine = read_delta("same").info
    assert mine.bits.matrices <= found.bits.matrices
    assert sum(r.error for r in mine.matrices.values()) < sum(r.error for r in found.matrices.values())


def test_a_delta_can_be_measured_and_completed(here: Path) -> None:
    shown = ok("eval", "default", "--data", "text.txt", "--seq-len", "32", "--limit", "4").out
    assert "perplexity" in shown
    assert torch.equal(logits(bolaco.load("default")), logits(load_model("default")))
    assert load_model("default", dtype="bfloat16").dtype == torch.bfloat16
    result = bolaco.delta("base", "tuned", "again", ratio="1/2", method="lowrank")
    assert result.info.quality is None  # no text was given
    assert torch.equal(logits(result.load()), logits(load_model("again")))


def test_applied_it_is_a_stock_model(here: Path) -> None:
    ok("delta", "apply", "default", "-o", "merged")
    stock = AutoModelForCausalLM.from_pretrained("merged")
    assert type(stock) is type(load_model("tuned"))
    assert torch.equal(logits(stock.eval()), logits(load_model("default")))
    assert call("delta", "apply", "default", "-o", "merged").code == 1


def test_exported_it_is_an_adapter(here: Path) -> None:
    peft = pytest.importorskip("peft")
    shown = ok("delta", "export", "default", "--peft", "-o", "adapter").out
    rank = max(record.rank or 0 for record in read_delta("default").info.matrices.values())
    assert f"to {rank}," in shown
    adapted = peft.PeftModel.from_pretrained(load_model("base"), "adapter").eval()
    assert torch.allclose(logits(adapted), logits(load_model("default")), atol=2e-4)
    assert not torch.allclose(logits(adapted), logits(load_model("base")), atol=2e-2)
    for method in ("bitdelta", "ultradelta"):
        done = call("delta", "export", method, "--peft", "-o", "other")
        assert "no products of thin ones; take `bolaco delta apply`" in done.err
    ok(*delta_words("zero", method="lowrank")[:2], "base", *delta_words("zero", method="lowrank")[3:])
    assert "the delta is zero" in call("delta", "export", "zero", "--peft", "-o", "other").err
    assert "--peft is the one format" in call("delta", "export", "default", "-o", "other").err


def test_a_zero_delta_is_an_empty_file(here: Path) -> None:
    save_tiny(here / "same-base")
    for method in ("default", "lowrank", "ultradelta", "bitdelta", "delta-come"):
        words = delta_words(f"zero-{method}", method=method, ratio="1/4", **OPTIONS.get(method, {}))
        words[2] = "base"
        ok(*words)
        assert load_file(f"zero-{method}/delta.safetensors") == {}
        assert read_delta(f"zero-{method}").info.bits.total == 0
        assert torch.equal(logits(load_model(f"zero-{method}")), logits(load_model("base")))


@pytest.mark.parametrize(
    "family",
    mostly_slow((family for family in FAMILIES if family != "llama"), "gpt2", "phi3"),
)
def test_every_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed weights, fused projections, biases; and norms that changed are stored as they are, and counted."""
    monkeypatch.chdir(save_pair(tmp_path, FAMILIES[family](), norms=True))
    made("default", options_rounds=1)
    delta = read_delta("default")
    base, tuned, result = load_model("base"), load_model("tuned"), load_model("default")
    assert delta.info.bits.others == 32 * sum(t.numel() for t in delta.rest.values()) > 0
    assert delta.info.bits.embeddings == 0
    assert delta.info.bits.total == delta.info.bits.matrices + delta.info.bits.others
    covered = 0
    for (name, before), after, wanted in zip(base.named_parameters(), result.parameters(), tuned.parameters()):
        if name in delta.rest:
            assert torch.equal(after, wanted)
        elif not torch.equal(before, wanted):
            covered += before.numel()
            assert (after - wanted).square().sum() < (before - wanted).square().sum()
        else:
            assert torch.equal(after, before)
    assert covered == delta.info.bits.dense // 16


def test_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix of every expert is a matrix, though the model stores them as one tensor."""
    base = of_type("mixtral")
    folder = tmp_path
    save_tiny(folder / "base", base)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "embed" not in name and "lm_head" not in name:
                parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_tiny(folder / "tuned", tuned)
    (folder / "text.txt").write_text(english(1500, 3), encoding="utf-8")
    monkeypatch.chdir(folder)
    for method in ("lowrank", "default"):
        ok(
            *delta_words(method, method=method, ratio="1/2", options_rounds=1)
            if method == "default"
            else delta_words(method, method=method, ratio="1/2")
        )
        delta, result = read_delta(method), load_model(method)
        assert len(delta.forms) > 2 * 3 * 2
        before, after, wanted = base.state_dict(), result.state_dict(), tuned.state_dict()
        for name, tensor in wanted.items():
            if name in delta.rest:
                assert torch.equal(after[name], tensor)
            else:
                gone, all_of_it = (after[name] - tensor).square().sum(), (before[name] - tensor).square().sum()
                assert gone <= 0.9 * all_of_it
    assert call("delta", "export", "lowrank", "--peft", "-o", "adapter").code == 1
    with pytest.raises(UnsupportedModelError, match="use `bolaco delta apply` for each delta"):
        bolaco.DeltaModel("base", {"a": "lowrank"})


def test_embeddings_that_differ_are_stored_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    folder = save_pair(tmp_path, base)
    monkeypatch.chdir(folder)
    tuned = fine_tuned(base)
    with torch.no_grad():
        tuned.model.embed_tokens.weight[5] += 0.5
    tuned.save_pretrained(folder / "tuned")
    shown = ok(*delta_words("out", method="lowrank")).out
    info = read_delta("out").info
    assert info.rest == ["model.embed_tokens.weight"]
    assert info.bits.embeddings == 32 * base.model.embed_tokens.weight.numel()
    assert "embeddings and head differ and are stored as they are" in shown
    assert torch.equal(load_model("out").lm_head.weight, tuned.lm_head.weight)
    done = call("delta", "export", "out", "--peft", "-o", "adapter")
    assert "1 tensors are stored as they are (model.embed_tokens.weight)" in done.err


def other_vocabulary(here: Path) -> list[str]:
    model = tiny_llama()
    model.resize_token_embeddings(100)
    save_tiny(here / "resized", model)
    return ["base", "resized"]


def other_tokenizer(here: Path) -> list[str]:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    save_tiny(here / "words", fine_tuned(tiny_llama()), tokenizer)
    return ["base", "words"]


def other_family(here: Path) -> list[str]:
    save_tiny(here / "other", FAMILIES["qwen3"]())
    return ["base", "other"]


def other_size(here: Path) -> list[str]:
    save_tiny(here / "wide", tiny_llama(intermediate_size=64))
    return ["base", "wide"]


# What is given -> words, and what the one line says.
REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "resized embeddings": (other_vocabulary, r"resized: its embeddings were resized to 100 tokens, base has 96;"),
    "another tokenizer": (other_tokenizer, r"words: another tokenizer than that of base \(\d+ and \d+ tokens, 'zebra'"),
    "another family": (other_family, r"other: a qwen3 model, but base is of type llama; name its own base"),
    "another size": (other_size, r"mlp.gate_proj.weight: 64 x 32 in wide, 48 x 32 in base; a delta needs"),
    "a delta of a delta": (lambda here: ["base", "default"], r"default: a delta for \S*base, not a model; make it one"),
    "a delta over a delta": (lambda here: ["default", "tuned"], r"default: a delta for \S*base, not a model;"),
    "nothing": (lambda here: ["base", "./nothing"], r"nothing: no such folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_delta_is_refused_in_one_line(case: str, here: Path) -> None:
    make, message = REFUSED[case]
    words = delta_words("out", method="lowrank")
    words[1:3] = make(here)
    done = call(*words)
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if "error" in line]
    assert re.search(message, line), line
    assert not Path("out").exists()
    assert not Path("out.work").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--method", "bitdelta", "--ratio", "1/32"],
            r"bitdelta: takes a bit for each number .* give --ratio 0\.06\d+",
        ),
        (
            ["--method", "lowrank", "--ratio", "1/100"],
            r"\d+ bits are too few, 1,024 are needed for 32 x 32; raise --ratio",
        ),
        (["--method", "ultradelta", "--ratio", "1/9999"], r"ultradelta: \d+ bits are too few"),
        (["--ratio", "1/9999"], r"default: \d+ bits are too few for one direction"),
        (["--ratio", "2"], r"ratio: 2: a ratio is above 0 and at most 1, such as 1/16"),
        (["--ratio", "small"], r"ratio: 'small' is no ratio; expected a number such as 1/16"),
        (["--method", "delta-comes"], r"unknown method of delta 'delta-comes'; did you mean 'delta-come'"),
        (["--set", "options.groups=3"], r"options.groups: there is no such field"),
        (["--peft"], r"--peft is about a delta that is there"),
    ],
)
def test_what_cannot_be_asked_for(more: list[str], message: str, here: Path) -> None:
    done = call(*delta_words("out", *more, **OPTIONS["bitdelta"] if "bitdelta" in more else {}))
    assert done.code == 1
    assert re.search(message, done.err), done.err
    assert not Path("out").exists()


def test_another_base_is_refused_by_its_weights(here: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    save_tiny(here / "other-base", model)
    record = json.loads((here / "default" / "bolaco.json").read_text())
    (here / "moved").mkdir()
    (here / "moved" / "delta.safetensors").symlink_to((here / "default" / "delta.safetensors").resolve())
    (here / "moved" / "bolaco.json").write_text(json.dumps(record | {"base": str(here / "other-base")}))
    with pytest.raises(CheckpointError, match="take the base it was made from") as found:
        load_model("moved")
    assert record["base_sha256"][:12] in str(found.value)
    (here / "moved" / "bolaco.json").write_text(json.dumps(record | {"base": "./gone"}))
    with pytest.raises(UnsupportedModelError, match=r'"base" in bolaco.json says where it is'):
        load_model("moved")
    # The number format that a base is in does not matter, its weights do.
    assert base_digest(load_model("base")) == record["base_sha256"] == base_digest(load_model("base").double().float())
    assert base_digest(load_model("base", dtype="bfloat16")) != record["base_sha256"]


def test_damage_is_found(here: Path) -> None:
    record = json.loads((here / "default" / "bolaco.json").read_text())
    tensors = load_file(here / "default" / "delta.safetensors")
    (here / "bad").mkdir()

    def written(change: dict[str, Tensor | None], info: dict[str, Any] | None = None) -> str:
        kept = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(kept, here / "bad" / "delta.safetensors")
        (here / "bad" / "bolaco.json").write_text(json.dumps(record | (info or {})))
        with pytest.raises(CheckpointError) as found:
            read_delta("bad")
        return str(found.value)

    name = next(iter(tensors))
    assert name.partition("/")[0] in written({name: None})
    assert "belongs to no matrix" in written({"more/codes": torch.zeros(1)})
    assert "other tensors are stored" in written({"rest/more": torch.zeros(1)})
    assert "base_sha256" in written({}, {"base_sha256": "abc"})
    assert "not of a delta" in written({}, {"kind": "something"})
    (here / "bad" / "bolaco.json").write_text(json.dumps(record))
    (here / "bad" / "delta.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        read_delta("bad")
    assert "not a folder that `bolaco delta` wrote" in call("delta", "apply", "tuned", "-o", "out").err


def test_a_delta_is_no_model_to_compress(here: Path) -> None:
    (here / "other.txt").write_text(english(400, 2), encoding="utf-8")
    done = call(*compress("small", model="default"))
    assert done.code == 1
    assert "make it one with `bolaco delta apply` first" in done.err


def test_another_chat_template_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_pair(tmp_path)
    monkeypatch.chdir(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained("tuned")
    ok(*delta_words("out", method="lowrank"))
    from bolaco.models.load import load_tokenizer

    assert load_tokenizer("out").chat_template == tokenizer.chat_template
    ok("delta", "apply", "out", "-o", "merged")
    assert load_tokenizer("merged").chat_template == tokenizer.chat_template


def test_a_second_run_is_the_same_to_the_byte(here: Path) -> None:
    for method in ("default", "bitdelta", "ultradelta"):
        made(method, f"{method}-again")
        assert digest(f"{method}-again/delta.safetensors") == digest(f"{method}/delta.safetensors")


def test_json_and_nothing_else(here: Path) -> None:
    shown = json.loads(ok(*delta_words("out", "--json", method="lowrank", ratio="1/2")).out)
    assert shown["path"] == "out"
    assert shown["bits"]["matrices"] <= shown["bits"]["budget"]


def _first(record: dict[str, Any]) -> Any:
    return next(iter(record["matrices"].values()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record["matrices"].update(once=_first(record)), "'once' names no matrix"),
        (lambda record: _first(record)["energy"].pop(), "points of their energy"),
    ],
)
def test_a_record_that_cannot_be_shown_is_refused(
    change: Callable[[dict[str, Any]], object], said: str, tmp_path: Path, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pair)
    out = tmp_path / "out"
    ok(*delta_words(str(out), method="lowrank"))
    record = json.loads((out / "bolaco.json").read_text())
    change(record)
    (out / "bolaco.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=said):
        read_record(out)
