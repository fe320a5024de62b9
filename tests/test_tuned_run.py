"""A model that is compressed and tuned by one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bolaco import api
from bolaco.checkpoint.info import read_info
from bolaco.errors import RecipeError, ResumeError, UnsupportedModelError
from bolaco.models.load import load_model
from bolaco.recipe.recipe import Recipe, load_recipe, make_recipe
from bolaco.tune.trainer import TuneTrainer
from tests.command import digest, ok
from tests.models import save_tiny, slow, text_file, tiny_llama, tiny_recipe

SHORT = {
    "tuning.training.max_steps": 4,
    "tuning.training.autocast": False,
    "tuning.data.sequences": 8,
    "tuning.evaluation.windows": 4,
}


def recipe_of(model: Path, **values: Any) -> Recipe:
    return tiny_recipe(**{"keep": 0.5} | values).model_copy(update={"model": str(model)})


def run(model: Path, out: Path, tune: str = "mixed-rank", options: dict[str, Any] | None = None, **values: Any) -> Any:
    return api.run(recipe_of(model, tune=tune, options=SHORT | (options or {}), **values), out)


LPAF = {"preset": "lpaf", "search": None}


def test_prune_factor_and_mixed_rank_tuning(tmp_path: Path) -> None:
    """LPAF as one: the result says all three stages, and is that of the three commands."""
    source = save_tiny(tmp_path / "model")
    info = run(source, tmp_path / "out", options={"method.steps": 4}, **LPAF).info
    assert info.method == "lpaf"
    assert info.tuning.mode == "mixed-rank"
    assert info.tuning.model == info.tuning.settings["model"] == str(source)
    assert info.recipe["tuning"]["mode"] == "mixed-rank"
    assert info.recipe["method"]["keep_sparse"]  # what the factors were trained among
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    assert not (tmp_path / "out" / "sparse.safetensors").exists()
    # One after the other.
    options = {"method.steps": 4, "method.keep_sparse": True}
    api.run(recipe_of(source, options=options, **LPAF), tmp_path / "small")
    given = {key.removeprefix("tuning."): value for key, value in SHORT.items()}
    seq_len = info.tuning.settings["data"]["seq_len"]
    words = {"evaluation": info.recipe["evaluation"]["source"], "seq_len": seq_len}
    api.tune(str(tmp_path / "small"), "mixed-rank", str(text_file()), tmp_path / "tuned", options=given, **words)
    assert digest(tmp_path / "out" / "model.safetensors") == digest(tmp_path / "tuned" / "model.safetensors")
    assert digest(tmp_path / "out" / "model.safetensors") != digest(tmp_path / "small" / "model.safetensors")


def test_from_the_command_line_and_from_its_own_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("model"))
    words = ["--method", "svd", "--keep", "0.6", "--calibration", str(text_file()), "--seq-len", "32"]
    small = {"calibration.sequences": 4, "evaluation.windows": 2} | SHORT
    words += [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    words += ["--storage", "two-factor", "--search", "uniform", "--set", "refinement.steps=0", "--tune", "factors"]
    shown = ok("compress", "model", *words, "--dry-run").out
    assert f"the result is tuned: mode factors on {text_file()}" in " ".join(shown.split())
    Path("recipe.yaml").write_text(ok("compress", "model", *words, "--print-recipe").out)
    assert load_recipe("recipe.yaml").tuning["mode"] == "factors"
    done = ok("compress", "model", *words, "-o", "out")
    assert "factors" in done.out
    ok("run", "recipe.yaml", "-o", "again")
    assert digest(Path("out/model.safetensors")) == digest(Path("again/model.safetensors"))
    assert read_info("out").recipe == read_info("again").recipe


def test_it_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "model")
    words = {"options": {"method.steps": 4}, **LPAF}
    run(source, tmp_path / "whole", **words)
    with monkeypatch.context() as patch:
        patch.setattr(TuneTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", **words)
    monkeypatch.setattr("bolaco.transform.prune.prune", lambda *_: pytest.fail("pruned again"))
    run(source, tmp_path / "out", **words)
    assert digest(tmp_path / "out" / "model.safetensors") == digest(tmp_path / "whole" / "model.safetensors")
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(("mode", "method"), [("tt-lora", "svd"), slow("continued", "chop"), slow("sketch", "svd")])
def test_any_mode_after_any_method(mode: str, method: str, tmp_path: Path) -> None:
    """The model that an adapter would name does not stay, so it is written too."""
    source = save_tiny(tmp_path / "model")
    values = {"preset": "chop", "search": None, "keep": 1.0} if method == "chop" else {"method": method}
    info = run(source, tmp_path / "out", mode, **values).info
    assert info.tuning.mode == mode
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert torch.isfinite(next(load_model(str(tmp_path / "out")).parameters())).all()
    assert bool(load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tuning.mode": "factor"}, "tuning: .*factor"),
        ({"tuning.training.max_step": 3}, r"tuning: training\.max_step.*did you mean 'max_steps'"),
        ({"tuning.options.start": 0.5}, r"tuning: options\.start: mode 'factors' has no such option"),
        ({"tuning.model": "x"}, r"tuning\.model: it is what was compressed"),
        ({"tuning.mode": None}, "tuning: mode is missing"),
    ],
)
def test_what_is_wrong_with_the_tuning_shows_first(
    options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bolaco.runs.tuned.compress", lambda *_: pytest.fail("compressed"))
    with pytest.raises(RecipeError, match=said):
        run(save_tiny(tmp_path / "model"), tmp_path / "out", "factors", options)
    assert not (tmp_path / "out.work").exists()


def test_a_folder_that_is_no_work_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine" / "compressed").mkdir(parents=True)
    (tmp_path / "mine" / "compressed" / "notes.txt").write_text("mine")
    recipe = recipe_of(save_tiny(tmp_path / "model"), tune="factors", options=SHORT)
    with pytest.raises(ResumeError, match="mine: not a work folder of bolaco"):
        api.run(recipe, tmp_path / "out", work=tmp_path / "mine")
    assert (tmp_path / "mine" / "compressed" / "notes.txt").exists()
    # One that cannot be run leaves nothing.
    with pytest.raises(UnsupportedModelError):
        run(tmp_path / "nowhere", tmp_path / "out", "factors")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "model"}


def test_it_has_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="compress first, then `bolaco tune`"):
        run(tmp_path / "model", tmp_path / "out", "factors")


def test_a_comparison_does_not_tune() -> None:
    with pytest.raises(RecipeError, match="tuning: a comparison trains nothing"):
        api.compare("model", ["svd"], [0.5], "out", options={"svd:tuning.mode": "factors"})


def test_a_recipe_without_tuning_does_not_speak_of_it() -> None:
    recipe = make_recipe({"model": "m", "keep": 0.5})
    assert recipe.tuning is None
    assert "tuning" not in recipe.to_yaml()


def test_a_text_in_memory_is_not_trained_on(tmp_path: Path) -> None:
    """Known before anything is compressed."""
    model, options = save_tiny(tmp_path / "model", tiny_llama()), {"tuning.mode": "factors"}
    with pytest.raises(RecipeError, match=r"tuning\.data\.source"):
        api.compress(str(model), 0.7, tmp_path / "out", calibration=["a text"], options=options)
    assert not (tmp_path / "out.work").exists()
