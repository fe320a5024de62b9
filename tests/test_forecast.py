"""What a run is said to take: counts against their definitions, at the speed of a machine that is made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bolaco.models.experts import unfused
from bolaco.models.find import inspect_structure
from bolaco.models.observe import observed
from bolaco.recipe.recipe import LowRankRecipe, make_recipe
from bolaco.runs import compress as compress_run
from bolaco.runs import forecast as forecast_file
from bolaco.runs.dry_run import preview_task
from bolaco.runs.forecast import Amounts, Forecast, Machine, duration, forecast
from bolaco.runs.size import Shapes, settled
from tests.command import furnish, ok
from tests.models import TINY, compress_tiny, save_tiny, tiny_llama
from tests.types import of_type, tokens_for

LAYERS, WIDTH, WORDS = 2, 32, tiny_llama().config.vocab_size
FEW = Amounts((16, 8), (4, 8))


class Made:
    """A machine whose products, passes and eigenproblems take so many seconds for each unit of their work."""

    def __init__(self, product: float = 1.0, passes: float = 0.0, eigen: float = 0.0) -> None:
        self._product, self._passes, self._eigen = product, passes, eigen

    def product(self, rows: float, inner: int, outer: int, dtype: torch.dtype) -> float:
        return self._product * rows * inner * outer

    def passes(self, numbers: float) -> float:
        return self._passes * numbers

    def eigen(self, size: int) -> float:
        return self._eigen * size**3


def of(
    amounts: Amounts, speed: Made, model: Any = None, streamed: bool = False, preset: str = "default", **values: Any
) -> Forecast:
    search = {"rank_multiple": 4} | values.pop("search", {})
    recipe = make_recipe({"model": "tiny", "keep": 0.5, "search": search} | values, preset)
    assert isinstance(recipe, LowRankRecipe)
    model = tiny_llama() if model is None else model
    structure = observed(model, inspect_structure(model), tokens_for(model))
    shapes = Shapes(model, structure, torch.float32)
    recipe = settled(recipe, shapes)
    task = preview_task(recipe, structure, torch.float32)
    ranks = recipe.allocator.preview(task, recipe.allocator_options)
    return forecast(recipe, shapes, task, ranks, amounts, speed, streamed)


def test_the_original_is_evaluated_in_one_forward_pass() -> None:
    linears = sum(site.size for site in inspect_structure(tiny_llama()).sites)
    attention, head = LAYERS * WIDTH * 8, WIDTH * WORDS
    assert of(FEW, Made()).seconds["dense evaluation"] == 4 * 8 * (linears + attention + head)


def test_eigenproblems_are_of_the_smaller_sides() -> None:
    sides = [min(site.out_features, site.in_features) ** 3 for site in inspect_structure(tiny_llama()).sites]
    roots = LAYERS * 0.1 * WIDTH**3  # the Cholesky factor for what enters gate and up, which are tall
    assert of(FEW, Made(0.0, eigen=1.0)).seconds["factorize"] == pytest.approx(sum(sides) + roots)


@pytest.mark.parametrize("speed", [Made(), Made(0.0, 1.0)], ids=["products", "passes"])
def test_twice_the_text_takes_twice_the_time(speed: Made) -> None:
    options = {"calibration": {"gradient_sequences": 1000}, "refinement": {"steps": 0}}
    amounts = [Amounts((n, 8), (n, 8)) for n in (0, 16, 32)]
    none, once, twice = (of(a, speed, **options).seconds for a in amounts)
    for stage in ("dense evaluation", "factorize"):
        assert twice[stage] - none[stage] == pytest.approx(2 * (once[stage] - none[stage]))
        assert once[stage] > none[stage]


def test_gradients_are_of_so_many_sequences() -> None:
    few, some, every = (of(FEW, Made(), calibration={"gradient_sequences": n}).seconds["factorize"] for n in (4, 8, 99))
    assert some - few == pytest.approx((every - few) / 3)
    assert some > few


def test_steps_take_what_a_step_takes() -> None:
    one, eleven, more = (of(FEW, Made(), refinement={"steps": n, "held_out": 0}).seconds["refine"] for n in (1, 11, 21))
    assert more - eleven == pytest.approx(eleven - one)
    assert of(FEW, Made(), refinement={"steps": 11, "held_out": 4}).seconds["refine"] > eleven
    assert "refine" not in of(FEW, Made(), preset="svd-llm").seconds


def test_a_search_takes_its_trials() -> None:
    amounts = replace(FEW, validation=(3, 8))
    two, five = (of(amounts, Made(), preset="bolaco-5x1", search={"trials": n}).seconds["search"] for n in (2, 5))
    assert five == pytest.approx(2 * two)  # and the hand allocation, both times
    assert "search" not in of(FEW, Made()).seconds


def test_tokens_go_to_some_of_the_experts() -> None:
    model = unfused(of_type("mixtral"))
    structure = observed(model, inspect_structure(model), tokens_for(model))
    sizes = {site.name: site.size for site in structure.sites}
    width, words = model.config.hidden_size, model.config.vocab_size
    a_token = sum(sizes.values()) - structure.idle(sizes) + structure.num_layers * width * 8 + width * words
    assert structure.idle(sizes) > 0
    assert of(FEW, Made(), model).seconds["dense evaluation"] == pytest.approx(4 * 8 * a_token, rel=1e-3)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed weights, and hidden states in files, take less."""
    monkeypatch.setattr(forecast_file, "_resident", lambda: 0)
    model, many = tiny_llama(), Amounts((4096, 64), (4, 8))
    cached, filed = (
        of(many, Made(), model, calibration={"cache": cache, "gradient_sequences": 4096}).memory
        for cache in ("memory", "disk")
    )
    states = 4096 * 64 * WIDTH * 4
    assert cached - filed == pytest.approx((LAYERS + 2) * states, rel=0.3)
    assert of(many, Made(), model, streamed=True).memory < filed


