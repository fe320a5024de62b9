"""The entry `lowrank` of a configuration, and the modelling code that a checkpoint carries for the layers in it."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import bolaco  # noqa: F401 - teaches the auto classes
from bolaco.errors import CheckpointError
from bolaco.layers import CodedLinear, FollowerLinear, LeadLinear, LowRankLinear, PivotedLinear, SketchLinear
from bolaco.models.carried import kinds_in
from bolaco.models.load import load_model
from bolaco.models.lowrank import FORMAT, auto_map, config_class, model_classes
from tests.models import compressed, compressed_once, tiny_llama, tiny_tokenizer, token_blocks
from tests.processes import without_bolaco
from tests.test_checkpoint import MEASURE, config_of, edit_config, logits, must

Entry = dict[str, Any]

# What every carried file has, beside the layers.
COMMON = {"EntryError", "FactoredLinear", "LowRankMixin"}
PIVOTED = {"preset": "default", "search": "spectral", "options": {"refinement.steps": 2}}
# Words of a run -> the layers its checkpoint must carry, whatever they are made of included, and no others.
CARRIED: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "two-factor": ("llama", {}, {"LowRankLinear"}),
    "two-factor, fused": ("phi3", {}, {"LowRankLinear", "SplitLinear"}),
    "pivoted": ("llama", PIVOTED, {"PivotedLinear"}),
    "pivoted, fused": ("gpt2", PIVOTED, {"PivotedLinear", "SplitLinear"}),
    # A lead is a two-factor layer that keeps what it reduced.
    "shared": (
        "llama",
        {"preset": "joint", "search": None, "keep": 0.75},
        {"LeadLinear", "FollowerLinear", "LowRankLinear"},
    ),
}


def code_of(folder: Path) -> ast.Module:
    return ast.parse((folder / "modeling_lowrank.py").read_text(encoding="utf-8"))


def classes_of(folder: Path) -> set[str]:
    """Layers and mixins that a checkpoint carries; its model classes apart."""
    found = {node.name for node in code_of(folder).body if isinstance(node, ast.ClassDef)}
    return {name for name in found if not name.startswith("LowRank") or name in ("LowRankLinear", "LowRankMixin")}


def functions_of(folder: Path) -> set[str]:
    return {node.name for node in code_of(folder).body if isinstance(node, ast.FunctionDef)}


def run_of(name: str) -> Path:
    family, words, _ = CARRIED[name]
    return compressed_once(family, **words).path if words else compressed(family).path


def linear(kind: str, out: int, rank: int, bias: bool = False, **more: Any) -> Entry:
    return {"kind": kind, "out": out, "rank": rank, "bias": bias} | more


# One of each kind, in the shapes of tiny_llama().
EVERY_KIND: dict[str, Entry] = {
    "layers.0.self_attn.q_proj": linear("lead", 32, 6),
    "layers.0.self_attn.k_proj": linear("follower", 16, 6, bias=True, lead="layers.0.self_attn.q_proj"),
    "layers.0.self_attn.v_proj": {"kind": "dense", "out": 16, "bias": True},
    "layers.0.self_attn.o_proj": linear("pivoted", 32, 8, bias=True, side="rows"),
    "layers.0.mlp.gate_proj": linear("two-factor", 48, 8),
    "layers.0.mlp.down_proj": linear("pivoted", 32, 8, side="columns"),
    "layers.1.self_attn.q_proj": {
        "kind": "split",
        "parts": [
            {"name": "a"} | linear("two-factor", 20, 4),
            {"name": "b", "kind": "dense", "out": 12, "bias": False},
        ],
    },
    "layers.1.mlp.up_proj": {"kind": "sketch", "bits": 2, "groups": 2, "layer": linear("two-factor", 48, 8)},
    "layers.1.mlp.down_proj": {"kind": "quantized", "bits": 3, "group": 8, "layer": linear("two-factor", 32, 8)},
}


def made_of(matrices: dict[str, Entry], folder: Path) -> PreTrainedModel:
    """A model of these layers with random weights, saved with a tokenizer."""
    lowrank = {"format": FORMAT, "matrices": matrices}
    values = {"model_type": "lowrank_llama", "auto_map": auto_map("llama"), "lowrank": lowrank}
    config = config_class("llama").from_dict(tiny_llama().config.to_dict() | values)
    model: PreTrainedModel = model_classes("llama")[1](config).eval()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 6)
        for module in model.modules():
            if isinstance(module, PivotedLinear):
                module.order.copy_(torch.randperm(len(module.order), generator=draw))
            if isinstance(module, CodedLinear):
                module.codes.copy_(torch.randint(0, 256, module.codes.shape, generator=draw))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


# --- the tokenizer -----------------------------------------------------------------------------------------------

UNASKED = """
import builtins, sys
from transformers import AutoTokenizer, PreTrainedTokenizerFast

