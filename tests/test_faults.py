"""Situations from bug reports: each is one clear line, or the right result."""

from __future__ import annotations

import copy
import json
import math
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from bolaco.checkpoint.info import Perplexities, read_info
from bolaco.data import read_documents
from bolaco.errors import BolacoError, CheckpointError, DataError, OutputExistsError, ResumeError, UnsupportedModelError
from bolaco.evaluation.objective import check_tokens
from bolaco.factorize import InputMetric, OutputMetric, low_rank
from bolaco.models.load import load_config, load_model, load_tokenizer, weights_fingerprint
from bolaco.models.match import check_rebuildable
from bolaco.statistics.gradient import GRADIENT
from bolaco.statistics.stored import StatisticStore
from bolaco.storage.pivot import pivot
from bolaco.work.blockstore import BlockStore
from bolaco.work.output import refuse_existing
from tests.models import compress_tiny, save_tiny, tiny_llama

# --- a model in memory that is not what its configuration makes ------------------------------------------------------


class Scaled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def test_a_model_as_its_configuration_makes_it_is_taken():
    check_rebuildable(tiny_llama())


def test_a_class_with_a_forward_pass_of_its_own():
    with pytest.raises(UnsupportedModelError, match=r"a Scaled, where .* makes a LlamaForCausalLM"):
        check_rebuildable(Scaled(tiny_llama().config))


def test_blocks_removed_in_memory():
    model = tiny_llama()
    del model.model.layers[1]
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.\S+ is not there in memory"):
        check_rebuildable(model)


def test_another_width_than_the_configuration_says():
    model = tiny_llama()
    model.config.intermediate_size += 4
    with pytest.raises(UnsupportedModelError, match=r"gate_proj\.weight: has shape \[\d+, 32\] in memory, has shape"):
        check_rebuildable(model)


def test_hooks_compiled_and_offloaded_models():
    model = tiny_llama()
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 0.1)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp: has forward hooks"):
        check_rebuildable(model)
    handle.remove()
    with pytest.raises(UnsupportedModelError, match="a compiled model"):
        check_rebuildable(torch.compile(model))
    model.model.layers[0].mlp.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.\S+ is not in memory \(offloaded\)"):
        check_rebuildable(model)


