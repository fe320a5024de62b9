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
from bolaco.recipe.presets import PAPER, PRESETS
from bolaco.recipe.recipe import (
    LowRankRecipe,
    TransformRecipe,
    applicable,
    laid_over,
    load_recipe,
    make_recipe,
    read_recipe,
    recipe_values,
)
from bolaco.settings import merge, unflatten

MODEST = settings(max_examples=60, deadline=None, derandomize=True)
GOLDEN = Path(__file__).parent / "golden" / "v1"
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
        ("search.space", "5x1"),
        ("search.name", "6x1"),
        ("search.name", 5),
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
        ("search", 5),
        ("search", None),
        ("search.min_ratio", 0.5),
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
        ("factorization.method", "svd"),
        ("factorization.storage", "pivoted"),
        ("chop.pattern", "input"),
        ("method.name", 3),
        ("method.name", None),
        ("method.name", "kfacc"),
        ("method", 3),
        ("method", None),
        ("method.shrinkage", 0.1),
        ("storage", "pivotted"),
        ("storage", 3),
        ("storage", None),
        ("keep", 0),
        ("keep", -0.5),
        ("keep", 1.01),
        ("keep", float("nan")),
        ("keep", "most"),
        ("keep", True),
        ("seed", "dice"),
        ("dtype", "float8"),
        ("bos", "always"),
        ("version", 1),
        ("version", 3),
        ("model", ""),
        ("model", None),
    ],
)
def test_a_bad_value_is_refused_by_its_dotted_name(name: str, value: Any) -> None:
    """Over a recipe that searches, so that the fields of searches are there."""
    with pytest.raises(RecipeError) as caught:
        make_recipe(merge(LEAST, nested(name, value)), "bolaco-5x1")
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    assert isinstance(caught.value, BolacoError)


def test_the_value_given_is_quoted() -> None:
    with pytest.raises(RecipeError, match=r"search\.trials: .*integer.*\(got 'many'\)"):
        make_recipe(merge(LEAST, nested("search.trials", "many")), "bolaco-5x1")
    with pytest.raises(RecipeError, match=r"method\.shrinkage: .*less than or equal to 1 \(got 2\)"):
        make_recipe(merge(LEAST, nested("method.shrinkage", 2)))
    with pytest.raises(RecipeError, match=r"search\.dense_types\.1: .*\(got 3\)"):
        make_recipe(merge(LEAST, nested("search.dense_types", ["v", 3])))


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({"keep": 2, "search": {"trials": 0, "nothing": 1}, "method": {"share": 1}}, "bolaco-5x1")
    for name in ("model: Field required", "keep: ", "search.trials: ", "search.nothing: ", "method.share: "):
        assert name in str(caught.value)


def test_fields_are_checked_against_each_other() -> None:
    with pytest.raises(RecipeError, match=r"^validation: candidates \(3\) must be at least sequences \(9\)$"):
        make_recipe(merge(LEAST, {"validation": {"sequences": 9, "candidates": 3}}))


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"unknown preset 'papr'; did you mean 'paper'\?"):
        make_recipe(LEAST, "papr")


def test_a_recipe_does_not_change() -> None:
    recipe = make_recipe(LEAST)
    with pytest.raises(ValidationError):
        recipe.keep = 0.5  # type: ignore[misc]


# --- presets


