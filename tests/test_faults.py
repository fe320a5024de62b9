"""Situations from bug reports: each is one clear line, or the right result."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

from bolaco import api
from bolaco.checkpoint.info import Perplexities, read_info
from bolaco.data import read_documents
from bolaco.errors import BolacoError, CheckpointError, DataError, OutputExistsError, ResumeError, UnsupportedModelError
from bolaco.evaluation.objective import check_tokens
from bolaco.factorize import InputMetric, OutputMetric, low_rank
from bolaco.layers.tensor_train import TensorTrain, TrainAdapter
from bolaco.models.adapters import save_trains
from bolaco.models.find import inspect_structure, meta_model
from bolaco.models.load import load_config, load_model, load_tokenizer, weights_fingerprint
from bolaco.models.match import check_rebuildable
from bolaco.settings import json_text
from bolaco.statistics.gradient import GRADIENT
from bolaco.statistics.stored import StatisticStore
from bolaco.storage.pivot import pivot
from bolaco.work.blockstore import BlockStore
from bolaco.work.folder import Artefact
from bolaco.work.hub import check_hub
from bolaco.work.output import refuse_existing
from tests.models import compress_tiny, save_tiny, text_file, tiny_llama

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


OUTSIDE = ["../x.safetensors", "/dev/zero", "/etc/hosts", "..", "a/../../x.safetensors", "x" * 300 + ".safetensors"]
NO_FILES = ["gone.safetensors", "", ".", "config.json", "linked.safetensors", 7, None, ["model.safetensors"]]


@pytest.mark.parametrize("place", [*OUTSIDE, *NO_FILES])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_leads_elsewhere_is_not_followed(place, index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save_tiny(tmp_path / "sharded")
    (folder / "linked.safetensors").symlink_to("/dev/zero")
    name = "model.embed_tokens.weight"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {name: place}}))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(CheckpointError, match=f"{index}: ") as caught:
        load_model(str(folder))
    assert name in str(caught.value)
    wanted = "not in this folder" if place in OUTSIDE else "no (name of a )?file"
    assert re.search(wanted, str(caught.value))
    for damage in ("[]", "{", '{"weight_map": []}', "[" * 10**5):
        (folder / index).write_text(damage)
        with pytest.raises(CheckpointError, match=f"{index}: damaged"):
            load_model(str(folder))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: no model has 1000000000"),
        ({"num_hidden_layers": 1e9}, "num_hidden_layers: no model has 1000000000.0"),
        ({"num_local_experts": -(10**9)}, "num_local_experts: no model has"),
        ({"vocab_size": 10**15}, "vocab_size: no model has"),
        ({"text_config": {"n_layers": 10**7}}, "text_config.n_layers: no model has"),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_made(change, part, tmp_path: Path):
    folder = save_tiny(tmp_path / "large")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(UnsupportedModelError, match=re.escape(part)):
            load(str(folder))


@pytest.mark.parametrize(
    "change", [{"vocab_size": 10**8}, {"hidden_size": 10**5, "head_dim": 8}, {"num_hidden_layers": 500}]
)
def test_a_model_far_larger_than_its_weights(change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers would make what they lack, in all the memory there is."""
    folder = save_tiny(tmp_path / "larger")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("made"))
    with pytest.raises(CheckpointError, match=r"config\.json: makes a model of [\d,]+ parameters, its files"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "change", [{"intermediate_size": -1}, {"pad_token_id": 10**6}, {"vocab_size": -1}, {"head_dim": 0}]
)
def test_sizes_of_which_no_model_can_be_made(change, tmp_path: Path):
    folder = save_tiny(tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BolacoError) as caught:
        inspect_structure(meta_model(load_config(str(folder))))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_fails_only_when_it_is_used(tmp_path: Path):
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": {"x": 64}}))
    with pytest.raises(UnsupportedModelError, match="no usable tokenizer"):
        load_tokenizer(str(folder))