def test_the_work_folder_is_as_large_as_foreseen(tmp_path: Any) -> None:
    options = {"refinement.steps": 2}
    done = compress_tiny(tiny_llama(), tmp_path / "out", method="kfac", storage="pivoted", options=options)
    size = sum(tensors for tensors in map(data_bytes, done.work.rglob("*.safetensors")))
    expected = of(Amounts((8, 32), (4, 32)), Made(), storage="pivoted", refinement={"steps": 2}).disk
    assert 0.4 * expected < size < 1.1 * expected


def data_bytes(file: Any) -> int:
    """Of a file without its header."""
    with file.open("rb") as opened:
        return int(file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little"))


def test_a_machine_is_measured() -> None:
    machine = Machine(torch.device("cpu"))
    assert 0 < machine.product(1, 64, 64, torch.float32) < machine.product(1000, 64, 64, torch.float32) < 1
    assert 0 < machine.passes(1e3) < machine.passes(1e6) < 1
    assert 0 < machine.eigen(64) < machine.eigen(640) < 100


def test_durations() -> None:
    found = [duration(seconds) for seconds in (3, 90, 2400, 5399, 7200, 100_000)]
    assert found == ["a minute", "2 minutes", "40 minutes", "90 minutes", "2.0 hours", "27.8 hours"]
    line = Forecast({"load": 30.0, "refine": 2400.0, "factorize": 600.0}, 3 * 2**30, 2**29).line
    assert line == (
        "about 50 minutes on this machine (refine 40 minutes, factorize 10 minutes), 3.0 GiB of memory, 0.5 GiB in the "
        "work folder"
    )


def test_a_run_that_is_long_says_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnish(tmp_path, save_tiny(tmp_path / "made")))
    settings = [f"--set={name}={value}" for name, value in TINY.items() if name.startswith(("cal", "eval"))]
    words = ["compress", "model", "--keep", "0.6", "--calibration", "text.txt", "--device", "cpu", *settings]
    words += ["--set", "refinement.steps=0", "-o"]
    assert "on this machine" not in (said := ok(*words, "short")).err + said.out
    monkeypatch.setattr(compress_run, "takes_long", lambda *_: True)
    assert "about a minute on this machine, " in ok(*words, "long").err
    assert "about a minute on this machine, " in ok(*words, "longer", "--dry-run").out