def test_the_paper_preset_is_the_paper() -> None:
    recipe = make_recipe(LEAST, "paper")
    wanted = {
        "method.name": "afm",
        "calibration.source": "allenai/c4",
        "calibration.sequences": 1024,
        "calibration.seq_len": 4096,
        "calibration.groups": 32,
        "validation.source": "wikimedia/wikipedia:20231101.en",
        "validation.sequences": 100,
        "validation.seq_len": 4096,
        "validation.allocations": 20,
        "search.name": "5x1",
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
    assert recipe.storage == "two-factor"
    assert recipe.dense_types == ("v",)
    # 32 groups of 32 sequences.
    assert recipe.calibration.sequences == recipe.calibration.groups * 32
    assert recipe.validation.candidates > recipe.validation.sequences


def test_a_preset_gives_way_to_values_and_is_left_as_it_was() -> None:
    before = yaml.safe_dump(PRESETS["paper"] | {"search": {**PAPER["search"], "dense_types": ["v"]}})
    recipe = make_recipe(merge(LEAST, {"search": {"trials": 7}, "calibration": {"source": "a.txt"}}), "paper")
    options = recipe.allocator_options
    assert (options.trials, options.surrogate) == (7, "paper")
    assert (recipe.calibration.source, recipe.calibration.sequences) == ("a.txt", 1024)
    assert yaml.safe_dump(PRESETS["paper"] | {"search": {**PAPER["search"], "dense_types": ["v"]}}) == before


def test_the_default_preset_is_the_defaults() -> None:
    assert make_recipe(LEAST, "default") == make_recipe(LEAST)
    assert make_recipe(LEAST, "bolaco-5x1").allocator_options.initial == 5
    recipe = make_recipe(LEAST)
    assert (recipe.method.name, recipe.storage, recipe.search.name) == ("kfac", "pivoted", "spectral")
    assert recipe.chosen.options.shrinkage == 0.1


# --- YAML


@pytest.mark.parametrize("preset", PRESETS)
def test_yaml_gives_the_recipe_back(tmp_path: Path, preset: str) -> None:
    fields = {"search.dense_types": ["v", "o"], "search.kl_weight": 1e-5, "method.shrinkage": 0.2, "method.steps": 7}
    recipe = make_recipe(LEAST | unflatten(applicable(fields, LEAST, preset)), preset)
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
    seed=st.integers(0, 2**32 - 1),
    windows=st.one_of(st.none(), st.integers(1, 10**9)),
)
def test_any_value_survives_yaml(
    tmp_path_factory: Any, model: str, keep: float, kl_weight: float, seed: int, windows: int | None
) -> None:
    search = {"name": "5x4", "kl_weight": kl_weight}
    values = {"keep": keep, "seed": seed, "search": search, "evaluation": {"windows": windows}}
    recipe = make_recipe({"model": model} | values)
    path = tmp_path_factory.mktemp("yaml") / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_a_recipe_file_may_name_a_preset_and_write_numbers_as_people_do(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("preset: paper\nmodel: m\nkeep: 0.7\nsearch: {trials: 3, kl_weight: 1e-4}\n")
    recipe = load_recipe(path)
    options = recipe.allocator_options
    assert (recipe.keep, options.trials, options.surrogate) == (0.7, 3, "paper")
    assert options.kl_weight == 1e-4  # text to YAML 1.1
    path.write_text("model: m\nkeep: 0.7\nmethod: svd-llm\nsearch: uniform\n")  # names alone
    assert load_recipe(path) == make_recipe(
        {"model": "m", "keep": 0.7, "method": {"name": "svd-llm"}, "search": {"name": "uniform"}}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [m\n", "not a readable recipe"),
        (b"model: m\n\tkeep: 0.8\n", "not a readable recipe"),
        (b"\xff\xfe\x00", "not a readable recipe"),
        (b"model: m\nkeep: 2024-13-45\n", "keep: Input should be a valid number"),
        (b"model: !!python/object/apply:os.getcwd []\nkeep: 0.8\n", "not a readable recipe"),
        (b"", "a recipe is a YAML mapping .* found NoneType"),
        (b"- model\n", "a recipe is a YAML mapping .* found list"),
        (b"just words\n", "a recipe is a YAML mapping .* found str"),
        (
            b"model: m\nkeep: 0.8\n1: 2\n",
            "not a readable recipe: line 3: a key is a name in quotes .*, not '1'",
        ),
        (b"model: m\nkeep: yes\n", "keep: expected a value, not true"),
        (b"model: m\nkeep: 0.8\npreset: papr\n", "unknown preset 'papr'"),
        (b"model: m\nkeep: 0.8\nversion: 1\npreset: papr\n", "unknown preset 'papr'"),
        (b"model: m\nkeep: 0.8\npreset: [paper]\n", r"unknown preset \['paper'\]"),
        (b"model: m\nkeep: 8\n", "keep: .*less than or equal to 1"),
        (b"model: m\n", "exactly one of keep, .* none is given"),
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
        storage="two-factor",
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
        "search": {"name": "5x4", "trials": 9, "warm_start": "old"},
        "method": {"name": "svd"},
        "storage": "two-factor",
        "calibration": {"source": "a.txt", "seq_len": 64},
        "validation": {"source": "b.txt"},
        "evaluation": {"source": "c.txt"},
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
    }
    assert make_recipe(values | {"model": "m"}).allocator_options.trials == 9
    with pytest.raises(TypeError, match="unknown word 'serach'; known are keep, "):
        recipe_values(serach="5x1")


def test_options_reach_every_field_and_come_last() -> None:
    options = {"search.trials": 4, "search.rank_multiple": 2, "evaluation.windows": None}
    values = recipe_values(trials=9, options=options)
    assert values == {"search": {"trials": 4, "rank_multiple": 2}, "evaluation": {"windows": None}}
    with pytest.raises(RecipeError, match=r"^search\.ranks\.multiple|^search\.ranks: "):
        make_recipe(merge(LEAST, recipe_values(options={"search.ranks.multiple": 3})))


# --- methods and searches with their options


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"search": {"trials": 3}}, "search.trials: search 'spectral' has no such option"),
        ({"search": {"name": "uniform", "trials": 3}}, "search.trials: search 'uniform' has no such option"),
        ({"search": {"name": "welore", "min_keep": 0.3}}, "search.min_keep: search 'welore' has no such option"),
        (
            {"search": {"name": "welore", "min_ration": 0.3}},
            "search.min_ration: search 'welore' has no such option; did you mean 'min_ratio'?",
        ),
        (
            {"search": {"name": "5x1", "kl_wieght": 1}},
            "search.kl_wieght: search '5x1' has no such option; did you mean 'kl_weight'?",
        ),
        (
            {"method": {"shrinkige": 0.1}},
            "method.shrinkige: method 'kfac' has no such option; did you mean 'shrinkage'?",
        ),
        ({"method": {"name": "svd", "shrinkage": 0.1}}, "method.shrinkage: method 'svd' has no such option"),
        ({"method": {"name": "chop", "steps": 3}}, "method.steps: method 'chop' has no such option; known are pattern"),
        ({"method": "kfacc"}, "method.name: unknown method 'kfacc'; did you mean 'kfac'?"),
        ({"search": "spectrall"}, "search.name: unknown search 'spectrall'; did you mean 'spectral'?"),
        ({"storage": "pivotted"}, "storage: unknown storage 'pivotted'; did you mean 'pivoted'?"),
        ({"search": "none"}, "search.name: unknown search 'none'"),
    ],
)
def test_a_wrong_name_or_option_is_told_from_what_there_is(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(LEAST | values)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("factorization.method", "method.name"),
        ("factorization.storage", "storage"),
        ("search.space", "search.name"),
        ("chop.pattern", "method.pattern"),
        ("pruning.steps", "method"),
    ],
)
def test_a_name_of_version_1_is_told_what_it_is_called_now(old: str, new: str) -> None:
    with pytest.raises(RecipeError, match=rf"^{old.split('.')[0]}[a-z.]*: is called {new} now$"):
        make_recipe(merge(LEAST, nested(old, "uniform")))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"storage": "shared", "search": "5x1"}, "search.name 5x1 is not possible with shared storage; there is "),
        ({"storage": "shared", "search": "hand"}, "search.name hand is not possible with shared storage"),
        ({"storage": "shared", "refinement": {"fit": True}}, "refinement.fit is not possible with shared storage"),
        ({"storage": "shared", "search": {"warm_start": "x"}}, "search.warm_start is not possible with shared storage"),
        ({"search": {"name": "uniform", "warm_start": "x"}}, "search.warm_start is not possible with search uniform"),
        ({"search": {"name": "hand", "warm_start": "x"}}, "search.warm_start is not possible with search hand"),
        ({"method": "chop", "storage": "pivoted"}, "storage pivoted contradicts method chop: it removes blocks"),
        ({"method": "chop", "refinement": {"fit": True}}, "refinement contradicts method chop: it removes blocks"),
    ],
)
def test_what_cannot_go_together_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(LEAST | values)
    assert str(caught.value).startswith(said)


