"""What is written beside a model, as typed records: that of format 1 is read, what is damaged is one line."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from bolaco.checkpoint.info import (
    CompressedInfo,
    TunedInfo,
    read_any_info,
    read_curves,
    read_info,
    write_curves,
    write_info,
)
from bolaco.errors import CheckpointError
from bolaco.recipe.recipe import LowRankRecipe, TransformRecipe, read_recipe
from bolaco.report.card import model_card
from bolaco.report.comparison import comma_separated, markdown
from bolaco.report.html import comparison_page, result_page, tuned_page
from bolaco.report.record import ComparisonRecord, FailedRow, RowResult, read_record, write_record
from tests.command import bolaco, ok
from tests.models import Compressed, compress_tiny, compressed, tiny_deep

V1 = Path(__file__).parent / "golden" / "v1"
FOLDERS = sorted(path.parent for path in V1.glob("*/bolaco.json"))
RESULTS = V1 / "compared" / "results.json"
folders = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def values_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def missing(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """What of nested values is not in others, by dotted name; what the others have beside it does not count."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in old.items():
            if key in new:
                yield from missing(value, new[key], f"{where}.{key}".lstrip("."))
            else:
                yield f"{where}.{key}".lstrip(".")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from missing(a, b, f"{where}.{i}")
    elif old != new:
        yield where


# --- format 1 -----------------------------------------------------------------------------------------------------


def test_there_is_one_of_every_kind() -> None:
    records = [values_of(folder / "bolaco.json") for folder in FOLDERS]
    assert {record["storage"] for record in records} == {"two-factor", "pivoted", "shared", "dense"}
    assert {record["tuning"]["mode"] for record in records if "tuning" in record} == {"factors", "sketch", "tt-lora"}
    assert any(record["trials"] for record in records)
    assert all(record["format"] == record["recipe"]["version"] == 1 for record in records)


@folders
def test_what_a_folder_of_format_1_says_is_kept(folder: Path) -> None:
    info, values = read_any_info(folder), values_of(folder / "bolaco.json")
    assert isinstance(info, CompressedInfo)
    assert list(missing(values, info.model_dump(mode="json"))) == (["storage"] if values["storage"] == "dense" else [])
    assert info.storage == (None if values["storage"] == "dense" else values["storage"])
    assert (info.tuning is not None) == ("tuning" in values)
    recipe = read_recipe(info.recipe)
    assert isinstance(recipe, TransformRecipe if info.storage is None else LowRankRecipe)
    assert (recipe.method.name, recipe.keep, recipe.version) == (info.method, info.keep, 2)
    if (folder / "curves.json").exists():
        curves = read_curves(folder)
        assert curves.model_dump(mode="json", exclude_none=True) == values_of(folder / "curves.json")
        assert info.storage is None or len(curves.matrices) == len(info.ranks)


@folders
def test_a_folder_of_format_1_is_described(folder: Path, tmp_path: Path) -> None:
    info = read_info(folder)
    assert f"{info.perplexity.compressed:.4g}" in result_page(info, read_curves(folder), folder.name)
    assert "version: 2" in result_page(info, read_curves(folder), folder.name)
    assert info.method in model_card(info, folder.name)
    if info.tuning is not None:
        assert info.tuning.mode in tuned_page(info, folder.name)
    assert "perplexity" in ok("inspect", folder).out
    done = ok("inspect", folder, "--html", tmp_path / "page.html")
    assert done.out.endswith(f"report written to {tmp_path / 'page.html'}\n")


def test_a_comparison_of_format_1_is_kept_and_drawn() -> None:
    record, values = read_record(RESULTS), values_of(RESULTS)
    assert record.model_dump(mode="json") == values
    assert all(isinstance(row, RowResult) for row in record.rows)
    assert record.results == record.rows
    for text in (comparison_page(record), markdown(record), comma_separated(record)):
        assert all(row.method in text for row in record.rows)
    assert all(read_recipe(row.recipe).keep == row.keep for row in record.rows)