def test_a_folder_that_is_not_there_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    """The hub's client retries for minutes where it cannot be reached."""
    asked = []

    def unreachable(url: str, **_: object) -> None:
        asked.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(UnsupportedModelError, match=r"^gone: no such folder here, and the hub cannot be reached"):
            load("gone")
    with pytest.raises(DataError, match=r"^some/gone: no such folder here, and the hub cannot be reached"):
        list(read_documents("some/gone:config"))
    assert len(asked) == 4
    assert asked[0].endswith("/gone/resolve/main/config.json")
    assert "/datasets/some/gone/" in asked[3]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnsupportedModelError, match="from the hub"):
        load_config("gone")
    assert len(asked) == 4


def test_what_the_hub_says_of_a_name_is_left_to_it(monkeypatch: pytest.MonkeyPatch):
    def missing(*_: object, **__: object) -> None:
        raise HFValidationError("no such name")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", missing)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    check_hub("gone", "config.json", UnsupportedModelError)


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


def test_what_cannot_be_saved_is_known_by_those_who_tune_and_compare(tmp_path: Path):
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"output_attentions": True}
    (folder / "config.json").write_text(json.dumps(config))
    text = {"evaluation": str(text_file()), "seq_len": 32}
    sizes = {"calibration.sequences": 4, "evaluation.windows": 2}
    words = text | {"calibration": str(text_file()), "options": sizes}
    with pytest.raises(UnsupportedModelError, match="cannot be saved"):
        api.compare(str(folder), ["asvd"], [0.7], tmp_path / "out", **words)
    with pytest.raises(UnsupportedModelError, match="cannot be saved"):
        api.tune(str(folder), "lora", str(text_file()), tmp_path / "out", **text, max_steps=1, batch=1)
    assert not (tmp_path / "out").exists()


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
    # Work files and what `--json` writes.
    values = {"a": math.inf, "b": [math.nan, found]}
    strict = json.loads(json_text(values), parse_constant=lambda name: pytest.fail(name))
    assert (strict["a"], strict["b"][0], strict["b"][1]["dense"]) == ("Infinity", "NaN", "Infinity")
    artefact = Artefact(tmp_path, "losses", "0")
    artefact.write({"0": [math.inf, 1.0]})
    json.loads(artefact.file.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert artefact.read(dict[str, list[float]]) == {"0": [math.inf, 1.0]}


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


def test_half_a_character_is_no_text_that_fails(tmp_path: Path):
    """JSON can write one, and files cut by the letter have them."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the \ud83d house"}) + "\n", encoding="utf-8")
    assert list(read_documents(str(tmp_path / "a.jsonl"))) == ["the ? house"]


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


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tmp_path: Path) -> Path:
    """A tiny model's folder with a tensor-train adapter on one matrix."""
    model = tiny_llama()
    layer = model.model.layers[0].self_attn.q_proj
    train = TensorTrain((8, 4), (8, 4), 3)
    folder = save_tiny(tmp_path / "adapted", model)
    save_trains(folder, {"model.layers.0.self_attn.q_proj": TrainAdapter(layer, train, 2.0)}, None)
    return folder


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"rank": 10**9}, "rank 1000000000, its first core says 3"),
        ({"rank": "x"}, "rank x, its first core says 3"),
        ({"in": [2**20, 2**20]}, "the adapter is for 1099511627776 to 32"),
        ({"in": [32, 1, 1]}, "damaged, or of another model"),
        ({"out": "x"}, "damaged, or of another model"),
        ({"alpha": None}, "damaged, or of another model"),
    ],
)
def test_an_adapter_that_is_none_is_not_made(change, part, adapted: Path):
    assert isinstance(load_model(str(adapted)).model.layers[0].self_attn.q_proj, TrainAdapter)
    values = json.loads((adapted / "adapter_tt.json").read_text())
    values["matrices"]["model.layers.0.self_attn.q_proj"] |= change
    (adapted / "adapter_tt.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"adapter_tt\.json: damaged") as caught:
        load_model(str(adapted))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [{"r": 10**9}, {"r": "8"}, {"r": 0}, {}, {"r": 8, "rank_pattern": {"q": 10**9}}])
def test_a_rank_of_lora_that_is_none(values, tmp_path: Path):
    pytest.importorskip("peft")
    folder = save_tiny(tmp_path / "adapted")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | values))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: a rank of "):
        load_model(str(folder))