def test_another_name_drops_the_options_of_what_it_replaces() -> None:
    """But not what all searches have in common, nor what goes with the new name."""
    base = {
        "method": {"name": "kfac", "shrinkage": 0.2},
        "search": {"name": "5x1", "trials": 9, "rank_multiple": 4, "dense_types": ["v"]},
        "keep": 0.8,
    }
    assert laid_over(base, {"method": "svd", "search": {"name": "welore", "min_ratio": 0.4}}) == {
        "method": {"name": "svd"},
        "search": {"name": "welore", "rank_multiple": 4, "dense_types": ["v"], "min_ratio": 0.4},
        "keep": 0.8,
    }
    same = {"method": {"name": "kfac"}, "search": {"name": "5x1", "trials": 3}}
    assert laid_over(base, same) == merge(base, {"search": {"trials": 3}})
    assert base["search"]["trials"] == 9


@pytest.mark.parametrize("preset", PRESETS)
def test_what_applies_to_a_preset_makes_a_recipe_of_it(preset: str) -> None:
    fields = {
        "calibration.sequences": 8,
        "search.trials": 3,
        "search.rank_multiple": 4,
        "search.min_ratio": 0.4,
        "method.steps": 2,
        "method.pattern": "input",
        "refinement.steps": 3,
    }
    found = applicable(fields, LEAST, preset)
    recipe = make_recipe(LEAST | unflatten(found), preset)
    dumped = recipe.model_dump()
    assert all(dumped[name.split(".")[0]][name.split(".")[1]] == value for name, value in found.items())
    expected = {
        "search.trials": recipe.searches,
        "search.rank_multiple": preset != "chop",
        "search.min_ratio": preset == "welore",
        "method.steps": preset == "lpaf",
        "method.pattern": preset == "chop",
        "refinement.steps": preset != "chop",
        "calibration.sequences": True,
    }
    assert found.keys() == {name for name, there in expected.items() if there}


