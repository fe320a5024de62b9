"""Results of format 1, which earlier versions wrote, load and can be gone on from; see golden/make.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bolaco
from bolaco.checkpoint.info import CompressedInfo, read_any_info, read_curves
from bolaco.errors import BolacoError, CheckpointError
from bolaco.models.lowrank import FORMAT
from bolaco.report.html import result_page
from bolaco.report.record import RowResult, read_record
from tests.command import ok

V1 = Path(__file__).parent / "golden" / "v1"
MODELS = sorted(path.parent.name for path in V1.glob("*/logits.safetensors"))


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits.float()


def test_there_are_some_of_every_kind() -> None:
    assert {"pivoted", "two-factor", "shared", "phi3-split", "gpt2", "chop", "tuned", "sketch", "tt-lora"} <= set(
        MODELS
    )


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_it_did(name: str) -> None:
    known = load_file(V1 / name / "logits.safetensors")
    found = logits(bolaco.load(str(V1 / name)), known["tokens"])
    # Of another number of threads or another processor sums are rounded in another order.
    torch.testing.assert_close(found, known["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("chop", "tt-lora")])
def test_it_is_saved_in_today_s_format(name: str, tmp_path: Path) -> None:
    known = load_file(V1 / name / "logits.safetensors")
    model = bolaco.load(str(V1 / name))
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["lowrank"]["format"] == FORMAT
    assert all("kind" in entry for entry in config["lowrank"]["matrices"].values())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()
    assert torch.equal(logits(again, known["tokens"]), logits(model, known["tokens"]))


@pytest.mark.parametrize("name", MODELS)
def test_its_record_is_read_and_shown(name: str) -> None:
    info = read_any_info(V1 / name)
    assert isinstance(info, CompressedInfo)
    assert (info.storage is None) == (name == "chop")
    page = result_page(info, read_curves(V1 / name), name)
    assert f"{info.perplexity.compressed:.4g}" in page
    assert ok("inspect", V1 / name).out


@pytest.mark.parametrize("name", ["pivoted", "shared", "phi3-split", "sketch"])
def test_it_is_exported_and_tuned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(V1 / name, tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    ok("export", "old", "--dense", "--drop-bias", "-o", "stock")
    mode = "sketch" if name == "sketch" else "factors"
    words = ["--data", "pydoc", "--seq-len", "16", "--max-steps", "1", "--set", "data.sequences=4"]
    ok("tune", "old", "--mode", mode, *words, "--set", "evaluation.windows=2", "-o", "tuned")
    assert read_any_info("tuned").tuning.mode == mode


def test_a_comparison_is_read() -> None:
    record = read_record(V1 / "compared" / "results.json")
    assert all(isinstance(row, RowResult) for row in record.rows)
    assert [row.method for row in record.rows] == [method for _ in record.keep for method in record.methods]


@pytest.mark.parametrize(("value", "said"), [(3, "format 3"), (None, "format None"), ("1", "format '1'")])
def test_another_format_is_refused(value: object, said: str, tmp_path: Path) -> None:
    shutil.copytree(V1 / "pivoted", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["lowrank"]["format"] = value
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BolacoError, match=said) as caught:
        bolaco.load(str(tmp_path / "other"))
    assert isinstance(caught.value, CheckpointError)
    assert "\n" not in str(caught.value)
