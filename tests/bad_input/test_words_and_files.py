"""Every wrong input gets one line that names it, and costs nobody anything: no file is lost, none is left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.bad_input.common import one_line, refused
from tests.command import bolaco, compress, info, ok, snapshot
from tests.models import english, save_tiny, tiny_llama
from tests.processes import with_bolaco

# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["0", "-1", "1.5", "nan"])
def test_keep_out_of_range(place: Path, keep: str) -> None:
    refused(compress("out", "--keep", keep), "keep: Input should be", f"(got {float(keep)})")


def test_keep_that_is_no_number(place: Path) -> None:
    done = bolaco(*compress("out", "--keep", "much"))
    assert done.code == 2
    what = "expected numbers with commas between, such as 0.9,0.8, not 'much'"
    assert done.err.splitlines()[-1] == f"bolaco compress: error: argument --keep: {what}"


def test_keep_that_no_allocation_meets(place: Path) -> None:
    refused(compress("out", "--keep", "0.1"), "keep 0.1 allows 1,536 parameters", "raise --keep")


def test_unknown_preset(place: Path) -> None:
    done = bolaco(*compress("out", "--preset", "papr"))
    assert done.code == 2
    assert done.err.endswith("argument --preset: unknown preset 'papr'; did you mean 'paper'?\n")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--method", "afmm"], ["unknown method 'afmm'", "did you mean 'afm'?"]),
        (["--method", "zzz"], ["unknown method 'zzz'", "known are afm, "]),
        (["--search", "5x2"], ["search.name: unknown search '5x2'", "did you mean '5x"]),
        (["--search", "zzz"], ["search.name: unknown search 'zzz'", "known are ", "spectral"]),
        (["--storage", "two-factors"], ["storage: unknown storage 'two-factors'", "did you mean 'two-factor'?"]),
        (["--storage", "zzz"], ["storage: unknown storage 'zzz'", "known are ", "two-factor"]),
        (["--storage", "shared"], ["search.name 5x1 is not possible with shared storage"]),
        (["--search", "uniform", "--trials", "3"], ["search.trials: search 'uniform' has no such option"]),
        (["--set", "method.shrinkage=0.1"], ["method.shrinkage: method 'afm' has no such option"]),
        (["--method", "kfac", "--set", "method.shrinkage=2"], ["method.shrinkage: Input should be", "(got 2)"]),
        (["--set", "chop.pattern=input"], ["chop.pattern: is called method.pattern now"]),
        (["--trials", "0"], ["search.trials", "(got 0)"]),
        (["--seq-len", "1"], ["calibration.seq_len", "(got 1)"]),
        (["--seq-len", "129"], ["calibration", "129 tokens", "128 positions"]),
        (["--set", "evaluation.seq_len=129"], ["evaluation", "129 tokens", "128 positions"]),
        (["--set", "foo=1"], ["foo: there is no such field"]),
        (["--set", "search.foo=1"], ["search.foo: search '5x1' has no such option"]),
        (["--set", "search.kl_wait=1"], ["search.kl_wait: search '5x1' has no such option; did you mean 'kl_weight'?"]),
        (["--set", "search.trials=many"], ["search.trials", "(got 'many')"]),
        (["--set", "search=54"], ["search: Input should be"]),
        (["--set", "search.dense_types=[w]"], ["search.dense_types", "unknown type 'w'"]),
        (["--set", "search.trials=[1"], ["--set search.trials: the value is no plain YAML: while parsing"]),
        (["--set", "nothing"], ["--set nothing: expected FIELD=VALUE"]),
        (["--set", "validation.sequences=7"], ["validation: candidates (6) must be at least sequences (7)"]),
        (["--device", "toaster"], ["device 'toaster' cannot be used here"]),
        (["--device", "meta"], ["device 'meta' cannot be used here"]),
        (["--warm-start", "nowhere"], ["nowhere: no bolaco.json in it"]),
        (["--warm-start", "model"], ["model: no bolaco.json in it"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_options(place: Path, words: list[str], parts: list[str]) -> None:
    refused(compress("out", *words), *parts)


def test_no_out(place: Path) -> None:
    refused(compress("out")[:-2], "-o OUT is missing")


def test_warm_start_of_another_architecture(place: Path, shared: Path) -> None:
    save_tiny(Path("deeper"), tiny_llama(num_hidden_layers=3))
    refused(compress("out", "--warm-start", shared / "out", model="deeper"), "no rank for model.layers.2.")
    ok(*compress("deep", "--search", "hand", model="deeper"))
    refused(compress("out", "--warm-start", "deep"), "this model has no matrix model.layers.2.")


def test_a_corrected_command_is_not_held_to_the_wrong_one(place: Path) -> None:
    """What failed before any stage was finished leaves nothing that the next command would have to agree with."""
    refused(compress("out", "--search", "hand", calibration="textt.txt"), "textt.txt: no such file")
    ok(*compress("out", "--search", "hand"))


def test_killed_while_loading_is_not_held_to_it_either(place: Path) -> None:
    Path("out.work").mkdir()
    Path("out.work/recipe.json").write_text('{"format": 2, "recipe": {"keep": 0.3}}')
    Path("out.work/0123456789ab.seconds.json").write_text('{"load": 1.0}')
    Path("out.work/recipe.json.partial").write_text('{"ke')
    ok(*compress("out", "--search", "hand"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["recipe.yaml: not a readable recipe"]),
        ("{", ["recipe.yaml: not a readable recipe"]),
        ("- model", ["a recipe is a YAML mapping", "found list"]),
        (
            "model: model\nkeep: 0.8\nserach: {}",
            ["serach: there is no such field; did you mean 'search'?"],
        ),
        ("keep: 0.8", ["recipe.yaml: model: Field required"]),
        ("model: model\nkeep: 0.8\nversion: 3", ["recipe.yaml: version"]),
        ("model: model\nkeep: 0.8\npreset: papr", ["unknown preset 'papr'"]),
    ],
)
def test_recipe_files(place: Path, text: str | None, parts: list[str]) -> None:
    if text is not None:
        Path("recipe.yaml").write_text(text)
    refused(["run", "recipe.yaml", "-o", "out"], *parts)


# --- texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("gone.txt", None, ["no such file"]),
        ("./gone", None, ["no such file"]),
        (
            "short.txt",
            b"a river sees the house.",
            ["too short for calibration", "8 x 32 tokens are needed, 6 are left"],
        ),
        ("empty.txt", b"", ["too short for calibration", "0 are left"]),
        ("binary.txt", bytes(range(256)) * 20, ["cannot be read", "utf-8"]),
        ("body.jsonl", b'{"body": "a river"}\n', ["rows have no 'text' string (they have body)"]),
        ("number.jsonl", b'{"text": 1}\n', ["rows have no 'text' string"]),
        ("broken.jsonl", b'{"text": "a riv\n{', ["cannot be read"]),
        ("broken.parquet", b"PAR1", ["cannot be read"]),
        ("notes.docx", b"PK", ["notes.docx: unknown kind of file"]),
        ("text.txt[7:]", None, ["text.txt[7:]: takes what follows document 7, but text.txt has 1 in all"]),
        ("bare", None, ["the folder holds no .txt"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_texts(place: Path, name: str, content: bytes | None, parts: list[str]) -> None:
    Path("bare").mkdir()
    if content is not None:
        Path(name).write_bytes(content)
    refused(compress("out", calibration=name), str(Path(name)), *parts)


def test_each_purpose_of_a_short_text_is_named(place: Path) -> None:
    Path("some.txt").write_text(english(300))
    refused(compress("out", "--validation", "some.txt", validation_candidates=20), "some.txt", "short for validation")
    refused(compress("out", "--eval", "some.txt", evaluation_windows=20), "some.txt", "short for evaluation")


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["./gone", "/gone/model", "a/b/gone", "gone.gguf"])
def test_no_such_model(place: Path, model: str) -> None:
    refused(compress("out", model=model), f"{model}: no such f")


def test_a_folder_without_a_model(place: Path) -> None:
    Path("bare").mkdir()
    refused(compress("out", model="bare"), "bare: the folder holds no config.json and 0 .gguf files")


def test_a_file_that_is_no_gguf(place: Path) -> None:
    Path("bad.gguf").write_text("not a model")
    refused(compress("out", model="bad.gguf"), "bad.gguf: cannot read its configuration", "GGUF")


@pytest.fixture
def copy(place: Path, shared: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(shared / "model", "copy"))


def test_no_tokenizer(copy: Path) -> None:
    for file in copy.glob("*token*"):
        file.unlink()
    refused(compress("out", model="copy"), "copy: no usable tokenizer beside the model", "save one into its folder")


def test_damaged_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    refused(compress("out", model="copy"), "copy: no usable tokenizer beside the model")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:20],
        lambda _: "",
        lambda _: "{}",
        lambda _: "[1]",
        lambda text: text.replace('"llama"', '"llamma"'),
        lambda text: text.replace('"hidden_size": 32', '"hidden_size": "wide"'),
    ],
    ids=["half", "empty", "no keys", "list", "unknown type", "wrong value"],
)
def test_damaged_config(copy: Path, change: Callable[[str], str]) -> None:
    config = copy / "config.json"
    before = config.read_text()
    config.write_text(change(before))
    assert config.read_text() != before
    refused(compress("out", model="copy"), "copy: cannot read its configuration: ")


@pytest.mark.parametrize("change", [lambda data: data[:5000], lambda data: b"garbage " * 100, lambda _: b""])
def test_damaged_weights(copy: Path, change: Callable[[bytes], bytes]) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    refused(compress("out", model="copy"), "copy: ")


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refused(compress("out", model="copy"), "copy: cannot be loaded", "model.safetensors")


@pytest.mark.parametrize("change", ["missing", "of another shape"])
def test_a_tensor_is(copy: Path, change: str) -> None:
    """transformers would fill it with random numbers."""
    name = "model.layers.1.mlp.up_proj.weight"
    state = load_file(copy / "model.safetensors")
    weight = state.pop(name)
    if change == "of another shape":
        state[name] = weight[:-1].clone()
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    refused(compress("out", model="copy"), "copy: ", name)


def changed(change: Callable[[PreTrainedModel], None]) -> str:
    """Saves the tiny model with changed weights; its name."""
    model = tiny_llama()
    with torch.no_grad():
        change(model)
    save_tiny(Path("changed"), model)
    return "changed"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(place: Path, value: float) -> None:
    model = changed(lambda m: m.model.layers[1].mlp.up_proj.weight[3, 4].fill_(value))
    refused(compress("out", model=model), "model.layers.1.mlp.up_proj.weight: the weights hold NaN or infinity")


def test_a_finite_weight_whose_sum_overflows_is_no_error(place: Path) -> None:
    model = changed(lambda m: m.model.embed_tokens.weight[90:95].fill_(3e38))  # words the text does not have
    ok(*compress("out", "--search", "hand", model=model))


def test_activations_that_overflow(place: Path) -> None:
    model = changed(lambda m: m.model.layers[0].mlp.down_proj.weight.fill_(1e38))
    refused(compress("out", model=model), "block 0: its output holds NaN or infinity")


def test_activations_that_overflow_inside_a_block(place: Path) -> None:
    model = changed(lambda m: m.model.layers[0].self_attn.q_proj.weight.fill_(1e38))
    refused(compress("out", model=model), "block 0")


def test_activations_that_overflow_later_on(place: Path) -> None:
    """The first block's factors stay, to continue from; nothing else does."""
    model = changed(lambda m: m.model.layers[1].mlp.down_proj.weight.fill_(1e38))
    before = snapshot()
    one_line(bolaco(*compress("out", model=model)), "block 1: its output holds NaN or infinity")
    after = snapshot()
    assert {name for name in after if not name.startswith("out.work")} == set(before)
    assert [name for name in after if name.startswith("out.work/factors-") and name.endswith("block-00000.safetensors")]