def test_a_recipe_of_a_transform_has_nothing_of_a_factorization() -> None:
    recipe = make_recipe(LEAST | {"method": {"name": "chop", "pattern": "input"}})
    assert isinstance(recipe, TransformRecipe)
    assert recipe.options.pattern == "input"
    assert not recipe.model_dump().keys() & {"storage", "search", "refinement"}
    assert (recipe.refinement, recipe.searches, recipe.calibrates) == (None, False, False)


@pytest.mark.parametrize(("preset", "reads"), [("svd-llm", True), ("lpaf", True), ("joint", False), ("welore", False)])
def test_text_is_read_where_something_looks_at_it(preset: str, reads: bool) -> None:
    assert make_recipe(LEAST, preset).calibrates == reads
    assert make_recipe(LEAST | {"refinement": {"steps": 1}}, preset).calibrates


def test_the_recipe_in_a_result_needs_nothing_installed() -> None:
    values = make_recipe(LEAST).model_dump(mode="json")
    values |= {"method": {"name": "of-a-package", "power": 0.5}, "search": values["search"] | {"name": "elsewhere"}}
    recipe = read_recipe(values)
    assert isinstance(recipe, LowRankRecipe)
    assert recipe.method.name == "of-a-package"
    assert recipe.model_dump(mode="json") == values
    with pytest.raises(RecipeError, match=r"exactly one of keep, .* none is given"):
        read_recipe({name: value for name, value in values.items() if name != "keep"})