def asked(*words):
    raise SystemExit(f"asked {words}")

builtins.input = asked
folder = sys.argv[1]
with_code, without = (AutoTokenizer.from_pretrained(folder, trust_remote_code=trust) for trust in (True, False))
plain = PreTrainedTokenizerFast.from_pretrained(folder)
found = {tuple(tokenizer("the old river").input_ids) for tokenizer in (with_code, without, plain)}
assert len(found) == 1, found
print(*found.pop())
"""


def test_the_tokenizer_of_a_result_loads_without_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bolaco is not installed with the flag either way, as for the model; where it is imported with none."""
    path = compressed("llama").path
    done = without_bolaco(UNASKED, tmp_path, path)
    assert done.returncode == 0, done.stderr
    expected = tiny_tokenizer()("the old river").input_ids
    assert [int(word) for word in done.stdout.split()] == expected

    def refuse(*_: object) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", refuse)
    assert AutoTokenizer.from_pretrained(path)("the old river").input_ids == expected


# --- the code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CARRIED)
def test_a_checkpoint_carries_the_layers_it_uses(name: str) -> None:
    folder = run_of(name)
    assert classes_of(folder) == COMMON | CARRIED[name][2]
    # Of functions too: a builder of dense matrices only where there is one.
    entries = config_of(folder)["lowrank"]["matrices"].values()
    kinds = {kind for entry in entries for kind in kinds_in(entry)}
    assert ("_dense" in functions_of(folder)) == ("dense" in kinds)
    assert functions_of(folder) >= {"builds", "build_layer", "put_module", "install_layers"}
    assert not {"pack", "unpack", "sketched"} & functions_of(folder)


def test_every_kind_is_carried_where_it_is_used(tmp_path: Path) -> None:
    made_of(EVERY_KIND, tmp_path / "all")
    layers = {"LowRankLinear", "LeadLinear", "FollowerLinear", "PivotedLinear", "SplitLinear", "SketchLinear"}
    assert classes_of(tmp_path / "all") == COMMON | layers | {"CodedLinear", "QuantizedLinear"}
    coded = {"layers.1.mlp.up_proj": EVERY_KIND["layers.1.mlp.up_proj"]}
    made_of(coded, tmp_path / "coded")
    assert classes_of(tmp_path / "coded") == COMMON | {"CodedLinear", "SketchLinear", "LowRankLinear"}
    made_of({}, tmp_path / "none")
    assert classes_of(tmp_path / "none") == COMMON


