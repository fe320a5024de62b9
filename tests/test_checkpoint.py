"""Compressed folders: every way to load them, what lies in them, saving again, export to the stock architecture."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import bolaco  # noqa: F401 - teaches the auto classes
from bolaco.checkpoint import write
from bolaco.checkpoint.export import export_dense
from bolaco.checkpoint.info import read_info
from bolaco.errors import CheckpointError, OutputExistsError, UnsupportedModelError
from bolaco.evaluation.perplexity import perplexity
from bolaco.layers import LowRankLinear
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model, load_tokenizer
from bolaco.recipe.recipe import load_recipe, make_recipe, read_recipe
from tests.models import (
    FAMILIES,
    QUICK_FAMILIES,
    Compressed,
    build,
    compress_tiny,
    compressed,
    mostly_slow,
    save_tiny,
    slow,
    tiny_llama,
    tiny_tokenizer,
    token_blocks,
)
from tests.processes import environment_of, without_bolaco

families = pytest.mark.parametrize("family", mostly_slow(FAMILIES, *QUICK_FAMILIES))
# Loaded one after the other in one process.
together = pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK_FAMILIES, id="some"),
        slow(tuple(family for family in FAMILIES if family not in QUICK_FAMILIES), id="the others"),
    ],
)
AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_blocks(2, 24, seed=5), use_cache=False).logits


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return values


def edit_config(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | values), encoding="utf-8")


def edit_weights(folder: Path, edit: Any) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def python(code: str, tmp_path: Path, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter, away from the project, with empty caches and without a network."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        **{"cwd": tmp_path, "env": environment_of(tmp_path), "stdin": subprocess.DEVNULL, "timeout": 120},
        capture_output=True,
        text=True,
        check=False,
    )


def must(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Saves the logits of one model on the tokens in argv[1] to the file given.
MEASURE = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
tokens = load_file(sys.argv[1])["value"]
def measure(model, file):
    with torch.no_grad():
        output = model.eval()(input_ids=tokens, use_cache=False)
    value = output.logits if "logits" in output else output.last_hidden_state
    save_file({"value": value.contiguous()}, file)
"""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    save_file({"value": token_blocks(2, 24, seed=5)}, file)
    return file


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """A compressed model of a type that no other test has."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return compress_tiny(build("stablelm", **sizes, **heads), tmp_path_factory.mktemp("odd") / "stablelm")


# --- loading -----------------------------------------------------------------------------------------------------


@together
def test_plain_load_when_the_auto_classes_came_first(names: tuple[str, ...], tokens: Path, tmp_path: Path) -> None:
    """Every family, without trust_remote_code."""
    code = f"""
{MEASURE}
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
import bolaco
for folder in map(Path, sys.argv[3:]):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__.startswith("bolaco."), type(model)
    assert AutoTokenizer.from_pretrained(folder)("the river").input_ids
    measure(model, Path(sys.argv[2]) / folder.name)
"""
    runs = [compressed(family) for family in names]
    must(without_bolaco(code, tmp_path, tokens, tmp_path, *[run.path for run in runs]))
    for run in runs:
        assert torch.equal(load_file(tmp_path / run.path.name)["value"], logits(load_model(str(run.path)))), (
            run.path.name
        )


# What is imported before the models are loaded.
STARTS = {
    "configuration first": """
import bolaco
from transformers import AutoConfig
assert AutoConfig.from_pretrained(folder).lowrank["format"] == 2
""",
    "transformers first": """
