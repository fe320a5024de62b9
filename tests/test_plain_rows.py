"""Plain quantization in a comparison: what is counted, what is measured, and that the original is left as it was."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bolaco import api
from bolaco.comparison import plain
from bolaco.comparison.plain import FORMS, rounded
from bolaco.evaluation.perplexity import perplexity
from bolaco.models.experts import unfused
from bolaco.models.find import inspect_structure
from bolaco.report.charts import bytes_chart
from bolaco.report.comparison import quantized_note
from bolaco.report.record import read_record
from tests.command import bolaco
from tests.models import FAMILIES, text_file, tiny_llama, tiny_tokenizer, token_blocks

WORDS: dict[str, Any] = {
    "calibration": str(text_file()),
    "seq_len": 32,
    "options": {"calibration.sequences": 4, "evaluation.windows": 4, "search.rank_multiple": 4},
}


def loaded(model: Any) -> Any:
    """What the context looks at."""
    return SimpleNamespace(model=model, working=unfused(model), structure=inspect_structure(model))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("name", FORMS)
def test_matrices_are_rounded_for_a_while(family: str, name: str) -> None:
    model, tokens, spec = FAMILIES[family](), token_blocks(2, 16), FORMS[name]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        exact = model(input_ids=tokens).logits
        with rounded(loaded(model), spec) as bits:
            found = model(input_ids=tokens).logits
            changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    sites = inspect_structure(model).sites
    # Norms, biases and embeddings are as they were.
    assert len(changed) == len({site.module for site in sites})
    assert all(before[key].ndim == 2 and "embed" not in key for key in changed)
    assert bits == sum(spec.stored_bits(site.out_features, site.in_features) for site in sites)
    assert bits >= spec.bits * sum(site.size for site in sites)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    error = float((found - exact).norm() / exact.norm())
    # About a step of the levels, through a few layers.
    assert 0 < error < 15 * 2.0**-spec.bits


def test_the_original_is_put_back_where_its_evaluation_fails() -> None:
    model = tiny_llama()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), rounded(loaded(model), FORMS["int3"]):
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "out"
    api.compare(tiny_llama(), ["svd"], [0.8, 0.6], out, tokenizer=tiny_tokenizer(), **WORDS)
    return out


def test_rows_of_plain_quantization(compared: Path) -> None:
    record = read_record(compared / "results.json")
    assert record.quantized is not None
    assert [row.name for row in record.quantized] == list(FORMS)
    assert [row.gap[0] for row in record.quantized if row.gap[0] is not None and abs(row.gap[0]) < 5]
    sizes = [row.bytes for row in record.quantized]
    assert sizes == sorted(sizes, reverse=True)
    model = tiny_llama()
    sites = inspect_structure(model).sites
    for row in record.quantized:
        bits = sum(FORMS[row.name].stored_bits(site.out_features, site.in_features) for site in sites)
        rest = sum(p.numel() for p in model.parameters()) - sum(site.size for site in sites)
        assert row.bytes == 4 * rest + math.ceil(bits / 8)
        assert row.bits == bits / sum(site.size for site in sites)
        assert row.gap[0] == pytest.approx(math.log(row.perplexity[0] / record.dense.perplexity[0]))
    # In eight bits hardly anything is lost.
    assert abs(record.quantized[0].gap[0]) < 0.02
    table = (compared / "table.md").read_text(encoding="utf-8")
    assert all(f"| dense, {name} |" in table for name in FORMS)
    assert "plain quantization" in table
    rows = list(csv.DictReader((compared / "table.csv").open(encoding="utf-8")))
    assert [row["bytes"] for row in rows[1:5]] == [str(size) for size in sizes]
    page = (compared / "report.html").read_text(encoding="utf-8")
    assert "dense, int3" in page
    assert page.count("over bytes") >= 1
    assert "plain quantization" in (compared / "bytes.svg").read_text(encoding="utf-8")


def test_a_source_in_few_bits_is_no_comparison(compared: Path) -> None:
    record = read_record(compared / "results.json")
    assert "no comparison" not in quantized_note(record)
    coarse = record.model_copy(update={"dense": record.dense.model_copy(update={"format": "Q4_1"})})
    assert "The source's own weights are in Q4_1" in quantized_note(coarse)
    assert quantized_note(record.model_copy(update={"quantized": None})) == ""


def test_the_chart_needs_two_results(compared: Path) -> None:
    record = read_record(compared / "results.json")
    alone = record.model_copy(update={"quantized": None, "rows": record.rows[:1]})
    assert bytes_chart("b", alone, "text") is None
    assert bytes_chart("b", record, "text") is not None


def test_they_are_left_out_and_unknown_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "round_to_nearest", never)
        api.compare(tiny_llama(), ["svd"], [0.8], tmp_path / "out", tokenizer=tiny_tokenizer(), quantized=(), **WORDS)
    assert "quantized" not in json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert not (tmp_path / "out" / "bytes.svg").exists()
    monkeypatch.chdir(tmp_path)
    words = ("--methods", "svd", "--keep", "0.8", "--quantized", "int5", "-o", "other")
    done = bolaco("compare", "m", *words)
    assert done.code == 1
    assert "--quantized int5: known are int8, int6, int4, int3" in done.err


def test_a_finished_row_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*words: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return perplexity(*words)

    monkeypatch.setattr(plain, "perplexity", counted)
    words = {"tokenizer": tiny_tokenizer(), "work": tmp_path / "work", "quantized": ["int8", "int4", "int3"]} | WORDS
    with pytest.raises(KeyboardInterrupt):
        api.compare(tiny_llama(), ["svd"], [0.8], tmp_path / "out", **words)
    api.compare(tiny_llama(), ["svd"], [0.8], tmp_path / "out", **words)
    assert len(calls) == 4
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["quantized"]
    assert [row["name"] for row in found] == ["int8", "int4", "int3"]
