"""Every preset, end to end on a tiny model."""

from __future__ import annotations

import pytest
import torch

from bolaco.models import load_model
from bolaco.recipe import PRESETS, make_recipe
from tests.models import compress_tiny, tiny_llama, token_blocks

FEW = {"calibration.gradient_sequences": 4, "search.trials": 2}


@pytest.mark.parametrize("preset", list(PRESETS))
def test_runs_and_loads(preset: str, tmp_path) -> None:
    recipe = make_recipe({"model": "m", "keep": 0.7}, preset)
    options = FEW | {"refinement.steps": min(recipe.refinement.steps, 2)}
    for section in ("validation", "evaluation"):  # the paper's are hub data sets and long sequences
        options |= {f"{section}.source": None, f"{section}.seq_len": None}
    original = tiny_llama(num_hidden_layers=6 if preset == "chop" else 2)
    run = compress_tiny(original, tmp_path / "out", preset=preset, search=recipe.search.space, options=options)
    assert run.recipe.factorization == recipe.factorization
    assert run.recipe.refinement.fit == recipe.refinement.fit
    assert 0.55 < run.info["keep_linears"] <= 0.7  # the paper's proposals have a tenth of slack
    assert len(run.info["trials"]) == (2 if recipe.searches else 0)
    model = load_model(str(run.path))
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=token_blocks(1, 16)).logits).all()


@pytest.mark.parametrize("storage", ["two-factor", "pivoted"])
def test_uniform_gives_every_matrix_the_same_share(storage: str, tmp_path) -> None:
    options = {"search.rank_multiple": 1, "search.fill": False}
    run = compress_tiny(
        tiny_llama(), tmp_path / "out", preset="svd-llm", search="uniform", storage=storage, options=options
    )
    sizes = {name: rank for name, rank in run.info["ranks"].items() if rank is not None}
    assert {name.rpartition(".")[2] for name in sizes} >= {"q_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    by_type: dict[str, set[int]] = {}
    for name, rank in sizes.items():
        by_type.setdefault(name.rpartition(".")[2], set()).add(rank)
    assert all(len(found) == 1 for found in by_type.values())
