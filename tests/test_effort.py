"""How much is done once the ranks are known, by a word; and what the report says of it."""

from __future__ import annotations

import pytest

from bolaco.checkpoint.info import Curves, EndCurve, read_curves
from bolaco.errors import RecipeError
from bolaco.recipe.line import recipe_line
from bolaco.recipe.recipe import load_recipe, make_recipe, recipe_values
from bolaco.recipe.words import EFFORT
from bolaco.refine.settings import EFFORTS, Refinement
from bolaco.report.card import model_card
from bolaco.report.charts import end_charts
from bolaco.report.html import result_page
from tests.models import FAMILIES, compress_tiny


def recipe(preset: str | None = None, **words):
    return make_recipe({"model": "m"} | recipe_values(keep=0.8, **words), preset)


def test_the_word_has_the_names_of_the_efforts() -> None:
    assert tuple(EFFORTS) == EFFORT


def test_an_effort_sets_what_is_not_given() -> None:
    assert Refinement() == Refinement(effort="default")
    assert not Refinement(effort="fast").active
    best = Refinement(effort="best")
    assert best.sequences is None
    assert best.trains_end
    assert best.held_out
    assert Refinement(effort="best", steps=7, logit_steps=0) == best.model_copy(update={"steps": 7, "logit_steps": 0})


def test_the_most_that_a_published_recipe_does_gives_way_to_an_effort() -> None:
    plain = recipe(method="svd-llm")
    assert not plain.refinement.active
    refined = recipe(method="svd-llm", effort="best")
    assert refined.refinement == Refinement(effort="best")
    assert not recipe("aa-svd", effort="fast").refinement.active


def test_it_is_in_the_recipe_and_read_back(tmp_path) -> None:
    made = recipe(effort="best", options={"refinement.logit_steps": 12})
    file = tmp_path / "recipe.yaml"
    file.write_text(made.to_yaml())
    assert load_recipe(file) == made
    assert "12 steps on next tokens" in recipe_line(made)


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"refinement\.effort.*best"):
        recipe(effort="most")


def test_what_was_trained_in_the_end_is_in_card_and_report(tmp_path) -> None:
    options = {
        "refinement.steps": 2,
        "refinement.held_out": 1,
        "refinement.logit_steps": 6,
        "refinement.patience": 99,
        "refinement.scale_steps": 3,
        "calibration.sequences": 8,
    }
    run = compress_tiny(FAMILIES["llama"](), tmp_path / "out", preset="default", search="spectral", options=options)
    curves = read_curves(run.path)
    assert list(curves.ends) == ["logits", "scales"]
    assert len(curves.ends["logits"].losses) == 6
    assert len(curves.ends["logits"].held_out) > 1
    page = result_page(run.info, curves, "out")
    assert "Training on next tokens" in page
    assert "Scales, on next tokens" in page
    card = " ".join(model_card(run.info, "out").split())
    assert "for 6 steps and the scales of all rows and columns for 3 at most" in card


def test_losses_that_are_not_finite_are_left_out() -> None:
    curve = EndCurve(losses=[float("nan"), 1.0, float("inf")], held_out=[float("nan")])
    ((name, figure),) = end_charts("x", Curves(matrices={}, refinement={}, ends={"logits": curve}))
    assert name == "logits"
    assert "nan" not in str(figure.split("<svg")[1])
    assert not end_charts("x", Curves(matrices={}, refinement={}, ends={"scales": EndCurve(losses=[])}))