def test_carried_code_computes_the_same_where_bolaco_cannot_be_imported(tmp_path: Path) -> None:
    """Every kind of layer, and every storage through the whole pipeline; saved again by that code too."""
    made_of(EVERY_KIND, tmp_path / "every-kind")
    folders = [tmp_path / "every-kind", *(run_of(name) for name in CARRIED)]
    code = f"""
{MEASURE}
sys.modules["bolaco"] = None
from transformers import AutoModelForCausalLM
out = Path(sys.argv[2])
trusted = {{"trust_remote_code": True}}
for i, folder in enumerate(map(Path, sys.argv[3:])):
    model = AutoModelForCausalLM.from_pretrained(folder, **trusted)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    measure(model, out / f"{{i}}-logits")
    model.save_pretrained(out / f"{{i}}-again")
    measure(AutoModelForCausalLM.from_pretrained(out / f"{{i}}-again", **trusted), out / f"{{i}}-2")
assert not [name for name in sys.modules if name.startswith("bolaco.")]
"""
    tokens = tmp_path / "tokens"
    save_file({"value": token_blocks(2, 24, seed=5)}, tokens)
    must(without_bolaco(code, tmp_path, tokens, tmp_path, *folders))
    for i, folder in enumerate(folders):
        expected = logits(load_model(str(folder)))
        assert torch.equal(load_file(tmp_path / f"{i}-logits")["value"], expected), folder.name
        assert torch.equal(load_file(tmp_path / f"{i}-2")["value"], expected), folder.name
        # What that code saved is ours to load again.
        assert torch.equal(logits(load_model(str(tmp_path / f"{i}-again"))), expected), folder.name


def test_carried_code_refuses_a_kind_that_it_has_not(tmp_path: Path) -> None:
    """In one line, where bolaco is not installed either."""
    folder = shutil.copytree(run_of("two-factor"), tmp_path / "copy")
    lowrank = config_of(folder)["lowrank"]
    name = next(iter(lowrank["matrices"]))
    lowrank["matrices"][name]["kind"] = "pivoted"
    edit_config(folder, lowrank=lowrank)
    code = """
import sys
sys.modules["bolaco"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
    done = without_bolaco(code, tmp_path, folder)
    assert done.returncode != 0
    said = f"EntryError: config.json: lowrank.matrices: {name}: unknown kind of layer 'pivoted'; known are two-factor"
    assert done.stderr.splitlines()[-1].endswith(said)


# --- the entry of the configuration ------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A compressed folder that a test may damage."""
    return shutil.copytree(run_of("two-factor"), tmp_path / "copied")


def refused(folder: Path) -> str:
    """The one line in which a folder is refused, by whichever way it is loaded."""
    with pytest.raises(CheckpointError) as ours:
        load_model(str(folder))
    with pytest.raises(CheckpointError) as theirs:
        AutoModelForCausalLM.from_pretrained(folder)
    line = str(theirs.value)
    assert str(ours.value) == f"{folder}: {line}"
    assert "\n" not in line
    return line


@pytest.mark.parametrize("kind", ["cubic", None, 3])
@pytest.mark.parametrize("inside", ["alone", "part", "coded"])
def test_an_unknown_kind_is_refused(kind: object, inside: str, copied: Path) -> None:
    lowrank = config_of(copied)["lowrank"]
    name = next(iter(lowrank["matrices"]))
    entry = lowrank["matrices"][name] | {"kind": kind}
    wrapped = {
        "alone": entry,
        "part": {"kind": "split", "parts": [{"name": "q"} | entry]},
        "coded": {"kind": "sketch", "bits": 2, "groups": 1, "layer": entry},
    }
    lowrank["matrices"][name] = wrapped[inside]
    edit_config(copied, lowrank=lowrank)
    line = refused(copied)
    assert line.startswith(f"config.json: {name} is a layer of kind {kind!r}, which no installed package has; ")
    assert "trust_remote_code=True" in line


@pytest.mark.parametrize("known", [3, 0, None, "2", [2]])
def test_an_unknown_format_is_refused(known: object, copied: Path) -> None:
    edit_config(copied, lowrank=config_of(copied)["lowrank"] | {"format": known})
    assert refused(copied).startswith(f"config.json: 'lowrank' is of format {known!r}, known are 1 and 2; ")