def test_compressed_already(place: Path, shared: Path) -> None:
    refused(compress("out", model=str(shared / "out")), "compressed already (lowrank_llama)", "export --dense")
    refused(compress("out", "--dry-run", model=str(shared / "out")), "compressed already (lowrank_llama)")


def test_no_text_decoder(place: Path) -> None:
    sizes: dict[str, Any] = {"num_layers": 1, "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "vocab_size": 96}
    save_tiny(Path("both"), AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING["t5"](**sizes)))
    refused(compress("out", "--dry-run", model="both"), "no causal language model of type t5")
    refused(compress("out", model="both"), "T5Config")


# --- the other commands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--seq-len", "0"], "seq_len must be at least 2"),
        (["--seq-len", "1"], "seq_len must be at least 2"),
        (["--seq-len", "129"], "128 positions"),
        (["--seq-len", "32", "--limit", "0"], "limit must be at least 1"),
        (["--seq-len", "32", "--limit", "-1"], "limit must be at least 1"),
        (["--seq-len", "32", "--limit", "900"], "too short for evaluation"),
        (["--seq-len", "32", "--json", "gone/it.json"], "--json gone/it.json: there is no such folder"),
        (["--seq-len", "32", "--data", "gone.txt"], "gone.txt: no such file"),
        (["--seq-len", "32", "--bos", "window", "--device", "toaster"], "device 'toaster'"),
    ],
)
def test_eval(place: Path, words: list[str], part: str) -> None:
    refused(["eval", "model", "--data", "other.txt", *words], part)