import transformers
import bolaco
""",
}


@pytest.mark.parametrize("name", mostly_slow(STARTS, "configuration first"))
def test_plain_load_in_another_order(name: str, tokens: Path, tmp_path: Path) -> None:
    """Each order in a process of its own, where transformers is not imported before."""
    code = f"""
{MEASURE}
folder = sys.argv[2]
assert not [module for module in sys.modules if module.partition(".")[0] in ("bolaco", "transformers")]
{STARTS[name]}
from transformers import AutoModel
measure(AutoModel.from_pretrained(folder), "hidden")
from transformers import AutoModelForCausalLM
measure(AutoModelForCausalLM.from_pretrained(folder), "logits")
"""
    run = compressed("gpt2")
    must(python(code, tmp_path, tokens, run.path))
    model = load_model(str(run.path))
    with torch.no_grad():
        hidden = model.base_model(input_ids=token_blocks(2, 24, seed=5)).last_hidden_state
    assert torch.equal(load_file(tmp_path / "logits")["value"], logits(model))
    assert torch.equal(load_file(tmp_path / "hidden")["value"], hidden)


def test_import_bolaco_costs_no_transformers(tmp_path: Path) -> None:
    code = "import sys, bolaco\nassert not {'torch', 'transformers'} & sys.modules.keys()"
    must(python(code, tmp_path))


@together
def test_remote_code_where_bolaco_is_not_installed(
    names: tuple[str, ...], tokens: Path, odd: Compressed, tmp_path: Path
) -> None:
    """All families by their own code, saved again and loaded again; nothing of bolaco can be imported."""
    code = f"""
{MEASURE}
sys.modules["bolaco"] = None
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
out = Path(sys.argv[2])
trusted = {{"trust_remote_code": True}}
for folder in map(Path, sys.argv[3:]):
    config = AutoConfig.from_pretrained(folder, **trusted)
    assert config.model_type.startswith("lowrank_")
    assert AutoTokenizer.from_pretrained(folder)("the river").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, **trusted)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    measure(model, out / f"{{folder.name}}-logits")
    base = AutoModel.from_pretrained(folder, **trusted)
    assert base.state_dict().keys() == model.base_model.state_dict().keys()
    assert all(torch.equal(v, model.base_model.state_dict()[k]) for k, v in base.state_dict().items())
    model.save_pretrained(out / f"{{folder.name}}-again")
    measure(AutoModelForCausalLM.from_pretrained(out / f"{{folder.name}}-again", **trusted), out / f"{{folder.name}}-2")
assert not [name for name in sys.modules if name.startswith("bolaco.")]
"""
    runs = [*[compressed(family) for family in names], odd]
    # A folder that a user saved again from the registered classes must be as good as ours.
    resaved = tmp_path / "resaved"
    AutoModelForCausalLM.from_pretrained(runs[0].path).save_pretrained(resaved)
    tiny_tokenizer().save_pretrained(resaved)
    must(without_bolaco(code, tmp_path, tokens, tmp_path, *[run.path for run in runs], resaved))
    for folder in [*[run.path for run in runs], resaved]:
        expected = logits(load_model(str(folder)))
        assert torch.equal(load_file(tmp_path / f"{folder.name}-logits")["value"], expected), folder.name
        assert torch.equal(load_file(tmp_path / f"{folder.name}-2")["value"], expected), folder.name
        assert config_of(tmp_path / f"{folder.name}-again")["auto_map"].keys() == set(AUTO)


def test_neither_is_an_error(tmp_path: Path) -> None:
    """Without bolaco and without trust there is no model; nor is a folder that lost its code taken for a Llama."""
    bare = save_tiny(tmp_path / "bare")
    edit_config(bare, model_type="lowrank_llama", architectures=["LowRankLlamaForCausalLM"])
    code = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
for folder in sys.argv[1:]:
    for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
        for words in ({}, {"trust_remote_code": False}):
            try:
                auto.from_pretrained(folder, **words)
            except ValueError as error:
                assert "trust_remote_code" in str(error) or "lowrank_llama" in str(error), error
            else:
                raise SystemExit(f"{auto.__name__} of {folder} with {words}: loaded")
print("none of them")
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""
    done = without_bolaco(code, tmp_path, compressed("llama").path, bare)
    assert done.stdout.count("none of them") == 1, done.stderr[-2000:]
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr.splitlines()[-1]


def test_every_type_loads_once_bolaco_is_imported(odd: Compressed, tmp_path: Path) -> None:
    code = """
import sys, bolaco
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "stablelm" in CONFIG_MAPPING and "lowrank_stablelm" in CONFIG_MAPPING
assert "lowrank_nonsense" not in CONFIG_MAPPING and "nonsense" not in CONFIG_MAPPING
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
"""
    assert must(without_bolaco(code, tmp_path, odd.path)).endswith("LowRankStableLmForCausalLM\n")


def test_missing_lowrank_entry_is_an_error(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bare")
    edit_config(folder, model_type="lowrank_llama")
    with pytest.raises(ValueError, match="'lowrank' entry"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="'lowrank' entry"):
        load_model(str(folder))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A compressed folder that a test may damage."""
    return compress_tiny(tiny_llama(), tmp_path / "copied").path


def test_missing_tensor_is_an_error(copied: Path) -> None:
    edit_weights(copied, lambda state: state.pop("model.layers.1.mlp.up_proj.expand.weight"))
    with pytest.raises(CheckpointError, match=r"1 tensors .* model\.layers\.1\.mlp\.up_proj\.expand\.weight"):
        load_model(str(copied))


