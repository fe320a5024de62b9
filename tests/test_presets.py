"""Every preset, end to end on a tiny model."""

from __future__ import annotations

import pytest
import torch

from bolaco.models.load import load_model
from bolaco.recipe.presets import PRESETS
from bolaco.recipe.recipe import Recipe, applicable, make_recipe
from tests.models import compress_tiny, tiny_llama, token_blocks

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