def test_rows_of_a_comparison_that_failed_or_are_not_finite(tmp_path: Path) -> None:
    """And a row of blocks that were removed, as format 1 had it."""
    values = values_of(RESULTS)
    row = values["rows"][0]
    failed = {key: row[key] for key in ("name", "method", "keep", "recipe", "recipe_yaml")} | {"error": "why"}
    broken = row | {"perplexity": [None], "gap": [None], "peak_bytes": None}
    scores = {"piqa": {"examples": 9, "shots": 0, "acc": 0.5, "acc_stderr": None}}
    values |= {"rows": [failed, broken, row | {"storage": "dense", "ranks": {}, "tasks": scores}]}
    record = read_record(write(tmp_path / "results.json", values))
    one, two, three = record.rows
    assert isinstance(one, FailedRow)
    assert one.error == "why"
    assert isinstance(two, RowResult)
    assert (two.perplexity, two.gap, two.peak_bytes) == ([None], [None], None)
    assert isinstance(three, RowResult)
    assert (three.storage, three.tasks) == (None, scores)
    assert record.results == [two, three]
    assert "failed: why" in markdown(record)
    comparison_page(record)


# --- what is written now ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chopped(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    out = tmp_path_factory.mktemp("chopped") / "out"
    return compress_tiny(tiny_deep("llama", 4), out, preset="chop", search=None)


@pytest.mark.parametrize("kind", ["two-factor", "chop"])
def test_the_keys_are_those_of_format_1(kind: str, chopped: Compressed) -> None:
    run = compressed("llama", search="5x1") if kind == "two-factor" else chopped
    old = values_of(V1 / kind / "bolaco.json")
    new = values_of(run.path / "bolaco.json")
    later = {"allocation", "kept", "walk", "parameters_active", "parameters_active_dense", "tokens_per_expert"}
    later |= {"bytes_dense_here", "dtype_dense", "stacks", "bits", "bits_group"}
    assert new.keys() == old.keys() | later
    for part in ("perplexity", "versions"):
        assert new[part].keys() == old[part].keys()
    if old["trials"]:
        assert new["trials"][0].keys() == old["trials"][0].keys()
    assert new["format"] == 1
    assert new["recipe"]["version"] == 2
    assert (new["storage"] is None) == (kind == "chop")
    curves = [values_of(path / "curves.json") for path in (V1 / kind, run.path)]
    assert curves[0].keys() == curves[1].keys()
    for matrices in (found["matrices"] for found in curves):
        assert {tuple(sorted(matrix)) for matrix in matrices.values()} <= {("shape",), ("energy", "kept", "shape")}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_model_that_broke_is_written_and_read(value: float, chopped: Compressed, tmp_path: Path) -> None:
    ppl = chopped.info.perplexity.model_copy(update={"compressed": value})
    write_info(tmp_path, chopped.info.model_copy(update={"perplexity": ppl}))
    assert str(read_info(tmp_path).perplexity.compressed) == str(value)
    curves = read_curves(chopped.path).model_copy(update={"refinement": {"0": [value]}})
    write_curves(tmp_path, curves)
    assert str(read_curves(tmp_path).refinement) == str({"0": [value]})


def test_what_a_later_version_adds_is_passed_over(tmp_path: Path) -> None:
    values = values_of(V1 / "tuned/bolaco.json")
    more = copy.deepcopy(values)
    for part in (more, more["perplexity"], more["tuning"], more["tuning"]["perplexity"]):
        part["something new"] = {"deep": [1]}
    write(tmp_path / "bolaco.json", more)
    assert read_any_info(tmp_path) == read_any_info(V1 / "tuned")
    record = values_of(RESULTS)
    for part in (record, record["dense"], record["rows"][0]):
        part["something new"] = 1
    assert read_record(write(tmp_path / "results.json", record)) == read_record(RESULTS)


