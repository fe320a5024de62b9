"""Tuning: what holds for every mode, and the run around them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bolaco import api
from bolaco.checkpoint.info import read_info, write_info
from bolaco.checkpoint.result import Result
from bolaco.errors import CheckpointError, MissingPackageError, UnsupportedModelError
from bolaco.layers import LowRankLinear, PivotedLinear
from bolaco.models.load import load_model
from bolaco.tune import run
from bolaco.tune.mode import MODES, Context, Mode, matrices_of
from bolaco.tune.resolve import resolve
from bolaco.tune.settings import make_settings
from bolaco.tune.trainer import TuneTrainer, _Watch
from tests.command import digest, ok
from tests.models import FAMILIES, Compressed, compress_tiny, save_tiny, scratch, slow, text_file, token_blocks
from tests.processes import without_bolaco
from tests.test_checkpoint import must

SMALL = {"evaluation.windows": 4, "training.autocast": False, "training.warmup": 0}
# Options with which a mode's promises hold on tiny models.
OPTIONS: dict[str, dict[str, Any]] = {}
FAMILY_NAMES = ("llama", "gpt2", "phi3")


def folder_of(family: str, storage: str = "pivoted") -> Compressed:
    """A tiny model compressed once for all tests; leave the folder as it is."""
    out = scratch() / f"tune-{family}-{storage}"
    if out not in _made:
        made = compress_tiny(FAMILIES[family](), out, keep=0.7, method="afm", storage=storage)
        # As if it had been compressed from a folder, for the modes that need the original.
        original = save_tiny(out.with_name(f"{out.name}-original"), made.original)
        write_info(out, made.info.model_copy(update={"model": str(original)}))
        _made[out] = dataclasses.replace(made, info=read_info(out))
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


def prepared(mode: Mode, model: Any, source: Compressed, **options: Any) -> Any:
    """What the mode makes of a loaded model."""
    options = OPTIONS.get(mode.name, {}) | options
    settings = make_settings(
        str(source.path), {"mode": mode.name, "data": "x"}, {f"options.{k}": v for k, v in options.items()}
    )
    settings, checked = resolve(settings, mode)
    model.requires_grad_(False)
    context = Context(
        model,
        settings,
        checked,
        source.info,
        lambda n: [b[None] for b in token_blocks(n, 32)],
        lambda _: source.original,
    )
    return mode.prepare(context)


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


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "phi3") for name in MODES.built_in),
        ("factors", "llama"),
        ("continued", "gpt2"),
        *(slow(name, "llama") for name in MODES.built_in if name != "factors"),
        *(slow(name, "gpt2") for name in MODES.built_in if name != "continued"),
    ],
)
def test_nothing_is_changed_before_the_first_step(name: str, family: str) -> None:
    mode, source = MODES.get(name), folder_of(family)
    model = load_model(str(source.path))
    before = logits(model)
    made = prepared(mode, model, source)
    if mode.exact_start:
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        finished = made.finish()
    if mode.exact_start:
        torch.testing.assert_close(logits(finished), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "phi3") for name in MODES.built_in),
        ("factors", "llama"),
        ("continued", "gpt2"),
        *(slow(name, "llama") for name in MODES.built_in if name != "factors"),
        *(slow(name, "gpt2") for name in MODES.built_in if name != "continued"),
    ],
)
def test_result_of_every_mode(name: str, family: str, tmp_path: Path) -> None:
    mode, source = MODES.get(name), folder_of(family)
    result = tune(source.path, tmp_path / "out", name)
    record = result.info.tuning
    assert record.mode == name
    assert record.steps == 3
    assert len(record.curve) == 3
    assert record.trainable_parameters > 0
    assert record.frozen_sha256["before"] == record.frozen_sha256["after"]
    assert record.perplexity.after != record.perplexity.before
    assert result.info.ranks == source.info.ranks
    assert result.info.recipe == source.info.recipe
    written = result.info.model_dump(mode="json")
    assert written["tuning"].pop("earlier") is None
    assert json.loads((tmp_path / "out" / "bolaco.json").read_text()) == written
    assert not (tmp_path / "out.work").exists()
    assert not [file for file in (tmp_path / "out").rglob("*") if file.suffix in (".pt", ".bin", ".pkl", ".pth")]
    old, new = load_model(str(source.path)), load_model(str(result.path))
    if mode.same_ranks:
        assert ranks(new) == ranks(old)
        assert sum(p.numel() for p in new.parameters()) == sum(p.numel() for p in old.parameters())
    if name == "tt-lora":  # the adapter is alone, and the model that it names is the input
        assert not list((tmp_path / "out").glob("model*"))
        assert torch.equal(logits(load_model(str(result.path), adapters="leave")), logits(old))
        return
    again = AutoModelForCausalLM.from_pretrained(result.path, trust_remote_code=True)
    torch.testing.assert_close(logits(again), logits(new))


# --- interruption -----------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """What ends a run in these tests."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, after_saving: bool) -> None:
    """Lets a run fail once so many steps are done."""
    name = "on_save" if after_saving else "on_step_end"
    original = getattr(_Watch, name)

    def failing(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        original(self, args, state, control, **more)
        if state.global_step == step:
            raise Stopped

    monkeypatch.setattr(_Watch, name, failing)


# With dropout, several epochs and accumulation.
LONG: dict[str, Any] = {
    "options": {
        "training.save_steps": 2,
        "training.gradient_accumulation": 2,
        "data.sequences": 6,
        "training.warmup": 2,
    },
    "max_steps": 7,
    "batch": 2,
}


@functools.cache
def undisturbed(name: str) -> Result:
    """A run of :data:`LONG` that nothing interrupted; leave the folder as it is."""
    return tune(folder_of("gpt2").path, scratch() / f"undisturbed-{name}", name, **LONG)


@pytest.mark.parametrize(
    ("name", "step", "after_saving"),
    [
        ("factors", 1, False),
        ("factors", 4, True),
        *((name, 5, False) for name in ("lora", "mixed-rank")),
        slow("factors", 7, True),
        *(slow(name, 5, False) for name in ("factors", "diagonal")),
        *(
            slow(name, *moment)
            for moment in ((1, False), (4, True), (7, True))
            for name in ("diagonal", "lora", "mixed-rank")
        ),
    ],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    name: str, step: int, after_saving: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before any checkpoint, on one, after one, and at the end."""
    model, words, whole = folder_of("gpt2").path, LONG, undisturbed(name)
    with monkeypatch.context() as patch:
        stop_at(patch, step, after_saving)
        with pytest.raises(Stopped):
            tune(model, tmp_path / "out", name, **words)
    assert not (tmp_path / "out").exists()
    again = tune(model, tmp_path / "out", name, **words)
    assert again.info.tuning.curve == whole.info.tuning.curve
    assert again.info.tuning.perplexity == whole.info.tuning.perplexity
    assert digest(again.path / "model.safetensors") == digest(whole.path / "model.safetensors")
    assert not (tmp_path / "out.work").exists()


def test_what_is_trained_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder_of("llama").path
    whole = tune(model, tmp_path / "whole", "factors")
    with monkeypatch.context() as patch:
        patch.setattr(run, "_measure_result", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            tune(model, tmp_path / "out", "factors")
    monkeypatch.setattr(TuneTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    again = tune(model, tmp_path / "out", "factors")
    assert digest(again.path / "model.safetensors") == digest(whole.path / "model.safetensors")


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = folder_of("llama").path, {"options": {"training.save_steps": 1}, "max_steps": 4}
    whole = tune(model, tmp_path / "whole", "factors", **words)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, True)
        with pytest.raises(Stopped):
            tune(model, tmp_path / "out", "factors", **words)
    (state,) = (tmp_path / "out.work").glob("trained-*/checkpoints/checkpoint-3/trainer_state.json")
    state.write_text(state.read_text()[:50])
    again = tune(model, tmp_path / "out", "factors", **words)
    assert digest(again.path / "model.safetensors") == digest(whole.path / "model.safetensors")


def by_the_clock(monkeypatch: pytest.MonkeyPatch, seconds: float = 40) -> list[float]:
    """Every training step takes so long; returns where the learning rates of the steps are collected."""
    now, rates = [0.0], []
    step = TuneTrainer.training_step

    def timed(trainer: TuneTrainer, *args: Any, **kwargs: Any) -> Any:
        now[0] += seconds
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(TuneTrainer, "training_step", timed)
    monkeypatch.setattr("bolaco.tune.trainer.time.monotonic", lambda: now[0])
    return rates


def test_the_budget_of_minutes_ends_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = by_the_clock(monkeypatch)
    words = {"max_steps": 500, "minutes": 4, "learning_rate": 1.0, "options": {"training.warmup": 0.5}}
    record = tune(folder_of("llama").path, tmp_path / "out", "factors", **words).info.tuning
    assert (record.steps, record.of_steps, record.out_of_time) == (6, 500, True)
    # Half of the time is warm-up, and the rate has fallen to its end when time has: not after 500 steps.
    assert rates[1:4] == pytest.approx([1 / 3, 2 / 3, 1.0], abs=0.01)
    assert rates[3] > rates[4] > rates[5]


def test_a_mode_s_own_schedule_goes_by_the_clock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_the_clock(monkeypatch)
    seen = []
    begin = _Watch.on_step_begin

    def spied(self: _Watch, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.prepared.on_step = lambda step, steps: seen.append((step, steps))
        begin(self, args, state, control, **more)

    monkeypatch.setattr(_Watch, "on_step_begin", spied)
    tune(folder_of("llama").path, tmp_path / "out", "factors", max_steps=600, minutes=4)
    assert seen == [(step, 600) for step in range(0, 600, 100)]


def test_time_before_an_interruption_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = folder_of("llama").path, {"max_steps": 50, "minutes": 4, "options": {"training.save_steps": 1}}
    rates = by_the_clock(monkeypatch)
    with monkeypatch.context() as patch:
        stop_at(patch, 4, True)
        with pytest.raises(Stopped):
            tune(model, tmp_path / "out", "factors", **words)
    before = len(rates)
    record = tune(model, tmp_path / "out", "factors", **words).info.tuning
    assert (record.steps, record.out_of_time) == (6, True)
    assert len(rates) - before == 2


@pytest.mark.parametrize(
    ("schedule", "warmup"),
    [("cosine", 0), ("cosine", 2), ("linear", 2), ("constant", 0), slow("linear", 0), slow("constant", 2)],
)
def test_no_step_is_given_away_to_a_rate_of_zero(
    schedule: str, warmup: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = by_the_clock(monkeypatch)
    options = {"training.warmup": warmup, "training.schedule": schedule, "training.final_rate": 0.0}
    tune(folder_of("llama").path, tmp_path / "out", "factors", options, max_steps=5, learning_rate=1.0)
    assert min(rates) > 0.01
    assert rates[:warmup] == pytest.approx([0.25, 0.75][:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[warmup] > 0.8


# --- distillation -----------------------------------------------------------------------------------------------------


def test_distillation_brings_the_model_nearer_to_its_original(tmp_path: Path) -> None:
    compressed = folder_of("llama")
    save_tiny(tmp_path / "teacher", compressed.original)
    words = {"max_steps": 60, "distill": 1.0, "teacher": str(tmp_path / "teacher"), "learning_rate": 3e-3}
    result = tune(compressed.path, tmp_path / "out", "factors", **words)
    curve = result.info.tuning.curve
    assert sum(p.loss for p in curve[-5:]) < 0.8 * sum(p.loss for p in curve[:5])

    def divergence(path: Path) -> float:
        ours, theirs = logits(load_model(str(path))).log_softmax(-1), logits(compressed.original).log_softmax(-1)
        return float(torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))

    assert divergence(result.path) < 0.8 * divergence(compressed.path)


def test_default_learning_rate_of_distillation(tmp_path: Path) -> None:
    mode = MODES.get("factors")
    for weight, rate in ((0.0, 5e-5), (0.5, 1e-4)):
        made = make_settings("m", {"mode": "factors", "data": "d", "distill": weight})
        assert resolve(made, mode)[0].training.learning_rate == rate


# --- storage and precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "auto") for name in ("factors", "lora", "mixed-rank")),
        ("sketch", "float32"),
        *(slow(name, "auto") for name in MODES.built_in if name not in ("factors", "lora", "mixed-rank")),
        slow("factors", "float32"),
        *(slow(name, "float32") for name in MODES.built_in if name not in ("factors", "sketch")),
    ],
)
def test_half_precision_goes_in_and_comes_out(name: str, dtype: str, tmp_path: Path) -> None:
    model = load_model(str(folder_of("llama").path)).bfloat16()
    save_tiny(tmp_path / "half", model)
    shutil.copy(folder_of("llama").path / "bolaco.json", tmp_path / "half")
    words = {"dtype": dtype, "options": {"training.autocast": True, "data.sequences": 8}}
    words["options"] |= {"options.whole": True} if name == "tt-lora" else {}
    result = tune(tmp_path / "half", tmp_path / "out", name, **words)
    state = load_file(result.path / "model.safetensors")
    assert {tensor.dtype for key, tensor in state.items() if not key.endswith(("order", "codes"))} == {torch.bfloat16}
    assert math.isfinite(result.info.tuning.perplexity.after)
    before = load_file(tmp_path / "half" / "model.safetensors")
    same = all(key in before and torch.equal(tensor, before[key]) for key, tensor in state.items())
    assert same == (name == "tt-lora")


@pytest.mark.parametrize("name", ["factors", "diagonal"])
def test_two_factor_storage_stays_as_it_is(name: str, tmp_path: Path) -> None:
    source = folder_of("llama", "two-factor")
    result = tune(source.path, tmp_path / "out", name)
    before, after = load_file(source.path / "model.safetensors"), load_file(result.path / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    parts = ("reduce", "expand") if name == "factors" else ("expand",)
    assert changed == {key for key in before if any(key.endswith(f"{part}.weight") for part in parts)}


def test_only_the_chosen_types_are_tuned(tmp_path: Path) -> None:
    source = folder_of("llama", "two-factor")
    result = tune(source.path, tmp_path / "out", "factors", types=("gate", "o"))
    before, after = load_file(source.path / "model.safetensors"), load_file(result.path / "model.safetensors")
    changed = {key.split(".")[-3] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"gate_proj", "o_proj"}


def test_norms_and_biases_are_trained_when_asked_for(tmp_path: Path) -> None:
    source = folder_of("llama", "two-factor")
    result = tune(source.path, tmp_path / "out", "factors", {"options.norms": True, "options.biases": True})
    before, after = load_file(source.path / "model.safetensors"), load_file(result.path / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert "model.norm.weight" in changed
    assert "model.layers.0.mlp.gate_proj.expand.bias" in changed
    assert "model.embed_tokens.weight" not in changed


# --- modes ------------------------------------------------------------------------------------------------------------


def test_adapters_kept_apart_are_a_peft_folder(tmp_path: Path) -> None:
    from peft import PeftModel

    source = folder_of("llama")
    before = load_model(str(source.path))
    result = tune(source.path, tmp_path / "out", "lora", {"options.merge": False})
    assert digest(result.path / "model.safetensors") == digest(source.path / "model.safetensors")
    merged = tune(source.path, tmp_path / "merged", "lora")
    assert merged.info.tuning.perplexity.after == pytest.approx(result.info.tuning.perplexity.after)
    # Stock transformers has the input, and PEFT puts the adapter on; bolaco does both.
    stock = AutoModelForCausalLM.from_pretrained(result.path, trust_remote_code=True)
    assert torch.equal(logits(stock), logits(before))
    expected = logits(load_model(str(merged.path)))
    assert not torch.allclose(expected, logits(before), rtol=1e-4, atol=1e-4)
    adapted = PeftModel.from_pretrained(stock, result.path / "adapter")
    for model in (adapted, load_model(str(result.path))):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not (merged.path / "adapter").exists()
    assert "Stock transformers loads the model without it" in (result.path / "README.md").read_text()


def test_a_kept_peft_adapter_is_not_lost_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of("llama")
    result = tune(source.path, tmp_path / "out", "lora", {"options.merge": False}, max_steps=1)
    with pytest.raises(UnsupportedModelError, match=r"adapter_config.json\) and would be lost"):
        tune(result.path, tmp_path / "again", "factors")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(MissingPackageError, match="need PEFT"):
            load_model(str(result.path))
    file = result.path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="adapter: damaged, or of another model"):
        load_model(str(result.path))


@pytest.mark.parametrize(("on", "words"), [("dense", ("v_proj",)), ("factored", ("reduce", "expand"))])
def test_where_adapters_go(on: str, words: tuple[str, ...], tmp_path: Path) -> None:
    source = folder_of("llama", "two-factor")
    result = tune(source.path, tmp_path / "out", "lora", {"options.on": on, "types": ["v", "gate"]})
    before, after = load_file(source.path / "model.safetensors"), load_file(result.path / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(any(word in key for word in words) for key in changed)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("continued", "llama"),
        ("lora", "gpt2"),
        ("lora", "phi3"),
        slow("lora", "llama"),
        slow("continued", "gpt2"),
        slow("continued", "phi3"),
    ],
)
def test_a_dense_model_is_tuned_too(family: str, name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense", FAMILIES[family]())
    result = tune(tmp_path / "dense", tmp_path / "out", name)
    assert result.info.tuning.perplexity.after < result.info.tuning.perplexity.before
    assert "ranks" not in json.loads((result.path / "bolaco.json").read_text())
    assert type(AutoModelForCausalLM.from_pretrained(result.path)) is type(FAMILIES[family]())
    said = ok("inspect", result.path).out
    assert name in said
    assert "rank of each matrix" not in said


def test_a_tuned_model_is_tuned_again(tmp_path: Path) -> None:
    first = tune(folder_of("llama").path, tmp_path / "first", "diagonal")
    second = tune(first.path, tmp_path / "second", "factors")
    record = second.info.tuning
    assert record.earlier == first.info.tuning
    assert record.perplexity.before == pytest.approx(first.info.tuning.perplexity.after)
    said = ok("inspect", second.path).out
    assert said.index("factors") < said.index("diagonal") < said.index("rank of each matrix")
    assert "## Tuned" in (second.path / "README.md").read_text()


def test_frozen_weights_that_change_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = TuneTrainer.train

    def meddling(self: Any, **more: Any) -> Any:
        result = train(self, **more)
        self.model.model.get_input_embeddings().weight.data[0, 0] += 1
        return result

    monkeypatch.setattr(TuneTrainer, "train", meddling)
    with pytest.raises(CheckpointError, match="frozen weights have changed"):
        tune(folder_of("llama").path, tmp_path / "out", "factors")
    assert not (tmp_path / "out").exists()


def test_a_mode_that_changes_more_than_it_says_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = MODES.get("factors")

    def prepare(context: Context) -> Any:
        made = honest.prepare(context)
        return dataclasses.replace(made, touched=frozenset(sorted(made.touched)[1:]))

    monkeypatch.setattr(MODES, "get", lambda name: dataclasses.replace(honest, prepare=prepare))
    with pytest.raises(CheckpointError, match="changed by mode 'factors', which does not train it"):
        tune(folder_of("llama").path, tmp_path / "out", "factors")
    assert not (tmp_path / "out").exists()


LOAD = """
import sys

sys.modules["bolaco"] = None  # as where it is not installed
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    logits = model(input_ids=torch.arange(12)[None], use_cache=False).logits
save_file({"logits": logits}, sys.argv[2])
"""


@pytest.mark.parametrize("name", [slow("factors"), "sketch"])
def test_a_result_loads_where_bolaco_is_not(name: str, tmp_path: Path) -> None:
    result = tune(folder_of("phi3").path, tmp_path / "out", name)
    must(without_bolaco(LOAD, tmp_path, result.path, tmp_path / "logits"))
    with torch.no_grad():
        ours = load_model(str(result.path))(input_ids=torch.arange(12)[None], use_cache=False).logits
    torch.testing.assert_close(load_file(tmp_path / "logits")["logits"], ours)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    model = folder_of("llama").path
    one = tune(model, tmp_path / "one", "factors", batch=4)
    words = ["tune", str(model), "--mode", "factors", "--data", str(text_file()), "--max-steps", "3", "--batch", "2"]
    words += ["--seq-len", "32", "--learning-rate", "1e-3", "-o", str(tmp_path / "two")]
    for key, value in SMALL.items():
        words += ["--set", f"{key}={str(value).lower()}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "bolaco.cli", *words]
    subprocess.run(command, check=True, capture_output=True)
    two = json.loads((tmp_path / "two" / "bolaco.json").read_text())["tuning"]
    losses = [[point["loss"] for point in curve] for curve in (one.info.model_dump()["tuning"]["curve"], two["curve"])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert two["perplexity"]["after"] == pytest.approx(one.info.tuning.perplexity.after, rel=1e-4)