@pytest.mark.parametrize(
    "damage",
    [
        {"kind": "split", "parts": [7]},
        {"kind": "split", "parts": 7},
        {"kind": "sketch", "bits": 2, "groups": 1, "layer": 3},
        "two-factor",
        {"out": 3},
        None,
    ],
)
def test_a_damaged_entry_is_refused(damage: object, copied: Path) -> None:
    lowrank = config_of(copied)["lowrank"]
    lowrank["matrices"][next(iter(lowrank["matrices"]))] = damage
    edit_config(copied, lowrank=lowrank)
    assert "config.json" in refused(copied)


# What is changed in the entry of a matrix of 32 columns -> what is said of it.
HALF: dict[str, Any] = {"kind": "dense", "out": 16, "bias": False}
FULL = HALF | {"out": 32}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank of nothing": ({"rank": None}, "rank must be a number from 1 to "),
    "rank of 0": ({"rank": 0}, "rank must be a number from 1 to "),
    "rank of millions": ({"rank": 10**9}, "rank must be a number from 1 to "),
    "rank in words": ({"rank": "eight"}, "rank must be a number from 1 to "),
    "rank that is true": ({"rank": True}, "rank must be a number from 1 to "),
    "fraction": ({"rank": 1.5}, "rank must be a number from 1 to "),
    "no outputs": ({"out": -1}, "out must be a number from 1 to "),
    "other outputs": ({"out": 31}, "has 31 outputs, the matrix in its place has "),
    "outputs for all memory": ({"out": 2**24}, "outputs, the matrix in its place has "),
    "bias": ({"bias": "yes"}, "bias must be true or false, not 'yes'"),
    "side": ({"kind": "pivoted", "side": "left"}, "side must be rows or columns, not 'left'"),
    "no side": ({"kind": "pivoted"}, "side must be rows or columns, not 'None'"),
    "no lead": ({"kind": "follower"}, "lead must be the name of a matrix, not 'None'"),
    "a lead that is not there": ({"kind": "follower", "lead": "layers.7"}, "the model has no 'layers.7'"),
    "a lead that is none": ({"kind": "follower", "lead": "layers.0"}, "cannot share the factor of "),
    "no parts": ({"kind": "split", "parts": []}, "parts must be a list of entries"),
    "parts of one name": ({"kind": "split", "parts": [{"name": "a"} | HALF] * 2}, "a part must have a name of its own"),
    "a part called as a method": ({"kind": "split", "parts": [{"name": "keys"} | FULL]}, "name of its own"),
    "outputs of parts": ({"kind": "split", "parts": [{"name": "a"} | HALF]}, "has 16 outputs"),
    "bits": ({"kind": "sketch", "bits": 9, "groups": 1, "layer": FULL}, "bits must be a number from 1 to 4"),
    "outputs inside": ({"kind": "sketch", "bits": 2, "groups": 1, "layer": HALF}, "has 16 outputs"),
    "experts of a matrix": ({"kind": "experts", "experts": 2, "parts": [{"name": "a"} | HALF]}, "parts must be two"),
    "inputs for all memory": ({"in": 2**30}, "in must be a number from 1 to "),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_entry_that_describes_no_layer_is_refused(what: str, copied: Path) -> None:
    """Before anything of its size is made."""
    change, said = WRONG[what]
    lowrank = config_of(copied)["lowrank"]
    name = next(name for name, entry in lowrank["matrices"].items() if entry["out"] == 32)
    lowrank["matrices"][name] |= change
    edit_config(copied, lowrank=lowrank)
    line = refused(copied)
    assert line.startswith(f"config.json: lowrank.matrices: {name}: ")
    assert said in line
    assert len(line) < 300


@pytest.mark.parametrize("name", ["", "layers", "layers.0", "layers.7.mlp.up_proj", "x"])
def test_an_entry_of_what_is_no_matrix_is_refused(name: str, copied: Path) -> None:
    lowrank = config_of(copied)["lowrank"]
    lowrank["matrices"][name] = next(iter(lowrank["matrices"].values()))
    edit_config(copied, lowrank=lowrank)
    assert refused(copied).startswith(f"config.json: lowrank.matrices: {name}: ")