@folders
def test_written_again_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    info = read_any_info(folder)
    write_info(tmp_path, info)
    assert read_any_info(tmp_path) == info
    values = values_of(tmp_path / "bolaco.json")
    assert ("tuning" in values) == (info.tuning is not None)
    assert "earlier" not in values.get("tuning", {})
    write_curves(tmp_path, read_curves(folder))
    assert read_curves(tmp_path) == read_curves(folder)
    if (folder / "curves.json").exists():
        assert (tmp_path / "curves.json").read_bytes() == (folder / "curves.json").read_bytes()
    record = read_record(RESULTS)
    write_record(tmp_path / "results.json", record)
    assert (tmp_path / "results.json").read_bytes() == RESULTS.read_bytes()


def test_a_model_that_was_only_tuned_has_a_record_of_its_own(tmp_path: Path) -> None:
    values = values_of(V1 / "tuned/bolaco.json")
    write(tmp_path / "bolaco.json", {key: values[key] for key in ("format", "model_type", "tuning")})
    info = read_any_info(tmp_path)
    assert type(info) is TunedInfo
    assert info.tuning.mode == "factors"
    with pytest.raises(CheckpointError, match=r"bolaco\.json: of a model that was tuned, not compressed"):
        read_info(tmp_path)


# --- damage -------------------------------------------------------------------------------------------------------

# Dotted name of a field -> what it is damaged to; None: it is not there.
INFO_DAMAGE = {
    "format": "one",
    "model": None,
    "storage": 3,
    "keep": "much",
    "parameters": 1.5,
    "ranks": [1],
    "ranks.model.layers.0.self_attn.q_proj": "eight",
    "layers.1": "last",
    "perplexity.compressed": None,
    "perplexity.tokens": "many",
    "trials": {},
    "trials.0.objective": None,
    "seconds.load": "long",
    "recipe": "chop",
    "versions": None,
    "tuning.curve.0.loss": "low",
    "tuning.perplexity.after": None,
    "tuning.steps": None,
    # Of the right type, and no such number there can be.
    "format ": 2,
    "keep ": -1.0,
    "parameters_dense": 0,
    "parameters_linears_dense": 0,
    "bytes_dense": 0,
    "bytes": -1,
    "parameters ": 10**30,
    "layers.0": -1,
    "layers_dense": 10**9,
    "perplexity.dense": 0.0,
    "perplexity.compressed ": -2.5,
    "ranks.model.layers.0.self_attn.q_proj ": -8,
    "seconds.load ": -1.0,
    "trials.0.keep": {"something else": 0.5},
    "tuning.perplexity.before": 0.0,
    "tuning.bytes": -1,
}
CURVES_DAMAGE = {
    "matrices": None,
    "refinement": None,
    "matrices.model.layers.0.self_attn.q_proj.shape": [1],
    "matrices.model.layers.0.self_attn.q_proj.energy": 0.5,
    "refinement.0.0": "high",
    "format": 7,
    "matrices.model.layers.0.self_attn.q_proj.shape ": [0, 32],
    "matrices.model.layers.0.self_attn.q_proj.energy ": [0.5, math.nan],
    "matrices.model.layers.0.self_attn.q_proj.kept": math.inf,
}
RESULTS_DAMAGE = {
    "format": None,
    "methods": "svd",
    "memory": "all",
    "texts.0.windows": None,
    "dense.perplexity.0": "low",
    "rows": None,
    "seconds.load": "long",
    "format ": 7,
    "keep.0": -1.0,
    "texts.0.tokens": -1,
    "dense.bytes": 10**30,
}


