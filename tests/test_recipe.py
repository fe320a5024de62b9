"""Recipes: what they accept, what they say otherwise, and that they survive YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bolaco.errors import BolacoError, RecipeError
from bolaco.recipe import PAPER, PRESETS, differing_fields, load_recipe, make_recipe, merge, recipe_values

MODEST = settings(max_examples=60, deadline=None, derandomize=True)
LEAST = {"model": "some/model", "keep": 0.8}


def nested(name: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` from ``a.b``."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("calibrations", {}),
        ("calibration.sequence", 3),
        ("search.kl", 1),
        ("keeps", 0.5),
        ("search.trials", "many"),
        ("search.trials", 10.5),
        ("search.trials", True),
        ("search.trials", 0),
        ("search.initial", -1),
        ("search.space", "6x1"),
        ("search.fill", "perhaps"),
        ("search.min_keep", 0),
        ("search.min_keep", 1.0),
        ("search.slack", -0.1),
        ("search.slack", 1),
        ("search.rank_multiple", 0),
        ("search.dense_types", "v"),
        ("search.kl_weight", -1e-3),
        ("search.kl_weight", float("inf")),
        ("search.surrogate", "forest"),
        ("search.objective", "kl"),
        ("search", "5x1"),
        ("search", None),
        ("calibration.source", 7),
        ("calibration.source", ""),
        ("calibration.sequences", 0),
        ("calibration.seq_len", 1),
        ("calibration.groups", 0),
        ("calibration.batch", [4]),
        ("calibration.cache", "tape"),
        ("validation.allocations", -1),
        ("validation.seq_len", 0),
        ("evaluation.windows", 0),
        ("factorization.method", 3),
        ("factorization.method", None),
        ("keep", 0),
        ("keep", -0.5),
        ("keep", 1.01),
        ("keep", float("nan")),
        ("keep", "most"),
        ("keep", True),
        ("seed", "dice"),
        ("dtype", "float8"),
        ("bos", "always"),
        ("version", 2),
        ("model", ""),
        ("model", None),
    ],
)
def test_a_bad_value_is_refused_by_its_dotted_name(name: str, value: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(merge(LEAST, nested(name, value)))
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    assert isinstance(caught.value, BolacoError)


def test_the_value_given_is_quoted() -> None:
    with pytest.raises(RecipeError, match=r"search\.trials: .*integer.*\(got 'many'\)"):
        make_recipe(merge(LEAST, nested("search.trials", "many")))
    with pytest.raises(RecipeError, match=r"search\.dense_types\.1: .*\(got 3\)"):
        make_recipe(merge(LEAST, nested("search.dense_types", ["v", 3])))


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({"keep": 2, "search": {"trials": 0, "nothing": 1}})
    for name in ("model: Field required", "keep: ", "search.trials: ", "search.nothing: "):
        assert name in str(caught.value)


def test_fields_are_checked_against_each_other() -> None:
    with pytest.raises(RecipeError, match=r"^validation: candidates \(3\) must be at least sequences \(9\)$"):
        make_recipe(merge(LEAST, {"validation": {"sequences": 9, "candidates": 3}}))


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"unknown preset 'papr'; there is default, paper"):
        make_recipe(LEAST, "papr")


def test_a_recipe_does_not_change() -> None:
    recipe = make_recipe(LEAST)
    with pytest.raises(ValidationError):
        recipe.keep = 0.5  # type: ignore[misc]


# --- presets


def test_the_paper_preset_is_the_paper() -> None:
    recipe = make_recipe(LEAST, "paper")
    wanted = {
        "factorization.method": "afm",
        "factorization.storage": "two-factor",
        "calibration.source": "allenai/c4",
        "calibration.sequences": 1024,
        "calibration.seq_len": 4096,
        "calibration.groups": 32,
        "validation.source": "wikimedia/wikipedia:20231101.en",
        "validation.sequences": 100,
        "validation.seq_len": 4096,
        "validation.allocations": 20,
        "search.space": "5x1",
        "search.trials": 50,
        "search.initial": 0,
        "search.min_keep": 0.2,
        "search.slack": 0.1,
        "search.rank_multiple": 8,
        "search.objective": "ppl+kl",
        "search.kl_weight": 1e-3,
        "search.surrogate": "paper",
        "search.fill": False,
        "evaluation.source": "Salesforce/wikitext:wikitext-2-raw-v1:test",
        "evaluation.seq_len": 4096,
        "evaluation.windows": None,
    }
    dumped = recipe.model_dump()
    for name, value in wanted.items():
        section, field = name.split(".")
        assert dumped[section][field] == value, name
    assert recipe.dense_types == ("v",)
    # 32 groups of 32 sequences.
    assert recipe.calibration.sequences == recipe.calibration.groups * 32
    assert recipe.validation.candidates > recipe.validation.sequences


def test_a_preset_gives_way_to_values_and_is_left_as_it_was() -> None:
    before = yaml.safe_dump(PRESETS["paper"] | {"search": {**PAPER["search"], "dense_types": ["v"]}})
    recipe = make_recipe(merge(LEAST, {"search": {"trials": 7}, "calibration": {"source": "a.txt"}}), "paper")
    assert (recipe.search.trials, recipe.search.surrogate) == (7, "paper")
    assert (recipe.calibration.source, recipe.calibration.sequences) == ("a.txt", 1024)
    assert yaml.safe_dump(PRESETS["paper"] | {"search": {**PAPER["search"], "dense_types": ["v"]}}) == before


def test_the_default_preset_is_the_defaults() -> None:
    assert make_recipe(LEAST, "default") == make_recipe(LEAST)
    assert make_recipe(LEAST).search.initial == 5


# --- YAML


@pytest.mark.parametrize("preset", PRESETS)
def test_yaml_gives_the_recipe_back(tmp_path: Path, preset: str) -> None:
    recipe = make_recipe(merge(LEAST, {"search": {"dense_types": ["v", "o"], "kl_weight": 1e-5}}), preset)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    assert load_recipe(str(path)) == recipe
    assert load_recipe(path).to_yaml() == recipe.to_yaml()


@MODEST
@given(
    model=st.one_of(st.text(min_size=1), st.sampled_from(["null", "1.0", "yes", "2024-01-01", "a: b", "ü # x", " "])),
    keep=st.floats(0, 1, exclude_min=True),
    kl_weight=st.floats(0, 1e300),
    seed=st.integers(),
    windows=st.one_of(st.none(), st.integers(1, 10**9)),
)
def test_any_value_survives_yaml(
    tmp_path_factory: Any, model: str, keep: float, kl_weight: float, seed: int, windows: int | None
) -> None:
    values = {"keep": keep, "seed": seed, "search": {"kl_weight": kl_weight}, "evaluation": {"windows": windows}}
    recipe = make_recipe({"model": model} | values)
    path = tmp_path_factory.mktemp("yaml") / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_a_recipe_file_may_name_a_preset_and_write_numbers_as_people_do(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("preset: paper\nmodel: m\nkeep: 0.7\nsearch: {trials: 3, kl_weight: 1e-4}\n")
    recipe = load_recipe(path)
    assert (recipe.keep, recipe.search.trials, recipe.search.surrogate) == (0.7, 3, "paper")
    assert recipe.search.kl_weight == 1e-4  # text to YAML 1.1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [m\n", "not a readable recipe"),
        (b"model: m\n\tkeep: 0.8\n", "not a readable recipe"),
        (b"\xff\xfe\x00", "not a readable recipe"),
        (b"model: m\nkeep: 2024-13-45\n", "not a readable recipe.*month"),
        (b"model: !!python/object/apply:os.getcwd []\nkeep: 0.8\n", "not a readable recipe"),
        (b"", "a recipe is a YAML mapping .* found NoneType"),
        (b"- model\n", "a recipe is a YAML mapping .* found list"),
        (b"just words\n", "a recipe is a YAML mapping .* found str"),
        (b"model: m\nkeep: 0.8\n1: 2\n", "1: "),
        (b"model: m\nkeep: yes\n", "keep: expected a value, not true"),
        (b"model: m\nkeep: 0.8\npreset: papr\n", "unknown preset 'papr'"),
        (b"model: m\nkeep: 0.8\npreset: [paper]\n", r"unknown preset \['paper'\]"),
        (b"model: m\nkeep: 8\n", "keep: .*less than or equal to 1"),
        (b"model: m\n", "keep: Field required"),
    ],
)
def test_a_broken_recipe_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_file_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match="not a readable recipe"):
            load_recipe(path)


# --- parts


def test_merge_lays_one_mapping_over_another() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    update = {"a": {"c": {"f": 4}}, "e": {"g": 5}}
    assert merge(base, update) == {"a": {"b": 1, "c": {"d": 2, "f": 4}}, "e": {"g": 5}}
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert update == {"a": {"c": {"f": 4}}, "e": {"g": 5}}
    assert merge({"a": {"b": 1}}, {"a": None}) == {"a": None}


def test_words_become_nested_values() -> None:
    assert recipe_values() == {}
    values = recipe_values(
        keep=0.8,
        search="5x4",
        trials=9,
        method="svd",
        calibration="a.txt",
        validation="b.txt",
        evaluation="c.txt",
        seq_len=64,
        warm_start="old",
        seed=0,
        dtype="float32",
        device="cpu",
    )
    assert values == {
        "keep": 0.8,
        "search": {"space": "5x4", "trials": 9, "warm_start": "old"},
        "factorization": {"method": "svd"},
        "calibration": {"source": "a.txt", "seq_len": 64},
        "validation": {"source": "b.txt"},
        "evaluation": {"source": "c.txt"},
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
    }
    assert make_recipe(values | {"model": "m"}).search.trials == 9


def test_options_reach_every_field_and_come_last() -> None:
    options = {"search.trials": 4, "search.rank_multiple": 2, "evaluation.windows": None}
    values = recipe_values(trials=9, options=options)
    assert values == {"search": {"trials": 4, "rank_multiple": 2}, "evaluation": {"windows": None}}
    with pytest.raises(RecipeError, match=r"^search\.ranks\.multiple|^search\.ranks: "):
        make_recipe(merge(LEAST, recipe_values(options={"search.ranks.multiple": 3})))


def test_differing_fields_are_named_with_both_values() -> None:
    one = make_recipe(LEAST).model_dump(mode="json")
    assert differing_fields(one, one) == []
    other = make_recipe(merge(LEAST, {"keep": 0.7, "search": {"trials": 9}})).model_dump(mode="json")
    assert differing_fields(one, other) == ["keep (0.8 there, 0.7 here)", "search.trials (50 there, 9 here)"]
    assert differing_fields({"a": {"b": 1}}, {"a": 2, "c": 3}) == [
        "a ({'b': 1} there, 2 here)",
        "c (None there, 3 here)",
    ]