def test_no_matrices_are_refused(copied: Path) -> None:
    for lowrank in ({"format": 2}, {"format": 2, "matrices": ["layers.0"]}, {"format": 1, "matrices": None}):
        edit_config(copied, lowrank=lowrank)
        assert refused(copied).startswith("config.json: 'lowrank'")


# --- format 1 ----------------------------------------------------------------------------------------------------


# The kinds that there were.
KINDS_OF_FORMAT_1 = {name: entry for name, entry in EVERY_KIND.items() if entry["kind"] != "quantized"}


def in_format_1(entry: Entry) -> Entry:
    """An entry as it was before there were kinds."""
    if entry["kind"] == "split":
        return {"parts": [{"name": part["name"]} | in_format_1(part) for part in entry["parts"]]}
    if entry["kind"] == "sketch":
        return in_format_1(entry["layer"]) | {"bits": entry["bits"], "groups": entry["groups"]}
    old = {"out": entry["out"], "rank": entry.get("rank"), "bias": entry["bias"]}
    match entry["kind"]:
        case "lead":
            return old | {"lead": True}
        case "follower":
            return old | {"shares": entry["lead"]}
        case "pivoted":
            return old | {"side": entry["side"]}
    return old


def downgrade(folder: Path) -> None:
    matrices = config_of(folder)["lowrank"]["matrices"]
    edit_config(folder, lowrank={"format": 1, "matrices": {name: in_format_1(e) for name, e in matrices.items()}})


@pytest.mark.parametrize("name", [*CARRIED, "every kind"])
def test_a_checkpoint_of_format_1_is_the_same_model(name: str, tmp_path: Path) -> None:
    old = tmp_path / "old"
    if name == "every kind":
        made_of(KINDS_OF_FORMAT_1, old)
    else:
        shutil.copytree(run_of(name), old)
    config, expected = config_of(old), logits(load_model(str(old)))
    downgrade(old)
    for model in (load_model(str(old)), AutoModelForCausalLM.from_pretrained(old)):
        assert torch.equal(logits(model), expected)
        assert model.config.lowrank == config["lowrank"]
    # Saved again, it is of today's format.
    model.save_pretrained(tmp_path / "new")
    assert config_of(tmp_path / "new") == config
    assert torch.equal(logits(load_model(str(tmp_path / "new"))), expected)
    assert classes_of(tmp_path / "new") == classes_of(old)


def test_a_configuration_of_format_1_saved_alone(tmp_path: Path) -> None:
    """The code beside it is today's, and so must the configuration be."""
    old = shutil.copytree(run_of("two-factor, fused"), tmp_path / "old")
    today = config_of(old)["lowrank"]
    downgrade(old)
    AutoConfig.from_pretrained(old).save_pretrained(tmp_path / "alone")
    assert config_of(tmp_path / "alone")["lowrank"] == today
    assert classes_of(tmp_path / "alone") == classes_of(old)


def test_layers_of_format_1_by_name(tmp_path: Path) -> None:
    made_of(KINDS_OF_FORMAT_1, tmp_path / "old")
    downgrade(tmp_path / "old")
    base = load_model(str(tmp_path / "old")).base_model
    found = {name: type(base.get_submodule(name)) for name in KINDS_OF_FORMAT_1}
    first = "layers.0.self_attn"
    assert (found[f"{first}.q_proj"], found[f"{first}.k_proj"]) == (LeadLinear, FollowerLinear)
    assert found[f"{first}.o_proj"] is found["layers.0.mlp.down_proj"] is PivotedLinear
    assert found["layers.0.mlp.gate_proj"] is found["layers.1.mlp.up_proj"] is LowRankLinear
    assert type(base.layers[1].mlp.up_proj.reduce) is SketchLinear