# --- recipes of version 1


# As `--print-recipe` wrote them: every field, whether the recipe reads it or not.
OLD = yaml.safe_load("""
version: 1
model: some/model
keep: 0.8
seed: 3
dtype: auto
device: auto
bos: auto
factorization: {method: kfac, storage: pivoted}
calibration: {source: a.txt, sequences: 128, seq_len: 1024, groups: 32, batch: 4, gradient_sequences: 32, cache: memory}
validation: {source: null, seq_len: null, sequences: 16, candidates: 32, allocations: 6, batch: 4}
search: {space: spectral, trials: 50, initial: 5, min_keep: 0.2, slack: 0.02, fill: true, rank_multiple: 8,
  dense_types: null, min_ratio: 0.0, objective: ppl+kl, kl_weight: 0.001, surrogate: fitted, warm_start: null}
refinement: {fit: false, drift: 1.0, damping: 0.01, sequences: 32, steps: 20, learning_rate: 0.0003, autocast: true,
  weight_decay: 0.01}
chop: {pattern: middle}
pruning: {sparsity: null, steps: 64, batch: 4, learning_rate: 2.0e-05, score: sensitivity, keep_sparse: false}
evaluation: {source: null, seq_len: null, windows: 16}
""")
OLD_PLAIN = {"refinement": {"steps": 0}}
SAME = {"model": "some/model", "keep": 0.8, "seed": 3, "calibration": {"source": "a.txt"}}


@pytest.mark.parametrize(
    ("old", "preset", "new"),
    [
        ({}, "default", {}),
        (
            {"search": {"space": "5x1", "trials": 9, "kl_weight": 0.1, "min_keep": 0.3}},
            "default",
            {"search": {"name": "5x1", "trials": 9, "kl_weight": 0.1, "min_keep": 0.3}},
        ),
        ({"search": {"space": "none", "fill": False}}, "default", {"search": {"name": "hand", "fill": False}}),
        (
            {"factorization": {"method": "svd-llm", "storage": "two-factor"}, "search": {"space": "uniform"}}
            | OLD_PLAIN,
            "svd-llm",
            {},
        ),
        (
            {
                "factorization": {"method": "svd", "storage": "two-factor"},
                "search": {"space": "welore", "min_ratio": 0.4999},
            }
            | OLD_PLAIN,
            "welore",
            {"search": {"min_ratio": 0.4999}},
        ),
        # Another search did not look at it.
        ({"search": {"min_ratio": 0.4}}, "default", {}),
        (
            {"factorization": {"method": "svd", "storage": "shared"}, "search": {"space": "uniform"}} | OLD_PLAIN,
            "joint",
            {},
        ),
        (
            {
                "factorization": {"method": "lpaf", "storage": "two-factor"},
                "search": {"space": "uniform"},
                "pruning": {"steps": 5, "keep_sparse": True},
            }
            | OLD_PLAIN,
            "lpaf",
            {"method": {"steps": 5, "keep_sparse": True}},
        ),
        (
            {
                "factorization": {"method": "chop", "storage": "dense"},
                "search": {"space": "none"},
                "chop": {"pattern": "both"},
            }
            | OLD_PLAIN,
            "chop",
            {"method": {"pattern": "both"}},
        ),
    ],
)
def test_a_whole_recipe_of_version_1_is_the_same_run(
    tmp_path: Path, old: dict[str, Any], preset: str, new: dict[str, Any]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merge(OLD, old)))
    wanted = make_recipe(merge(merge(SAME, new), as_before(preset)), preset)
    assert load_recipe(path) == wanted
    found = read_recipe(merge(OLD, old))
    assert type(found) is type(wanted)
    for part in ("options", "chosen", "allocator_options", "dense_types", "storage", "calibration", "refinement"):
        assert getattr(found, part, None) == getattr(wanted, part, None), part