def test_eval_of_no_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(["eval", "./gone", "--data", "other.txt"], "./gone: no such folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(["eval", "gone", "--data", "other.txt"], "gone: no such folder here, and from the hub: cannot read")
    refused(compress("out", model="gone"), "gone: no such folder here, and from the hub: cannot read")


@pytest.mark.parametrize("folder", ["gone", "model"])
def test_inspect_of_no_result(place: Path, folder: str) -> None:
    refused(["inspect", folder], f"{folder}: no bolaco.json in it")


@pytest.mark.parametrize("text", ["", "{", json.dumps({"ranks": {}})])
def test_inspect_of_a_damaged_result(place: Path, text: str) -> None:
    Path("result").mkdir()
    Path("result/bolaco.json").write_text(text)
    refused(["inspect", "result"], "result/bolaco.json: damaged")


def test_export_of_no_result(place: Path) -> None:
    refused(["export", "model", "--dense", "-o", "stock"], "model: a llama model, not a compressed one")


def test_export_over_something(place: Path, shared: Path) -> None:
    Path("stock").mkdir()
    words = ["export", str(shared / "out"), "--dense", "--drop-bias", "-o", "stock"]
    refused(words, "stock: exists already")


# --- all of it in a process of its own ----------------------------------------------------------------------------


def test_what_a_shell_sees(place: Path) -> None:
    """No warning, bar or traceback of any library around the one line; what imports say is in test_cli.py."""
    changed(lambda m: m.model.layers[0].mlp.down_proj.weight.fill_(1e38))
    run = with_bolaco(
        "import sys, bolaco.cli\nraise SystemExit(bolaco.cli.main(sys.argv[1:]))", *compress("out", model="changed")
    )
    assert run.returncode == 1
    assert re.fullmatch(r"loading changed\nrecipe [^\n]+\nbolaco: error: block 0: [^\n]+\n", run.stderr)
    assert run.stdout == ""
    assert not Path("out.work").exists()


def test_result_is_whole(shared: Path) -> None:
    """The result the damages above are compared with."""
    assert len(info(shared / "out")["trials"]) == 3