def damaged(values: Any, field: str, value: Any) -> Any:
    """A copy with one field set to ``value``, or without it for None; names of matrices have dots of their own.

    A space behind a field tells two damages of it apart.
    """
    result = copy.deepcopy(values)
    part, rest = result, field.rstrip()
    while True:
        keys = [int(k) for k in [rest.partition(".")[0]] if isinstance(part, list)] or [
            key for key in part if rest == key or rest.startswith(f"{key}.")
        ]
        key = keys[0]
        rest = rest[len(str(key)) + 1 :]
        if not rest:
            break
        part = part[key]
    if value is None:
        del part[key]
    else:
        part[key] = value
    return result


def one_line(call: Any, *words: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*words)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("field", INFO_DAMAGE)
def test_a_damaged_info_names_its_field(field: str, tmp_path: Path) -> None:
    folder = V1 / ("tuned" if field.startswith("tuning") else "two-factor")
    write(tmp_path / "bolaco.json", damaged(values_of(folder / "bolaco.json"), field, INFO_DAMAGE[field]))
    said = one_line(read_info, tmp_path)
    where = {"trials.0.keep": "trials"}.get(field, field.rstrip())
    assert said.startswith(f"{tmp_path / 'bolaco.json'}: damaged ({where}: "), said
    done = bolaco("inspect", tmp_path)
    assert (done.code, done.out) == (1, "")
    assert done.err == f"bolaco: error: {said}\n"


@pytest.mark.parametrize("field", CURVES_DAMAGE)
def test_damaged_curves_name_their_field(field: str, tmp_path: Path) -> None:
    shutil.copy(V1 / "pivoted/bolaco.json", tmp_path)
    values = values_of(V1 / "pivoted/curves.json")
    write(tmp_path / "curves.json", damaged(values, field, CURVES_DAMAGE[field]))
    said = one_line(read_curves, tmp_path)
    assert re.match(rf"{tmp_path}/curves\.json: damaged \({re.escape(field.rstrip())}(\.1|\.0)?: ", said), said
    done = bolaco("inspect", tmp_path, "--html", tmp_path / "page.html")
    assert done.code == 1
    assert done.err == f"bolaco: error: {said}\n"
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("field", RESULTS_DAMAGE)
def test_damaged_results_name_their_field(field: str, tmp_path: Path) -> None:
    path = write(tmp_path / "results.json", damaged(values_of(RESULTS), field, RESULTS_DAMAGE[field]))
    assert one_line(read_record, path).startswith(f"{path}: damaged ({field.rstrip()}: ")