def as_before(preset: str) -> dict[str, Any]:
    """What version 1 did after the ranks were known, which is not the default any more."""
    return {} if preset == "chop" else {"refinement": {"sequences": 32, "held_out": 0, "logit_steps": 0}}


@pytest.mark.parametrize("preset", ["default", "paper", "lpaf", "chop"])
def test_recipes_that_version_1_printed(preset: str) -> None:
    """By the commit before version 2 (golden/make.py)."""
    values = {"model": "smollm2-135m", "keep": 0.8} | as_before(preset)
    assert load_recipe(GOLDEN / f"recipe-{preset}.yaml") == make_recipe(values, preset)


@pytest.mark.parametrize(
    ("written", "preset", "new"),
    [
        ("factorization: {method: svd}", "default", {"method": "svd"}),
        ("factorization: {method: joint}", "joint", {}),
        ("factorization: {method: bolaco}\nsearch: {trials: 7}", "bolaco-5x1", {"search": {"trials": 7}}),
        ("factorization: {method: welore}\nsearch: {min_ratio: 0.3}", "welore", {"search": {"min_ratio": 0.3}}),
        ("preset: paper\nsearch: {trials: 7}", "paper", {"search": {"trials": 7}}),
        ("preset: paper\nsearch: {space: 5x4}", "paper", {"search": {"name": "5x4"}}),
        ("preset: lpaf\npruning: {steps: 5}", "lpaf", {"method": {"steps": 5}}),
        ("preset: chop\nchop: {pattern: input}", "chop", {"method": {"pattern": "input"}}),
        ("preset: welore\nsearch: {min_ratio: 0.4, min_keep: 0.3}", "welore", {"search": {"min_ratio": 0.4}}),
        # What the closed form never looked at.
        ("search: {trials: 7, min_keep: 0.3}", "default", {}),
        ("pruning: {steps: 5}\nchop: {pattern: input}", "default", {}),
    ],
)
def test_a_recipe_of_version_1_may_leave_things_out_too(
    tmp_path: Path, written: str, preset: str, new: dict[str, Any]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"version: 1\nmodel: some/model\nkeep: 0.8\n{written}\n")
    assert load_recipe(path) == make_recipe(LEAST | new | as_before(preset), preset)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("search: {space: 6x1}", "search.name: unknown search '6x1'"),
        ("factorization: {method: kfacc}", "method.name: unknown method 'kfacc'"),
        ("factorization: {storage: flat}", "storage: unknown storage 'flat'"),
        ("search: {space: 5x1, trials: many}", "search.trials: .*'many'"),
        ("search: 5", "search: Input should be"),
        ("factorization: {method: 3}", "method.name: Input should be a valid string"),
    ],
)
def test_a_wrong_recipe_of_version_1_is_refused_by_the_names_of_today(tmp_path: Path, written: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"version: 1\nmodel: some/model\nkeep: 0.8\n{written}\n")
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_a_result_is_to_be_best_at() -> None:
    def storage(preset: str | None = None, **words: Any) -> str:
        return make_recipe(recipe_values(**words, options=LEAST), preset).storage

    assert storage(optimize="size") == storage() == "pivoted"
    assert storage(optimize="speed") == storage(optimize="speed", storage="two-factor") == "two-factor"
    assert storage("mpifa", optimize="size") == storage("mpifa")
    with pytest.raises(RecipeError, match="optimize speed means storage two-factor, and storage pivoted was asked for"):
        recipe_values(optimize="speed", storage="pivoted")
    with pytest.raises(RecipeError, match="optimize 'fast': must be one of size, speed"):
        recipe_values(optimize="fast")
    with pytest.raises(RecipeError, match="storage two-factor contradicts method chop"):
        storage(optimize="speed", method="chop")
