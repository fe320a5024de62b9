"""How small a result is to be: keep ratios, shares of all parameters and bytes; and sizes that are true on disk."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bolaco
from bolaco import api
from bolaco.allocate.allocator import ALLOCATORS
from bolaco.checkpoint.info import weight_bytes
from bolaco.errors import BudgetError, RecipeError
from bolaco.models.find import inspect_structure, meta_model
from bolaco.models.structure import parameter_limit
from bolaco.models.weights import StoredWeights, result_dtype, stored_weights
from bolaco.recipe.recipe import make_recipe, read_recipe
from bolaco.report.card import model_card
from bolaco.report.record import read_record
from bolaco.report.tables import size_notes, summary_rows, summary_table
from bolaco.runs import session
from bolaco.runs.dry_run import described
from bolaco.runs.size import Shapes, settled
from tests.models import FAMILIES, save_tiny, text_file, tiny_deep, tiny_llama, tiny_recipe, tiny_tokenizer
from tests.types import of_type

LEAST = {"model": "some/model"}


def shapes_of(model: Any, dtype: torch.dtype = torch.float32) -> Shapes:
    return Shapes(model, inspect_structure(model), dtype)


def run(out: Path, model: Any = None, **values: Any) -> api.Result:
    recipe = tiny_recipe(keep=None, **values)
    return api.run(recipe, out, model=model_for(values) if model is None else model, tokenizer=tiny_tokenizer())


def model_for(values: dict[str, Any]) -> Any:
    """Of blocks that can be removed there must be more than two."""
    return tiny_deep("llama", 5) if values.get("preset") == "chop" else tiny_llama()


# --- recipes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [{}, {"keep": 0.8, "keep_model": 0.8}, {"keep": 0.8, "target_size": 5}, {"keep_model": 1, "target_size": 5}],
)
@pytest.mark.parametrize("method", ["kfac", "chop"])
def test_exactly_one_size_is_asked_for(sizes: dict[str, Any], method: str) -> None:
    with pytest.raises(RecipeError, match="exactly one of keep, keep_model, target_size"):
        make_recipe(LEAST | sizes | {"method": method})


@pytest.mark.parametrize(
    ("given", "bytes_"), [("300MB", 300 * 10**6), ("1.5 GiB", 3 * 2**29), ("2kB", 2000), (4096, 4096), ("77", 77)]
)
def test_a_target_size_has_a_unit(given: Any, bytes_: int) -> None:
    recipe = make_recipe(LEAST | {"target_size": given})
    assert recipe.target_size == bytes_
    assert recipe.model_dump(mode="json")["target_size"] == bytes_
    assert "keep" not in recipe.model_dump(mode="json")
    assert read_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("given", ["", "many", "-3MB", 0, "300 MegaBlocks", -1, True])
def test_what_is_no_size_is_refused(given: Any) -> None:
    with pytest.raises(RecipeError, match=r"^target_size: "):
        make_recipe(LEAST | {"target_size": given})


# --- settled keep ratios ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("share", [0.5, 0.77, 0.8, 0.999, 1])
def test_a_share_of_all_parameters_allows_exactly_that(family: str, share: float) -> None:
    shapes = shapes_of(FAMILIES[family]())
    recipe = settled(make_recipe(LEAST | {"keep_model": share, "method": "svd"}), shapes)
    wanted = parameter_limit(share, shapes.parameters) - (shapes.parameters - shapes.linears)
    assert parameter_limit(recipe.share, shapes.linears) == min(max(wanted, 1), shapes.linears)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_files(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tied tensors once; the header of the file is bounded from above, and not by much."""
    model = FAMILIES[family]()
    shapes = shapes_of(model, dtype)
    model.to(dtype).save_pretrained(tmp_path)
    found = weight_bytes(tmp_path)
    assert shapes.bytes_at(shapes.linears) < found <= shapes.bytes_at(shapes.linears) + shapes.header
    assert shapes.bytes_at(shapes.linears - 10) == shapes.bytes_at(shapes.linears) - 10 * dtype.itemsize


def test_a_model_without_memory_has_the_same_sizes() -> None:
    model = tiny_llama()
    here, there = shapes_of(model, torch.bfloat16), shapes_of(meta_model(model.config), torch.bfloat16)
    assert here.bytes_at(5000) == there.bytes_at(5000)
    assert (here.linears, here.parameters, here.header) == (there.linears, there.parameters, there.header)


