"""The work folder of tuning: what depends on a change runs again, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bolaco import api
from bolaco.errors import ResumeError
from bolaco.settings import Section
from bolaco.tune import run
from bolaco.tune.settings import TuneSettings
from bolaco.tune.trainer import TuneTrainer, _Watch
from tests.command import digest
from tests.models import compressed, english, mostly_slow, save_tiny, write_english

OPTIONS = {"evaluation.windows": 3, "training.autocast": False, "training.warmup": 0, "data.sequences": 8}
WORDS = {"data": "text.txt", "evaluation": "other.txt", "max_steps": 3, "batch": 4, "seq_len": 16}


def tune(out: str, **given: Any) -> dict[str, Any]:
    """A run of three steps in the current folder, into ``work``; returns all of ``bolaco.json`` but seconds.

    Words replace those of :data:`WORDS`; ``options`` are laid over :data:`OPTIONS`, and None takes one away.
    """
    options = {key: value for key, value in (OPTIONS | given.pop("options", {})).items() if value is not None}
    words = {"model": "small", "mode": "factors", "learning_rate": 1e-3} | WORDS | given
    api.tune(words.pop("model"), words.pop("mode"), words.pop("data"), out, work="work", options=options, **words)
    record = json.loads(Path(out, "bolaco.json").read_text(encoding="utf-8"))
    del record["tuning"]["seconds"]
    return record | {"weights": digest(Path(out, "model.safetensors"))}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a run needs, and the work folder of one that is trained and was stopped afterwards."""
    folder = tmp_path_factory.mktemp("started")
    source = compressed("llama")
    shutil.copytree(source.path, folder / "small")
    save_tiny(folder / "original", source.original)
    write_english(folder / "text.txt", 400, 1)
    write_english(folder / "other.txt", 200, 2)
    write_english(folder / "third.txt", 200, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(run, "_write", stopping)
        with pytest.raises(Stopped):
            tune("out")
    assert {path.name for path in folder.iterdir()} == {
        "original",
        "small",
        "text.txt",
        "other.txt",
        "third.txt",
        "work",
    }
    return folder


@pytest.fixture
def place(started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current folder."""
    shutil.copytree(started, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


class Stopped(Exception):
    """What ends a run in these tests."""


def stopping(*_: Any) -> Any:
    raise Stopped


@dataclasses.dataclass
class Seen:
    """How often the input was measured, and how often training began."""

    before: int = 0
    trained: int = 0

    def forget(self) -> None:
        self.before = self.trained = 0

    def stopping(self, *_: Any, **__: Any) -> None:
        """In the place of the trainer's constructor."""
        self.trained += 1
        raise Stopped


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    measure, train = run.measure, TuneTrainer.train

    def measuring(model: Any, data: Any, settings: Any, reporter: Any, title: str) -> Any:
        found.before += title == "evaluate the input"
        return measure(model, data, settings, reporter, title)

    def training(self: Any, **more: Any) -> Any:
        found.trained += 1
        return train(self, **more)

    monkeypatch.setattr(run, "measure", measuring)
    monkeypatch.setattr(TuneTrainer, "train", training)
    return found


def other_weights() -> None:
    file = Path("small/model.safetensors")
    state = load_file(file)
    state["model.norm.weight"] *= 1.5
    save_file(state, file, metadata={"format": "pt"})


def other_text(file: str) -> Callable[[], None]:
    return lambda: Path(file).write_text(english(400, 9), encoding="utf-8")


# What is changed -> words of the run, whether the input is measured again, and whether it is trained again. A function
# among the words is called before the run.
CHANGES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "nothing": ({}, False, False),
    # What only the measurement depends on.
    "evaluation.windows": ({"options": {"evaluation.windows": 2}}, True, False),
    "evaluation.source": ({"evaluation": "third.txt"}, True, False),
    "text of the evaluation": ({"first": other_text("other.txt")}, True, False),
    # What only the training depends on.
    "mode": ({"mode": "diagonal"}, False, True),
    "options": ({"options": {"options.norms": True}}, False, True),
    "types": ({"types": ("q", "gate")}, False, True),
    "seed": ({"seed": 3}, False, True),
    "training.max_steps": ({"max_steps": 2}, False, True),
    "training.epochs": ({"max_steps": None, "epochs": 1.0}, False, True),
    "training.minutes": ({"minutes": 9}, False, True),
    "training.learning_rate": ({"learning_rate": 2e-3}, False, True),
    "training.warmup": ({"options": {"training.warmup": 2}}, False, True),
    "training.schedule": ({"options": {"training.schedule": "constant"}}, False, True),
    "training.final_rate": ({"options": {"training.final_rate": 0.9}}, False, True),
    "training.weight_decay": ({"options": {"training.weight_decay": 0.5}}, False, True),
    "training.gradient_accumulation": ({"options": {"training.gradient_accumulation": 2}}, False, True),
    "training.max_grad_norm": ({"options": {"training.max_grad_norm": 0.01}}, False, True),
    "training.patience": ({"options": {"training.patience": 5}}, False, True),
    "training.autocast": ({"options": {"training.autocast": True}}, False, True),
    "trainer": ({"options": {"trainer.adam_epsilon": 1e-2}}, False, True),
    "dtype": ({"dtype": "auto"}, False, True),
    "distillation": ({"distill": 0.5, "teacher": "original"}, False, True),
    "data.source": ({"data": "third.txt"}, False, True),
    "data.text_column": ({"options": {"data.text_column": "body"}}, False, True),
    "data.sequences": ({"options": {"data.sequences": 6}}, False, True),
    "data.train_on": ({"options": {"data.train_on": "all"}}, False, True),
    "text of the data": ({"first": other_text("text.txt")}, False, True),
    "model": ({"first": lambda: Path("small").rename("moved"), "model": "moved"}, False, True),
    # What both depend on.
    "weights": ({"first": other_weights}, True, True),
    "data.seq_len": ({"seq_len": 24}, True, True),
    "bos": ({"options": {"bos": "window"}}, True, True),
    "training.batch": ({"batch": 2}, True, True),
    "chunk": ({"options": {"chunk": 5}}, True, True),
    "held out of the data": ({"evaluation": None}, True, True),
    # What neither depends on.
    "training.save_steps": ({"options": {"training.save_steps": 1}}, False, False),
    "device": ({"device": "cpu"}, torch.cuda.is_available(), torch.cuda.is_available()),
}


# Of these the result is compared with that of a fresh run: where both are kept, one of them, and neither.
COMPARED = (
    "nothing",
    "evaluation.source",
    "text of the evaluation",
    "mode",
    "training.learning_rate",
    "distillation",
    "text of the data",
    "weights",
    "held out of the data",
)


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in COMPARED])
def test_what_depends_on_a_change_runs_again(
    change: str, place: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stages are over once training begins, or the result is to be written."""
    words, before, trained = CHANGES[change]
    words = dict(words)
    words.pop("first", lambda: None)()
    monkeypatch.setattr(run, "_write", stopping)
    monkeypatch.setattr("bolaco.tune.trainer.TuneTrainer.__init__", seen.stopping)
    with pytest.raises(Stopped):
        tune("out", **words)
    assert (seen.before, seen.trained) == (before, trained)


@pytest.mark.parametrize(
    "change",
    mostly_slow(COMPARED, "evaluation.source", "mode", "training.learning_rate", "distillation", "weights"),
)
def test_the_result_is_that_of_a_fresh_run(change: str, place: Path, seen: Seen) -> None:
    words, before, trained = CHANGES[change]
    words = dict(words)
    words.pop("first", lambda: None)()
    found = tune("out", **words)
    assert (seen.before, seen.trained) == (before, trained)
    assert not Path("work").exists()
    # The work folder is gone: this run does everything.
    seen.forget()
    assert tune("fresh", **words) == found
    assert (seen.before, seen.trained) == (1, 1)


def test_every_setting_is_among_them() -> None:
    """Whoever adds a setting has to say what depends on it."""
    names = set()
    for name, field in TuneSettings.model_fields.items():
        section = field.annotation
        inner = section.model_fields if isinstance(section, type) and issubclass(section, Section) else ()
        names |= {f"{name}.{key}" for key in inner} or {name}
    together = {"distillation": {"distillation.weight", "distillation.teacher"}}
    tried = set().union(*(together.get(change, {change}) for change in CHANGES))
    assert names - tried == {"version"}


def test_only_the_same_run_goes_on_from_a_checkpoint(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree("work")
    first = {"options": {"training.save_steps": 1}, "keep_work": True}
    other = first | {"learning_rate": 2e-3}
    with monkeypatch.context() as patch:
        save = _Watch.on_save

        def stopping_at(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
            save(self, args, state, control, **more)
            if state.global_step == 2:
                raise Stopped

        patch.setattr(_Watch, "on_save", stopping_at)
        with pytest.raises(Stopped):
            tune("out", **first)
    begun: list[int] = []
    start = _Watch.on_train_begin

    def beginning(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        begun.append(state.global_step)
        start(self, args, state, control, **more)

    monkeypatch.setattr(_Watch, "on_train_begin", beginning)
    found = tune("other", **other)
    again = tune("out", **first)
    assert begun == [0, 2]
    shutil.rmtree("work")
    assert tune("fresh-other", **other) == found
    assert tune("fresh", **first) == again


@pytest.mark.parametrize("file", ["before-*.json", "trained-*.json", "trained-*/trained.safetensors"])
def test_a_damaged_file_is_named(file: str, place: Path) -> None:
    (found,) = Path("work").glob(file)
    found.write_bytes(found.read_bytes()[:20])
    with pytest.raises(ResumeError, match=rf"{found}: (missing or )?damaged") as caught:
        tune("out")
    assert "\n" not in str(caught.value)
    assert "delete" in str(caught.value)
    assert not Path("out").exists()