@pytest.mark.parametrize("field", ["parameters", "gap", "recipe", "curves", "name", "storage"])
def test_a_damaged_row_names_its_field(field: str, tmp_path: Path) -> None:
    path = write(tmp_path / "results.json", damaged(values_of(RESULTS), f"rows.1.{field}", None))
    assert re.match(rf"{path}: damaged \(rows\.1\.(RowResult\.)?{field}: Field required", one_line(read_record, path))


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "null", '"text"', "\xff", "[" * 10**5])
@pytest.mark.parametrize("name", ["bolaco.json", "curves.json", "results.json"])
def test_a_file_that_is_something_else_is_one_line(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    call, given = {
        "bolaco.json": (read_any_info, tmp_path),
        "curves.json": (read_curves, tmp_path),
        "results.json": (read_record, path),
    }[name]
    assert one_line(call, given).startswith(f"{path}: damaged (")


@pytest.mark.parametrize("name", ["", "x", "model.layers.x.q_proj", "model.layers.2.q_proj", "a.²", "a.99999999999999"])
def test_a_matrix_that_is_in_no_block(name: str, tmp_path: Path) -> None:
    """Tables and charts have a place for each block."""
    values = values_of(V1 / "pivoted/bolaco.json")
    values["ranks"][name] = 8
    said = one_line(read_info, write(tmp_path / "bolaco.json", values).parent)
    assert "bolaco.json: damaged (ranks: " in said
    assert "names no matrix of 2 decoder blocks" in said


def test_curves_that_cannot_be_drawn_over_each_other(tmp_path: Path) -> None:
    values = values_of(V1 / "pivoted/curves.json")
    next(iter(values["matrices"].values()))["energy"].pop()
    write(tmp_path / "curves.json", values)
    assert "points of its energy, others have 32" in one_line(read_curves, tmp_path)
    for layer in ("x", "-1", "1.5", "9" * 30):
        write(tmp_path / "curves.json", {"matrices": {}, "refinement": {layer: [1.0]}})
        assert "curves.json: damaged (refinement: " in one_line(read_curves, tmp_path)


@pytest.mark.parametrize("part", ["dense.perplexity", "rows.0.perplexity", "rows.0.gap"])
def test_as_many_numbers_as_texts(part: str, tmp_path: Path) -> None:
    values = values_of(RESULTS)
    path = write(tmp_path / "results.json", damaged(values, part, [1.0, 2.0]))
    assert "of 2 texts, there are 1)" in one_line(read_record, path)
    scores = {"piqa": {"acc": 0.5}}
    path = write(tmp_path / "results.json", damaged(values, "dense.tasks", scores) | {"task_keep": 0.8})
    assert "dense.tasks.piqa: has no number of examples" in one_line(read_record, path)
    values = damaged(values, "dense.tasks", {"piqa": {"acc": 0.5, "examples": 3}}) | {"task_keep": None}
    assert "task_keep does not say" in one_line(read_record, write(path, values))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"format": ' + "[" * 60 + "]" * 60 + "}", "nested too deeply (more than 50 levels)"),
        ('{"format": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"format": 1, "model": "\\ud800"}', "half a character"),
        ('{"format": 1, "\\udfff": 1}', "half a character"),
    ],
)
def test_json_that_nothing_else_could_take(content: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "bolaco.json").write_text(content, encoding="utf-8")
    assert part in one_line(read_any_info, tmp_path)


def test_a_recipe_that_is_none_names_its_file(tmp_path: Path) -> None:
    values = values_of(V1 / "pivoted/bolaco.json")
    values["recipe"]["keep"] = "much"
    write(tmp_path / "bolaco.json", values)
    ok("inspect", tmp_path)
    done = bolaco("inspect", tmp_path, "--html", tmp_path / "page.html")
    assert done.err.startswith("bolaco: error: bolaco.json: recipe: keep: Input should be a valid number")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0, 0.0, 1e308, 1e-320])
def test_numbers_at_the_ends_are_drawn(value: float, tmp_path: Path) -> None:
    """What can be written can be shown: losses and objectives of a model that broke."""
    values = values_of(V1 / "two-factor/bolaco.json")
    values["trials"][0] |= {"objective": value, "perplexity": value, "kl": value}
    info = CompressedInfo.model_validate(values)
    curves = read_curves(V1 / "pivoted")
    for losses in ([value, 1.0], [1.0, value], [value, value]):
        result_page(info, curves.model_copy(update={"refinement": {"0": losses, "1": [1.0, 0.5]}}), "x")
    tuned = values_of(V1 / "tuned/bolaco.json")
    tuned["tuning"]["curve"][0]["loss"] = value
    tuned_page(CompressedInfo.model_validate(tuned), "x")


def test_records_do_not_change() -> None:
    found: list[BaseModel] = [read_info(V1 / "tuned"), read_curves(V1 / "pivoted"), read_record(RESULTS)]
    for record in found:
        with pytest.raises(ValueError, match="frozen"):
            setattr(record, "format", 2)  # noqa: B010 - mypy knows that it cannot be set
    assert isinstance(found[2], ComparisonRecord)


def test_a_result_without_its_files(tmp_path: Path) -> None:
    assert "no bolaco.json in it" in one_line(read_any_info, tmp_path)
    assert one_line(read_record, tmp_path / "results.json").endswith("cannot be read (No such file or directory)")
    assert read_curves(tmp_path).matrices == {}
