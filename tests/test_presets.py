"""Every preset, end to end on a tiny model."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from bolaco import api
from bolaco.comparison.plan import make_comparison
from bolaco.factorize import METHODS
from bolaco.models.load import load_model
from bolaco.progress import Reporter
from bolaco.recipe.line import recipe_line
from bolaco.recipe.presets import PRESETS, SYSTEMS
from bolaco.recipe.recipe import Recipe, applicable, make_recipe, read_recipe
from tests.command import ok
from tests.models import compress_tiny, save_tiny, tiny_llama, tiny_recipe, tiny_tokenizer, token_blocks

FEW = {"calibration.gradient_sequences": 4, "search.trials": 2, "method.steps": 4}


def field(recipe: Recipe, name: str) -> object:
    """A field by its dotted name, None where the recipe has no such one."""
    found: object = recipe
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


@pytest.mark.parametrize("preset", list(PRESETS))
def test_runs_and_loads(preset: str, tmp_path) -> None:
    least = {"model": "m", "keep": 0.7}
    recipe = make_recipe(least, preset)
    options = applicable(FEW, least, preset)
    if recipe.refinement is not None:
        options |= {"refinement.steps": min(recipe.refinement.steps, 2)}
    for section in ("validation", "evaluation"):  # the paper's are hub data sets and long sequences
        options |= {f"{section}.source": None, f"{section}.seq_len": None}
    original = tiny_llama(num_hidden_layers=6 if preset == "chop" else 2)
    run = compress_tiny(original, tmp_path / "out", preset=preset, search=None, options=options)
    parts = ("method.name", "storage", "search.name", "refinement.fit")
    assert [field(run.recipe, part) for part in parts] == [field(recipe, part) for part in parts]
    assert 0.55 < run.info.keep_linears <= 0.7  # the paper's proposals have a tenth of slack
    assert len(run.info.trials) == (2 if recipe.searches else 0)
    model = load_model(str(run.path))
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=token_blocks(1, 16)).logits).all()


@pytest.mark.parametrize("storage", ["two-factor", "pivoted"])
def test_uniform_gives_every_matrix_the_same_share(storage: str, tmp_path) -> None:
    options = {"search.rank_multiple": 1, "search.fill": False}
    run = compress_tiny(
        tiny_llama(), tmp_path / "out", preset="svd-llm", search="uniform", storage=storage, options=options
    )
    sizes = {name: rank for name, rank in run.info.ranks.items() if rank is not None}
    assert {name.rpartition(".")[2] for name in sizes} >= {"q_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    by_type: dict[str, set[int]] = {}
    for name, rank in sizes.items():
        by_type.setdefault(name.rpartition(".")[2], set()).add(rank)
    assert all(len(found) == 1 for found in by_type.values())


@pytest.mark.parametrize("name", sorted({*PRESETS, *SYSTEMS, *METHODS.names()}))
def test_a_name_is_the_same_recipe_in_compress_and_in_a_comparison(name: str) -> None:
    compared = make_comparison("m", [name], [0.7]).recipes[f"{name}-0.7"]
    assert make_recipe({"model": "m", "keep": 0.7, "method": name}) == compared
    if name in PRESETS:
        assert make_recipe({"model": "m", "keep": 0.7}, name) == compared


@pytest.mark.parametrize("name", [name for name in METHODS.names() if name not in SYSTEMS])
def test_a_method_inside_our_recipe(name: str) -> None:
    """With the preset named only the statistics are the method's."""
    least = {"model": "m", "keep": 0.7}
    given, ours = make_recipe(least | {"method": name}, "default").model_dump(), make_recipe(least).model_dump()
    assert given.pop("method")["name"] == name
    del ours["method"]
    assert given == ours


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            (),
            "recipe default: method kfac, pivoted storage, search spectral, "
            "refinement: 20 steps for each block and 60 steps on next tokens",
        ),
        (("--method", "svd-llm"), "recipe svd-llm: method svd-llm, two-factor storage, search uniform, no refinement"),
        (("--method", "afm"), "recipe afm: method afm, two-factor storage, search uniform, no refinement"),
        (("--method", "bolaco"), "recipe bolaco-5x1: method afm, two-factor storage, search 5x1, no refinement"),
        (
            ("--preset", "bolaco-5x1", "--trials", "3", "--seq-len", "64", "--set", "evaluation.windows=4"),
            "recipe bolaco-5x1: method afm, two-factor storage, search 5x1, no refinement",
        ),
        (
            ("--preset", "paper", "--trials", "3", "--seq-len", "64"),
            "recipe paper: method afm, two-factor storage, search 5x1, no refinement",
        ),
        (("--preset", "paper"), "recipe paper: method afm, two-factor storage, search 5x1, no refinement"),
        (("--method", "chop"), "recipe chop: method chop"),
        (
            ("--preset", "default", "--method", "svd-llm"),
            "recipe of your own: method svd-llm, pivoted storage, search spectral, "
            "refinement: 20 steps for each block and 60 steps on next tokens",
        ),
        (
            ("--method", "svd-llm", "--quantize", "int4"),
            "recipe svd-llm: method svd-llm, two-factor storage, search uniform, no refinement, matrices in int4",
        ),
        (
            ("--preset", "mpifa", "--set", "refinement.steps=3"),
            "recipe of your own: method svd-llm, pivoted storage, search uniform, "
            "refinement: fit to the inputs and 3 steps for each block and 9 steps on next tokens",
        ),
    ],
)
def test_which_recipe_runs_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", tiny_llama(num_hidden_layers=4))
    written = ok("compress", "model", "--keep", "0.7", *words, "--print-recipe").out
    assert recipe_line(read_recipe(yaml.safe_load(written))) == line


@pytest.mark.parametrize("method", ["kfac", "chop"])
def test_a_run_says_its_recipe(tmp_path: Path, method: str) -> None:
    said = io.StringIO()
    recipe = tiny_recipe(method=method, preset=None, search=None)
    model = tiny_llama(num_hidden_layers=4)
    api.run(recipe, tmp_path / "out", model=model, tokenizer=tiny_tokenizer(), reporter=Reporter(Console(file=said)))
    assert recipe_line(recipe) in said.getvalue().splitlines()