# --- runs ---------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    **{name: {"search": name} for name in ALLOCATORS.built_in},
    "default": {"preset": "default", "search": None},
    "joint": {"preset": "joint", "search": None},
    "chop": {"preset": "chop", "search": None},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_result_has_at_most_the_target_size(way: str, tmp_path: Path) -> None:
    dense = shapes_of(model_for(WAYS[way]))
    target = dense.bytes_at(dense.linears * 8 // 10)
    result = run(tmp_path / "out", target_size=target, trials=2, **WAYS[way])
    assert 0.75 * target < result.info.bytes <= target
    assert result.info.bytes == weight_bytes(result.path)
    assert result.info.recipe["target_size"] == target
    assert "keep" not in result.info.recipe
    assert result.info.keep_linears <= result.info.keep < 1
    for text in (model_card(result.info, "out"), (result.path / "report.html").read_text(), title(result)):
        assert f"(keep {result.info.keep:g})" in text


def title(result: api.Result) -> str:
    return str(summary_table(result.info).title)


@pytest.mark.parametrize("way", ["spectral", "uniform", "default", "joint", "chop"])
def test_a_share_of_all_parameters_is_kept(way: str, tmp_path: Path) -> None:
    result = run(tmp_path / "out", keep_model=0.85, **WAYS[way])
    assert 0.7 < result.info.keep_model <= 0.85
    assert "keep 0.85 of all parameters" in title(result)


def test_the_same_budget_is_the_same_result(tmp_path: Path) -> None:
    by_share = run(tmp_path / "a", keep_model=0.85, search="spectral", method="svd")
    again = api.run(
        tiny_recipe(keep=by_share.info.keep, search="spectral", method="svd"),
        tmp_path / "b",
        model=tiny_llama(),
        tokenizer=tiny_tokenizer(),
    )
    assert again.info.ranks == by_share.info.ranks


@pytest.mark.parametrize("way", ["spectral", "uniform", "hand", "welore", "default", "joint", "chop"])
@pytest.mark.parametrize("sizes", [{"target_size": 1000}, {"keep_model": 0.01}])
def test_too_small_is_refused_with_the_smallest_there_is(way: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Before anything is computed; what is named is possible, and a little less is not."""
    values = WAYS[way] | ({"options": {"search.min_keep": 0.01}} if way in ("uniform", "hand") else {})
    with pytest.raises(BudgetError, match="too small, the smallest possible is") as caught:
        run(tmp_path / "out", **values, **sizes)
    words = str(caught.value).partition("smallest possible is ")[2].split()
    assert not any(tmp_path.iterdir())
    name, smallest = ("target_size", int(words[0])) if "target_size" in sizes else ("keep_model", float(words[0]))
    less: Any = smallest - 200 if name == "target_size" else smallest - 0.005
    with pytest.raises(BudgetError, match="too small"):
        run(tmp_path / "out", **values, **{name: less})
    result = run(tmp_path / "out", **values, **{name: smallest})
    assert result.info.bytes <= smallest if name == "target_size" else result.info.keep_model <= smallest


def test_a_dry_run_says_bytes_and_refuses_as_the_run_does(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    values = {"calibration": str(text_file()), "preset": "default", "search": None}
    base = tiny_recipe(keep=None, target_size="55kB", **values).model_dump(mode="json")
    lines = [part for part in described(make_recipe(base | {"model": str(folder)})) if isinstance(part, str)]
    assert any(line.startswith("whole model: ") and line.endswith(" MiB in float32") for line in lines)
    assert any(f"{weight_bytes(folder) / 2**20:,.1f} MiB on disk (float32)" in line for line in lines)
    with pytest.raises(BudgetError, match=r"target size 5\.0KB: too small, the smallest possible is"):
        list(described(make_recipe(base | {"model": str(folder), "target_size": 5000})))


# --- number formats -----------------------------------------------------------------------------------------------


def write_gguf(file: Path, kind: gguf.GGMLQuantizationType) -> Path:
    writer = gguf.GGUFWriter(file, "llama")
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    raw = gguf.quants.quantize(weights, kind)
    writer.add_tensor("large", raw, raw_dtype=kind)
    writer.add_tensor("small", weights[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("kind", "name", "quantized", "result"),
    [
        ("Q4_1", "Q4_1", True, torch.bfloat16),
        ("Q8_0", "Q8_0", True, torch.bfloat16),
        ("F16", "float16", False, torch.float16),
        ("F32", "float32", False, torch.float32),
    ],
)
def test_weights_of_a_gguf_file(tmp_path: Path, kind: str, name: str, quantized: bool, result: torch.dtype) -> None:
    file = write_gguf(tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    stored = stored_weights(str(file))
    assert stored == StoredWeights(file.stat().st_size, name, gguf=True)
    assert stored.quantized == quantized
    assert result_dtype("auto", stored, torch.float32) == result
    assert result_dtype("float16", stored, torch.float32) == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_a_folder(tmp_path: Path, dtype: torch.dtype) -> None:
    save_tiny(tmp_path / "whole", tiny_llama().to(dtype))
    tiny_llama().to(dtype).save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    name = str(dtype).removeprefix("torch.")
    for folder in (tmp_path / "whole", tmp_path / "shards"):
        (folder / "other.safetensors").write_bytes(b"not of the model")
        files = [file for file in folder.glob("model*.safetensors")]
        assert stored_weights(str(folder)) == StoredWeights(sum(file.stat().st_size for file in files), name)
    assert len(list((tmp_path / "shards").glob("model*.safetensors"))) > 1
    torch.save(tiny_llama().state_dict(), tmp_path / "shards" / "pytorch_model.bin")
    for file in (tmp_path / "shards").glob("model*"):
        file.unlink()
    size = (tmp_path / "shards" / "pytorch_model.bin").stat().st_size
    assert stored_weights(str(tmp_path / "shards")) == StoredWeights(size, "")


def test_a_damaged_header_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for content in (b"", b"\xff" * 20, b"\x02" + bytes(7) + b"[]", b"\x0a" + bytes(7) + b'{"a": {}} '):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert stored_weights(str(tmp_path)) == StoredWeights(len(content), "")


def saved_formats(folder: Path) -> set[str]:
    """Number formats in a file but that of indices."""
    tensors = load_file(folder / "model.safetensors").values()
    return {str(tensor.dtype).removeprefix("torch.") for tensor in tensors} - {"int32"}


@pytest.mark.parametrize(
    ("way", "family"),
    [("default", "llama"), ("joint", "llama"), ("chop", "llama"), ("default", "gpt2"), ("chop", "gpt2")],
)
def test_the_result_is_in_the_number_format_asked_for(way: str, family: str, tmp_path: Path) -> None:
    """A model in memory keeps its own; the result loads in the one asked for, with tied tensors tied."""
    model = tiny_deep(family, 5) if way == "chop" else FAMILIES[family]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = tiny_recipe(keep=0.8, dtype="bfloat16", **WAYS[way])
    result = api.run(recipe, tmp_path / "out", model=model, tokenizer=tiny_tokenizer())
    assert saved_formats(result.path) == {"bfloat16"}
    assert result.info.dtype == "bfloat16"
    assert result.load().dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    whole = api.run(tiny_recipe(keep=0.8, **WAYS[way]), tmp_path / "whole", model=model, tokenizer=tiny_tokenizer())
    assert saved_formats(whole.path) == {"float32"}
    assert whole.info.ranks == result.info.ranks
    assert result.info.bytes < 0.7 * whole.info.bytes
    assert abs(result.info.perplexity.compressed / whole.info.perplexity.compressed - 1) < 0.02


def test_a_quantized_source_is_compared_with_what_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result is in bfloat16, and both of its sizes are said."""
    folder = save_tiny(tmp_path / "model")
    found = StoredWeights(20_000, "Q4_1", gguf=True)
    monkeypatch.setattr(session, "stored_weights", lambda name: found)
    loaded: list[str] = []
    real = session.load_model
    monkeypatch.setattr(
        session, "load_model", lambda name, dtype, *more: (loaded.append(dtype), real(name, "auto", *more))[1]
    )
    recipe = tiny_recipe(keep=0.8, preset="default", search=None).model_copy(update={"model": str(folder)})
    info = api.run(recipe, tmp_path / "out").info
    assert loaded == ["auto"]
    assert saved_formats(tmp_path / "out") == {"bfloat16"}
    assert (info.bytes_dense, info.dtype_dense, info.dtype) == (20_000, "Q4_1", "bfloat16")
    assert info.bytes_dense_here == shapes_of(tiny_llama(), torch.bfloat16).bytes_at(15_360)
    labels = [row[0] for row in summary_rows(info)]
    assert labels[-2:] == ["weights in bfloat16", "weights on disk, Q4_1 and bfloat16"]
    (note,) = size_notes(info)
    assert "more bytes" in note
    for text in (model_card(info, "out"), (tmp_path / "out" / "report.html").read_text()):
        assert note in text
        assert "weights on disk, Q4_1 and bfloat16" in text
    assert size_notes(info.model_copy(update={"bytes_dense": 10**9})) == []


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mamba"])
def test_other_structures_keep_to_a_target_size(model_type: str, tmp_path: Path) -> None:
    model = of_type(model_type)
    shapes = shapes_of(model)
    target = shapes.bytes_at(shapes.linears * 85 // 100)
    values = {"preset": "default", "search": None, "options": {"search.rank_multiple": 4, "refinement.steps": 0}}
    assert run(tmp_path / "out", model, target_size=target, **values).info.bytes <= target


# --- comparisons --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "label", "words"),
    [
        ({"target_size": ["75kB", 70_000]}, "target size", ["target size 75.0KB", "target size 70.0KB"]),
        ({"keep_model": [0.9, 0.8]}, "keep of all", ["keep 0.9 of all parameters", "keep 0.8 of all parameters"]),
    ],
)
def test_methods_are_compared_at_one_size(sizes: dict[str, Any], label: str, words: list[str], tmp_path: Path) -> None:
    """Of files, or of all parameters: each method with the keep ratio that this comes to in its storage."""
    options = {"calibration.sequences": 8, "evaluation.windows": 4, "search.rank_multiple": 4, "refinement.steps": 0}
    result = bolaco.compare(
        tiny_llama(),
        ["svd", "default"],
        out=tmp_path / "out",
        **sizes,
        calibration=str(text_file()),
        tokenizer=tiny_tokenizer(),
        seq_len=32,
        options=options,
    )
    assert not result.failed
    ((size, asked),) = sizes.items()
    numbers = [75_000.0, 70_000.0] if size == "target_size" else asked
    assert [row.keep for row in result.record.rows] == [value for value in numbers for _ in range(2)]
    for row in result.record.results:
        assert 0.8 * row.keep < (row.bytes if size == "target_size" else row.keep_model) <= row.keep
        assert row.recipe[size] == row.keep
        assert "keep" not in row.recipe
    assert read_record(result.path / "results.json") == result.record
    table, page = (result.path / "table.md").read_text(), (result.path / "report.html").read_text()
    assert table.startswith("# ")
    assert f"| method | {label} |" in table
    assert all(text in page for text in words)
    rows = list(csv.DictReader((result.path / "table.csv").open()))
    rows = [row for row in rows if not row["method"].startswith("dense")]
    assert [float(row[f"asked_{size}"]) for row in rows] == [row.keep for row in result.record.rows]
    assert [float(row["keep_model"]) for row in rows] == [row.keep_model for row in result.record.results]


def test_all_texts_are_measured_in_the_arithmetic_of_the_original(tmp_path: Path) -> None:
    """A result in bfloat16 of a model in float32: the same text twice has the same perplexity, to the last digit."""
    copy = tmp_path / "copy.txt"
    copy.write_text(text_file().read_text(encoding="utf-8"), encoding="utf-8")
    result = bolaco.compare(
        tiny_llama(),
        ["svd"],
        [0.8],
        tmp_path / "out",
        evaluation=[str(text_file()), str(copy)],
        tokenizer=tiny_tokenizer(),
        seq_len=32,
        dtype="bfloat16",
        options={"evaluation.windows": 4, "search.rank_multiple": 4},
    )
    (row,) = result.record.results
    assert row.perplexity[0] == row.perplexity[1]
    assert result.record.dtype == "bfloat16"
    assert "the results are in bfloat16" in (result.path / "table.md").read_text()


def test_a_comparison_has_one_kind_of_size(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"exactly one of keep, .* is needed; keep and target_size are"):
        bolaco.compare("model", ["svd"], [0.8], tmp_path / "out", target_size=[5])
    with pytest.raises(RecipeError, match="at least one method and one keep ratio"):
        bolaco.compare("model", ["svd"], out=tmp_path / "out")
    with pytest.raises(RecipeError, match=r"^target_size: .*\(got 'large'\)"):
        bolaco.compare("model", ["svd"], out=tmp_path / "out", target_size=["large"])
    with pytest.raises(RecipeError, match="keep_model: "):
        bolaco.compare("model", ["svd"], out=tmp_path / "out", keep_model=[1.5])
    with pytest.raises(RecipeError, match="compare\\(\\) writes a folder"):
        bolaco.compare("model", ["svd"], [0.8])
