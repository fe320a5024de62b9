"""benchmarks/fuzz.py: a small number of mutations of each class, and that it sees what it looks for."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.types import BENCHMARKS

# All but those of adapters: to tune takes seconds.
CLASSES = (
    *("bolaco.json", "set", "recipe", "results.json", "curves.json", "lowrank", "config.json", "model config"),
    *("weights", "questions", "index", "tokenizer", "instructions", "delta"),
)
# Together they are to take seconds.
EACH = 4


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import fuzz

        yield fuzz
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def inputs(fuzz: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield fuzz.make_inputs(tmp_path_factory.mktemp("fuzz"), ["llama"], more=False)


def test_there_is_as_much_of_everything_as_it_says(fuzz: Any) -> None:
    assert fuzz.COUNTS.keys() == fuzz.CLASSES.keys()
    assert sum(fuzz.COUNTS.values()) == 3617
    assert set(fuzz.CLASSES) == {*CLASSES, "adapter"}
    assert sum(fuzz.shares(None, None).values()) == 3617
    assert fuzz.shares(10, "set") == {"set": 10}
    assert min(fuzz.shares(20, None).values()) == 1


@pytest.mark.parametrize("name", CLASSES)
def test_mutations_are_fine_or_one_line(name: str, fuzz: Any, inputs: Any) -> None:
    for number in range(EACH):
        found = fuzz.tried(inputs, name, number, seed=11)
        assert found.kind not in fuzz.FAULTS, f"{name} {number}: {found.trial}\n{found.command}\n{found.output}"


def test_a_mutation_is_the_same_again(fuzz: Any, inputs: Any) -> None:
    once, again = (fuzz.tried(inputs, "curves.json", 1, seed=3) for _ in range(2))
    assert (once.kind, once.trial) == (again.kind, again.trial)
    assert fuzz.tried(inputs, "curves.json", 1, seed=4).trial != once.trial
    assert not list(inputs.folder.glob("fuzz-*"))


def _crash() -> None:
    raise RuntimeError("nobody expects this")


def _endless() -> None:
    time.sleep(60)


def _much() -> None:
    bytearray(2**40)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (dict, "fine"),
        (["inspect", "there is no such folder"], "one line"),
        (["inspect"], "one line"),
        (_crash, "traceback"),
        (_killed, "traceback"),
        (_endless, "hang"),
        (_much, "memory"),
    ],
)
def test_it_tells_faults_from_errors(
    call: Any, kind: str, fuzz: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial: Callable[..., Any] = lambda *_: fuzz.Trial("", call)  # noqa: E731
    monkeypatch.setitem(fuzz.CLASSES, "set", trial)
    assert fuzz.tried(inputs, "set", 0, limit=0.5 if kind == "hang" else 20.0).kind == kind


def test_values_are_mutated_at_every_depth(fuzz: Any) -> None:
    from fuzz_mutations import as_json, damaged, mutated

    values = {"a": 1, "b": [{"c": "x"}], "d": {}}
    found = [mutated(values, random.Random(seed)) for seed in range(60)]
    assert values == {"a": 1, "b": [{"c": "x"}], "d": {}}
    assert sum(changed != values for changed, _ in found) > 50
    assert {said.partition(":")[0] for _, said in found} >= {"a", "b", "b.0", "b.0.c", "d"}
    assert as_json({"a": "@deep@"}).count("[") == 10**5
    assert "NaN" in as_json([float("nan")])
    assert any(damaged(json.dumps(values).encode(), random.Random(seed))[0] == b"" for seed in range(60))