def test_it_is_checked_before_anything_else(tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match="a Scaled"):
        compress_tiny(Scaled(tiny_llama().config).eval(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- folders ----------------------------------------------------------------------------------------------------------


def test_code_of_a_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, mark = save_tiny(tmp_path / "own"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for load in (load_config, load_model):
        with pytest.raises(BolacoError) as error:
            load(str(folder))
        assert "\n" not in str(error.value)
    with suppress(BolacoError):  # the tokenizer's own files can be enough
        load_tokenizer(str(folder))
    with pytest.raises(UnsupportedModelError, match="code of its own, which is not run"):
        load_config(str(folder))
    assert not mark.exists()


def test_tensors_without_a_place_are_named(tmp_path: Path):
    base = tiny_llama()
    classifier = LlamaForSequenceClassification(copy.deepcopy(base.config))
    classifier.model = base.model
    base.config.tie_word_embeddings = classifier.config.tie_word_embeddings = True
    folder = save_tiny(tmp_path / "classifier", classifier)
    with pytest.raises(CheckpointError, match=r"1 tensors have no place .* score\.weight"):
        load_model(str(folder))


def test_older_tensors_that_are_computed_today_are_no_error(tmp_path: Path):
    folder = save_tiny(tmp_path / "old")
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(str(folder))


def test_an_adapter_beside_the_weights(tmp_path: Path):
    folder = save_tiny(tmp_path / "adapted")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"adapter_config\.json.* merge it"):
        load_model(str(folder))


def test_weights_of_pickle_that_are_cut_off(tmp_path: Path):
    folder = save_tiny(tmp_path / "cut")
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    data = (folder / "pytorch_model.bin").read_bytes()
    for part in (data[:9000], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"):
        (folder / "pytorch_model.bin").write_bytes(part)
        with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin"):
            load_model(str(folder))


def test_an_output_that_is_a_link_to_nowhere(tmp_path: Path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputExistsError, match="out"):
        refuse_existing(tmp_path / "out")


@pytest.mark.parametrize("kind", ["generation settings", "attentions"])
def test_what_cannot_be_saved_is_said_before_anything_is_computed(kind, tmp_path: Path):
    if kind == "attentions":
        folder = save_tiny(tmp_path / "model")
        config = json.loads((folder / "config.json").read_text()) | {"output_attentions": True}
        (folder / "config.json").write_text(json.dumps(config))
        model = load_model(str(folder))
    else:
        model = tiny_llama()
        model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    with pytest.raises(UnsupportedModelError, match="cannot be saved"):
        compress_tiny(model, tmp_path / "out")
    assert not list((tmp_path / "out.work").glob("factors-*"))


def test_numbers_that_json_does_not_have(tmp_path: Path):
    found = Perplexities(dense=math.inf, compressed=1.0, data="x", seq_len=1, windows=1, tokens=1)
    values = json.loads(found.model_dump_json(), parse_constant=lambda name: pytest.fail(name))
    assert Perplexities.model_validate(values) == found
    model = tiny_llama()
    model.lm_head.weight.data.mul_(1e3)
    run = compress_tiny(model, tmp_path / "out")
    for name in ("bolaco.json", "curves.json"):
        json.loads((run.path / name).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read_info(run.path).perplexity == run.info.perplexity


def test_pickled_configurations_and_models(tmp_path: Path):
    run = compress_tiny(tiny_llama(), tmp_path / "out")
    model = load_model(str(run.path))
    assert type(pickle.loads(pickle.dumps(model.config))) is type(model.config)  # noqa: S301 - our own
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own
    assert type(again) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# --- texts ------------------------------------------------------------------------------------------------------------


def test_rows_without_text_and_columns_of_any_kind(tmp_path: Path):
    rows = [{"text": "one", "meta": 1}, {"text": None, "meta": {"a": []}}, {"text": "two", "meta": "x"}, {"text": " "}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert list(read_documents(str(file))) == ["one", "two"]
    whole = tmp_path / "rows.json"
    whole.write_text(json.dumps(rows), encoding="utf-8")
    assert list(read_documents(str(whole))) == ["one", "two"]
    Dataset.from_list([{"text": "one", "n": 1}, {"text": None, "n": 2}]).to_parquet(tmp_path / "rows.parquet")
    assert list(read_documents(str(tmp_path / "rows.parquet"))) == ["one"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    for name, text in (("a.txt", "hello"), ("a.jsonl", '{"text": "hello"}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert list(read_documents(str(tmp_path / name))) == ["hello"]


def test_a_path_with_two_colons(tmp_path: Path):
    (tmp_path / "x::y.txt").write_text("hello", encoding="utf-8")
    assert list(read_documents(str(tmp_path / "x::y.txt"))) == ["hello"]


def test_what_datasets_has_saved(tmp_path: Path):
    rows = Dataset.from_dict({"text": ["one", "two"], "label": [0, 1]})
    rows.save_to_disk(tmp_path / "alone")
    DatasetDict({"test": Dataset.from_dict({"text": ["no"]}), "train": rows}).save_to_disk(tmp_path / "splits")
    for name in ("alone", "splits"):
        assert list(read_documents(str(tmp_path / name))) == ["one", "two"]


def test_a_row_that_is_no_object_is_named(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n[1]\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: a row is list"):
        list(read_documents(str(tmp_path / "rows.jsonl")))


def test_tokens_beyond_the_embedding():
    model = tiny_llama()
    check_tokens(model, torch.tensor([[0, 95]]))
    with pytest.raises(DataError, match="token 96, but the model has embeddings of 96"):
        check_tokens(model, torch.tensor([[0, 96]]))


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_matrix_that_the_loss_does_not_feel_costs_nothing():
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    factors = low_rank(weight, InputMetric(None), 3, output=OutputMetric(torch.zeros(6, 6), 0.1))
    assert torch.equal(factors.spectrum, torch.zeros_like(factors.spectrum))
    assert torch.isfinite(factors.product(3)).all()


@pytest.mark.parametrize("exponent", [-300, -200, -60])
def test_the_output_metric_is_the_same_whatever_gradients_are_multiplied_with(exponent):
    """Their squares would be no numbers any more."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 9, generator=draw, dtype=torch.float64)
    half = torch.randn(6, 8, generator=draw, dtype=torch.float64)
    metric = half @ half.T
    plain = low_rank(weight, InputMetric(None), 4, output=OutputMetric(metric, 0.1))
    small = low_rank(weight, InputMetric(None), 4, output=OutputMetric(metric * 10.0**exponent, 0.1))
    torch.testing.assert_close(small.product(4), plain.product(4))
    torch.testing.assert_close(small.spectrum / 10.0**exponent, plain.spectrum)


@pytest.mark.parametrize("scale", [1.0, 2.0**-140, 2.0**-60])
def test_moments_of_small_gradients(scale, tmp_path: Path):
    draw = torch.Generator().manual_seed(0)
    site = next(iter(compressible()))
    gradients = torch.randn(2, 5, site.out_features, generator=draw)
    gatherer = GRADIENT.accumulator(site, torch.device("cpu"))
    for part in gradients:
        gatherer.update(part[None], part[None] * scale)
    flat = (gradients.reshape(-1, site.out_features) * scale).double()
    expected = flat.T @ flat / len(flat)
    found = gatherer.result()
    assert float((found - expected).norm()) <= 1e-3 * float(expected.norm())
    store = StatisticStore(tmp_path / "store", GRADIENT)
    store.put(0, {"a": found})
    torch.testing.assert_close(store.get(0, torch.device("cpu"))["a"].double(), found, rtol=1e-6, atol=0)


def compressible():
    from bolaco.models.find import inspect_structure

    return inspect_structure(tiny_llama()).sites


@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_the_pivoted_form_of_a_product_of_lower_rank(true_rank):
    draw = torch.Generator().manual_seed(0)
    reduce = torch.randn(4, 9, generator=draw, dtype=torch.float64)
    expand = torch.randn(7, true_rank, generator=draw, dtype=torch.float64) @ torch.randn(
        true_rank, 4, generator=draw, dtype=torch.float64
    )
    form = pivot(expand, reduce)
    assert form.side == "rows"
    made = torch.cat([form.first, form.second @ form.first])[form.order.long()]
    torch.testing.assert_close(made, expand @ reduce)
    assert math.isfinite(form.growth)


# --- work -------------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_work_folder_is_noticed(tmp_path: Path):
    store = BlockStore(tmp_path)
    store.write(0, {"a": torch.arange(64, dtype=torch.float32), "b": torch.ones(3, dtype=torch.bfloat16)})
    assert torch.equal(store.read(0)["b"], torch.ones(3, dtype=torch.bfloat16))
    data = bytearray(store.path(0).read_bytes())
    data[-40] ^= 1
    store.path(0).write_bytes(bytes(data))
    with pytest.raises(ResumeError, match=r"block-00000\.safetensors.*checksum"):
        store.read(0)


def test_the_fingerprint_of_weights_is_of_their_bytes():
    model = tiny_llama()
    before = weights_fingerprint(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert weights_fingerprint(model) == before
    finally:
        torch.set_num_threads(threads)
    weight = model.model.layers[0].mlp.up_proj.weight.data
    first, second = float(weight[0, 0]), float(weight[3, 1])
    weight[0, 0], weight[3, 1] = second, first
    assert weights_fingerprint(model) != before