def test_tensor_of_another_shape_is_an_error(copied: Path) -> None:
    name = "model.layers.0.mlp.up_proj.reduce.weight"
    edit_weights(copied, lambda state: state.update({name: state[name][:4].clone()}))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_model(str(copied))


def test_truncated_weights_are_an_error(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged weights"):
        load_model(str(copied))


def test_incomplete_stock_folder_is_an_error(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "stock")
    edit_weights(folder, lambda state: state.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_model(str(folder))


# --- what lies in a folder ---------------------------------------------------------------------------------------


@families
def test_configuration(family: str) -> None:
    run = compressed(family)
    config = config_of(run.path)
    model_type = run.original.config.model_type
    assert config["model_type"] == f"lowrank_{model_type}"
    assert config["auto_map"].keys() == set(AUTO)
    assert config["architectures"] == [config["auto_map"]["AutoModelForCausalLM"].removeprefix("modeling_lowrank.")]
    assert config["lowrank"]["format"] == 2
    ours = {"model_type", "auto_map", "architectures", "lowrank", "dtype", "transformers_version"}
    stock = run.original.config.to_dict()
    loaded = AutoConfig.from_pretrained(run.path).to_dict()
    for name in stock.keys() - ours - {"_name_or_path"}:
        assert loaded[name] == stock[name], name


@families
def test_files(family: str) -> None:
    run = compressed(family)
    names = {file.name for file in run.path.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "modeling_lowrank.py"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "bolaco.json", "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle"))]
    generation = GenerationConfig.from_pretrained(run.path)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    tokenizer = AutoTokenizer.from_pretrained(run.path)
    assert tokenizer("the river").input_ids == tiny_tokenizer()("the river").input_ids
    assert tokenizer.special_tokens_map == tiny_tokenizer().special_tokens_map


