"""Early stopping: training ends when the evaluation text has nothing more to gain, and the best weights stay."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from bolaco import api
from bolaco.checkpoint.info import TuningRecord
from bolaco.report.tables import tuning_table
from bolaco.tune import run as run_module
from bolaco.tune.trainer import TuneTrainer
from tests.command import digest
from tests.models import compressed, save_tiny, slow, text_file

SMALL = {"evaluation.windows": 4, "training.autocast": False, "training.warmup": 0, "data.sequences": 4}
SMALL |= {"training.schedule": "constant", "training.patience": 2, "training.save_steps": 1}


def run(out: Path, mode: str = "tt-lora", options: dict[str, Any] | None = None, **words: Any) -> TuningRecord:
    given = {"max_steps": 30, "batch": 4, "seq_len": 32, "learning_rate": 0.1} | words
    settings = SMALL | (options or {})
    result = api.tune(str(compressed("llama").path), mode, str(text_file()), out, options=settings, **given)
    assert result is not None
    assert result.info.tuning is not None
    return result.info.tuning


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was found at each look, in order."""
    found: list[float] = []
    evaluate = TuneTrainer.evaluate

    def looking(self: Any, *args: Any, **more: Any) -> Any:
        metrics = evaluate(self, *args, **more)
        found.append(metrics["eval_loss"])
        return metrics

    monkeypatch.setattr(TuneTrainer, "evaluate", looking)
    return found


@pytest.mark.parametrize("mode", ["tt-lora", slow("factors"), slow("mixed-rank"), slow("sketch")])
def test_training_ends_and_the_best_weights_stay(mode: str, losses: list[float], tmp_path: Path) -> None:
    original = save_tiny(tmp_path / "original", compressed("llama").original)
    options = {"options.original": str(original)} if mode == "mixed-rank" else {}
    record = run(tmp_path / "out", mode, options)
    best = losses.index(min(losses))
    assert record.steps == len(losses) == best + 3 < record.of_steps  # two looks in vain
    assert record.best_step == best + 1
    assert not record.out_of_time
    assert math.log(record.perplexity.after) == pytest.approx(min(losses), rel=1e-2 if mode == "sketch" else 1e-4)
    assert f"{record.steps} of 30, best {best + 1}" in list(tuning_table(record).columns[1].cells)


def test_the_best_weights_stay_where_patience_lasts(losses: list[float], tmp_path: Path) -> None:
    record = run(tmp_path / "out", options={"training.patience": 99}, max_steps=5)
    assert record.steps == len(losses) == 5
    assert record.best_step == losses.index(min(losses)) + 1
    assert math.log(record.perplexity.after) == pytest.approx(min(losses), rel=1e-4)


class Stopped(Exception):
    """What ends a run in these tests."""


@pytest.mark.parametrize("when", ["on the way", "at the end"])
def test_it_goes_on_after_an_interruption(
    when: str, losses: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, evaluate = run(tmp_path / "whole"), TuneTrainer.evaluate
    looks = len(losses)

    def stopping(*args: Any, **more: Any) -> Any:
        if len(losses) == looks + looks - 1:
            raise Stopped
        return evaluate(*args, **more)

    def never(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        if when == "on the way":
            patch.setattr(TuneTrainer, "evaluate", stopping)
        else:
            patch.setattr(run_module, "save_trained", never)
        with pytest.raises(Stopped):
            run(tmp_path / "out")
    again = run(tmp_path / "out")
    assert len(losses) == 2 * looks  # none was made twice
    assert (again.steps, again.best_step, again.curve) == (whole.steps, whole.best_step, whole.curve)
    assert digest(tmp_path / "out" / "adapter_tt.safetensors") == digest(tmp_path / "whole" / "adapter_tt.safetensors")


def test_without_it_nothing_is_looked_at(losses: list[float], tmp_path: Path) -> None:
    record = run(tmp_path / "out", options={"training.patience": None}, max_steps=3)
    assert losses == []
    assert record.best_step is None