@families
def test_modelling_code_is_self_contained(family: str) -> None:
    source = (compressed(family).path / "modeling_lowrank.py").read_text(encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported == {"__future__", "collections", "typing", "torch", "transformers"}


def test_generation_settings_are_those_of_the_original(tmp_path: Path) -> None:
    model = tiny_llama()
    model.generation_config = GenerationConfig(eos_token_id=[2, 7], do_sample=True, temperature=0.4, top_p=0.8)
    run = compress_tiny(model, tmp_path / "out")
    loaded = load_model(str(run.path)).generation_config
    assert (loaded.eos_token_id, loaded.do_sample, loaded.temperature, loaded.top_p) == ([2, 7], True, 0.4, 0.8)


@families
def test_tied_embeddings_are_stored_once(family: str) -> None:
    run = compressed(family)
    model = load_model(str(run.path))
    tied = run.original.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    names = load_file(run.path / "model.safetensors").keys()
    embeddings = [name for name in names if "lm_head" in name or "embed_tokens" in name or "wte" in name]
    assert len(embeddings) == (1 if tied else 2)


@families
def test_factors_are_plain_linears(family: str) -> None:
    run = compressed(family)
    model = load_model(str(run.path))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert len(layers) == sum(rank is not None for rank in run.info.ranks.values())
    for name, layer in layers.items():
        children = dict(layer.named_children())
        assert list(children) == ["reduce", "expand"], name
        assert {type(child) for child in children.values()} == {nn.Linear}, name
        assert layer.reduce.bias is None
        assert layer.reduce.out_features == layer.expand.in_features == layer.rank
        assert not list(layer.parameters(recurse=False))


@pytest.mark.parametrize("search", ["hand", "5x1"])
def test_info_has_everything(search: str) -> None:
    run = compressed("gpt2", search=search)
    assert read_info(run.path) == run.info
    info = json.loads((run.path / "bolaco.json").read_text(encoding="utf-8"))
    assert info == {k: v for k, v in run.info.model_dump(mode="json").items() if k != "tuning"}
    model = load_model(str(run.path))
    assert info["parameters"] == sum(p.numel() for p in model.parameters())
    assert info["parameters_dense"] == sum(p.numel() for p in run.original.parameters())
    assert info["bytes"] == (run.path / "model.safetensors").stat().st_size
    assert info["bytes"] >= 4 * info["parameters"]
    assert 0 < info["keep_linears"] <= 0.7
    assert 0 < info["keep_model"] < 1
    assert info["parameters_linears"] < info["parameters_linears_dense"]
    assert list(info["ranks"]) == [site.name for site in inspect_structure(run.original).sites]
    assert info["ranks"].keys() >= {"transformer.h.0.attn.c_attn.q", "transformer.h.1.mlp.c_proj"}
    assert all(rank is None or rank > 0 for rank in info["ranks"].values())
    assert info["seconds"].keys() >= {"load", "factorize", "dense evaluation", "write", "evaluation"}
    assert all(seconds >= 0 for seconds in info["seconds"].values())
    assert make_recipe(info["recipe"]) == read_recipe(info["recipe"]) == run.recipe
    assert info["versions"].keys() >= {"python", "bolaco", "torch", "transformers"}
    assert len(info["trials"]) == (3 if search == "5x1" else 0)
    for trial in info["trials"]:
        assert trial.keys() == {"keep", "ranks", "objective", "perplexity", "kl", "seconds"}
        assert trial["keep"].keys() == trial["ranks"].keys() == {"qk", "o", "up", "down"}
        assert trial["objective"] == pytest.approx(trial["perplexity"] + 1e-3 * trial["kl"])


def test_info_perplexities_are_those_of_the_models() -> None:
    run = compressed("llama")
    blocks = run.texts.evaluation
    stated = run.info.perplexity
    assert stated.dense == pytest.approx(perplexity(run.original, blocks).perplexity, rel=1e-6)
    assert stated.compressed == pytest.approx(perplexity(load_model(str(run.path)), blocks).perplexity, rel=1e-6)
    assert stated.dense != stated.compressed
    assert stated.data == run.recipe.calibration.source
    assert (stated.windows, stated.seq_len, stated.tokens) == (4, 32, 4 * 31)


def test_card_holds_the_recipe(tmp_path: Path) -> None:
    run = compressed("llama", search="5x1")
    card = (run.path / "README.md").read_text(encoding="utf-8")
    match = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert match is not None
    file = tmp_path / "recipe.yaml"
    file.write_text(match[1], encoding="utf-8")
    assert load_recipe(file) == run.recipe
    assert card.startswith("---\n")
    assert f"{run.info.perplexity.compressed:.3f}" in card


# --- saving ------------------------------------------------------------------------------------------------------


def test_sharded_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compressed("llama")
    monkeypatch.setattr(write, "FILE_BYTES", 20_000)
    run = compress_tiny(tiny_llama(), tmp_path / "out")
    shards = list(run.path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert run.info.bytes == sum(shard.stat().st_size for shard in shards)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(run.path)), logits(load_model(str(whole.path))))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_are_as_readable_as_the_umask_says(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        run = compress_tiny(tiny_llama(), tmp_path / "out")
        export_dense(run.path, tmp_path / "dense")
    finally:
        os.umask(before)
    for folder in (run.path, tmp_path / "dense"):
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("dense", [("v",), ("k", "v"), ()])
def test_fused_projections_with_dense_parts(dense: tuple[str, ...], tmp_path: Path) -> None:
    """Dense parts of one fused matrix are views of it, which safetensors does not store without a copy."""
    run = compress_tiny(FAMILIES["phi3"](), tmp_path / "out", options={"search.dense_types": dense})
    model = load_model(str(run.path))
    parts = model.base_model.layers[0].self_attn.qkv_proj.parts
    assert list(parts) == ["q", "k", "v"]
    assert {name for name, part in parts.items() if isinstance(part, nn.Linear)} == set(dense)
    for name, rows in {"k": slice(32, 48), "v": slice(48, 64)}.items():
        if name in dense:
            assert torch.equal(parts[name].weight, run.original.model.layers[0].self_attn.qkv_proj.weight[rows])


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    run = compress_tiny(tiny_llama(attention_bias=True).bfloat16(), tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(run.path / "model.safetensors").values()} == {torch.bfloat16}
    assert config_of(run.path)["dtype"] == run.info.dtype == "bfloat16"
    for model in (load_model(str(run.path)), AutoModelForCausalLM.from_pretrained(run.path)):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert load_model(str(run.path), dtype="float32").dtype == torch.float32
    assert run.info.bytes == pytest.approx(2 * run.info.parameters, rel=0.2)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_saved_again_it_is_the_same_checkpoint(family: str, tmp_path: Path) -> None:
    run = compressed(family)
    first = AutoModelForCausalLM.from_pretrained(run.path)
    first.save_pretrained(tmp_path / "second")
    assert config_of(tmp_path / "second") == config_of(run.path)
    code = (tmp_path / "second" / "modeling_lowrank.py").read_bytes()
    assert code == (run.path / "modeling_lowrank.py").read_bytes()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "second")), logits(first))


def test_base_model_and_configuration_saved_alone(tmp_path: Path) -> None:
    run = compressed("gpt2")
    base = AutoModel.from_pretrained(run.path)
    base.save_pretrained(tmp_path / "base")
    AutoConfig.from_pretrained(run.path).save_pretrained(tmp_path / "config")
    for folder in (tmp_path / "base", tmp_path / "config"):
        assert config_of(folder)["auto_map"] == config_of(run.path)["auto_map"]
        assert (folder / "modeling_lowrank.py").is_file()
    state = AutoModel.from_pretrained(tmp_path / "base").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())


# --- export ------------------------------------------------------------------------------------------------------


def export(run: Compressed, out: Path, **words: Any) -> PreTrainedModel:
    """Exports and loads as any user of transformers would, after checking that it is a stock folder."""
    counts = export_dense(str(run.path), out, **words)
    config = config_of(out)
    assert config["model_type"] == run.original.config.model_type
    assert config["architectures"] == [type(run.original).__name__]
    assert not {"lowrank", "auto_map"} & config.keys()
    assert not list(out.glob("*.py"))
    assert (out / "tokenizer.json").read_bytes() == (run.path / "tokenizer.json").read_bytes()
    assert len(load_tokenizer(str(out))) == len(tiny_tokenizer())
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert type(model) is type(run.original)
    assert counts["parameters_dense"] == sum(p.numel() for p in model.parameters())
    assert counts["parameters"] == run.info.parameters < counts["parameters_dense"]
    return model


EXPORTS = [
    *[(family, "afm") for family in ("llama", "llama_biased", "gpt2", "opt_post_norm")],
    *[(family, "svd-llm") for family in ("llama", "qwen2", "phi3")],
    *[slow(family, "afm") for family in ("granite", "smollm3", "opt")],
    *[slow(family, "svd-llm") for family in ("mistral", "gemma2", "gpt2")],
]


@pytest.mark.parametrize(("family", "method"), EXPORTS)
def test_export_computes_the_same(family: str, method: str, tmp_path: Path) -> None:
    run = compressed(family, method=method)
    exported = export(run, tmp_path / "stock")
    ours = load_model(str(run.path))
    torch.testing.assert_close(logits(exported), logits(ours), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(exported), logits(run.original), atol=0.05)
    assert exported.generation_config.to_dict() == ours.generation_config.to_dict()


def test_export_switches_biases_on_only_where_needed(tmp_path: Path) -> None:
    assert export(compressed("llama"), tmp_path / "afm").config.attention_bias
    plain = export(compressed("llama", method="svd-llm"), tmp_path / "svd").config
    assert not plain.attention_bias
    assert not plain.mlp_bias


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3", "gemma"])
def test_export_refuses_a_bias_without_a_place(family: str, tmp_path: Path) -> None:
    run, out = compressed(family), tmp_path / "stock"
    with pytest.raises(UnsupportedModelError, match=r"layers\.\d+\.\w+\.\w+ and \d+ more.*--drop-bias.*svd-llm"):
        export_dense(str(run.path), out)
    assert not list(tmp_path.iterdir())
    model = export(run, out, drop_bias=True)
    # Only what has no place is dropped.
    places = {"qwen2": {"q", "k", "v"}, "gemma": {"q", "k", "v", "o"}}.get(family, set())
    assert {site.type for site in inspect_structure(model).sites if site.bias} == places
    expected = load_model(str(run.path))
    with torch.no_grad():
        for name, layer in expected.named_modules():
            if isinstance(layer, LowRankLinear) and name.split(".")[-1][0] not in places:
                layer.expand.bias.zero_()
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)


def test_export_of_opt_without_biases(tmp_path: Path) -> None:
    """OPT has one switch for all of its biases."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build("opt", **sizes, word_embed_proj_dim=32, max_position_embeddings=128, enable_bias=False)
    run = compress_tiny(model, tmp_path / "out")
    exported = export(run, tmp_path / "stock")
    assert exported.config.enable_bias
    torch.testing.assert_close(logits(exported), logits(load_model(str(run.path))), rtol=1e-4, atol=1e-4)


def test_export_keeps_bfloat16(tmp_path: Path) -> None:
    run = compress_tiny(tiny_llama().bfloat16(), tmp_path / "out")
    assert export(run, tmp_path / "stock").dtype == torch.bfloat16


def test_export_refuses_a_stock_model_and_an_existing_folder(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "stock")
    with pytest.raises(UnsupportedModelError, match="not a compressed one"):
        export_dense(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputExistsError):
        export_dense(str(compressed("llama").path), folder)
