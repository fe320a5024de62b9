"""Several processes of torchrun on one run: what they find is what one finds, but for rounding."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bolaco.models.load import load_model
from bolaco.parallel.spread import Piece, spread
from tests.command import furnish, info, ok
from tests.models import FAMILIES, save_tiny
from tests.types import of_type, tokens_for

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "calibration.sequences": 9,
    "calibration.batch": 3,
    "calibration.gradient_sequences": 7,
    "calibration.groups": 4,
    "search.rank_multiple": 4,
    "evaluation.windows": 4,
}


def words(command: str, model: str, out: str, *more: str, **settings: Any) -> list[str]:
    given = SETTINGS | {name.replace("__", "."): value for name, value in settings.items()}
    sets = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    fixed = ["--calibration", "text.txt", "--seq-len", "32", "--device", "cpu"]
    return [command, model, *fixed, *sets, *more, "-o", out]


def started(ranks: int, *script: str) -> subprocess.CompletedProcess[str]:
    """``tests.ranks_script`` by torchrun, in this folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "tests.ranks_script", *script]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def together(ranks: int, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    Path("commands.json").write_text(json.dumps(commands))
    return started(ranks, "commands", "commands.json")


def apart(one: str, other: str) -> float:
    """The largest difference between the logits of two results, by the largest of them."""
    found = []
    for folder in (one, other):
        model = load_model(folder, device="cpu")
        with torch.no_grad():
            found.append(model(tokens_for(model)).logits.double())
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())


def test_what_processes_do_together() -> None:
    done = started(2, "check")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is content") == 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and a text."""
    folder = furnish(tmp_path_factory.mktemp("ranks"), save_tiny(tmp_path_factory.mktemp("made") / "model"))
    save_tiny(folder / "mixtral", of_type("mixtral"))
    save_tiny(folder / "gemma2", FAMILIES["gemma2"]())
    return folder


TRAINED = {"refinement__steps": 6, "refinement__held_out": 3, "refinement__autocast": "false"}
PLAIN = {"refinement__steps": 0}
SEARCH = ["--keep", "0.6", "--search", "5x1", "--method", "afm", "--set", "validation.candidates=6"]
SEARCH += ["--set", "validation.sequences=3", "--set", "search.trials=4", "--set", "search.initial=2"]


@pytest.fixture(scope="module")
def both(place: Path) -> str:
    """The same runs by two processes, all in one job, and by one; what the two have said."""
    before = Path.cwd()
    os.chdir(place)
    try:

        def runs(kind: str) -> list[list[str]]:
            return [
                words("compress", "model", f"{kind}-trained", "--keep", "0.6", **TRAINED),
                words("compress", "mixtral", f"{kind}-experts", "--keep", "0.6", **PLAIN),
                words("compress", "gemma2", f"{kind}-quantized", "--keep", "0.6", "--quantize", "int4", **PLAIN),
                words("compress", "model", f"{kind}-searched", *SEARCH, **PLAIN),
                words("compress", "model", f"{kind}-several", "--keep", "0.5,0.7", "--method", "asvd"),
                words("compare", "model", f"{kind}-compared", "--keep", "0.6", "--methods", "fwsvd,chop"),
            ]

        done = together(2, *runs("two"))
        assert done.returncode in (0, 1), done.stderr
        for run in runs("one"):
            (ok if run[0] == "compress" else lambda *w: ok(*w))(*run)
        return done.stdout + done.stderr
    finally:
        os.chdir(before)


def test_a_run_of_two_is_that_of_one(both: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert apart("one-trained", "two-trained") < 2e-4
    assert apart("one-experts", "two-experts") < 1e-5
    assert apart("one-searched", "two-searched") < 1e-5
    for name in ("keep-0.5", "keep-0.7"):
        assert apart(f"one-several/{name}", f"two-several/{name}") < 1e-5
    one, two = info("one-searched")["trials"], info("two-searched")["trials"]
    assert [trial["keep"] for trial in one] == [trial["keep"] for trial in two]
    assert [t["objective"] for t in one] == pytest.approx([t["objective"] for t in two], rel=1e-4)
    losses = [info(f"{n}-quantized")["perplexity"]["compressed"] for n in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    results = [json.loads(Path(f"{n}-compared/results.json").read_text())["rows"] for n in ("one", "two")]
    gaps = [[row.get("gap") for row in rows] for rows in results]
    assert gaps[0][0] == pytest.approx(gaps[1][0], abs=1e-4)
    assert [row.get("error") for row in results[0]] == [row.get("error") for row in results[1]]


def test_the_first_process_speaks(both: str) -> None:
    assert both.count("written to two-trained") == 1
    for model, runs in (("model", 4), ("mixtral", 1), ("gemma2", 1)):
        assert both.count(f"loading {model}\n") == runs
    assert "Traceback" not in both


def test_a_process_that_is_killed_ends_the_run_and_any_number_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    run = words("compress", "model", "killed", "--keep", "0.6", **TRAINED)
    Path("commands.json").write_text(json.dumps([run]))
    done = started(2, "commands", "commands.json", "1")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("bolaco: ")]
    assert len(said) == 1
    assert re.search("rank 0: another process of this run has ended|bolaco: stopped; the same command", said[0])
    assert not Path("killed").exists()
    assert list(Path("killed.work").glob("factors-*/block-00000.safetensors"))
    assert not list(Path("killed.work").glob("factors-*/block-00001.safetensors"))
    ok(*run)
    ok(*words("compress", "model", "alone", "--keep", "0.6", **TRAINED))
    assert apart("killed", "alone") < 2e-4


def test_what_one_process_does_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("WORLD_SIZE", "2")
    from tests.command import bolaco

    done = bolaco("inspect", "model")
    assert done.code == 1
    assert "inspect is done by one process; start it without torchrun" in done.err
    done = bolaco(*words("compress", "model", "out", "--keep", "0.9", "--method", "chop")[:3], "--keep", "0.9")
    assert done.code != 0


def test_work_is_spread_by_cost() -> None:
    costs = [9.0, 5.0, 4.0, 3.0, 3.0]
    given = spread([Piece(cost) for cost in costs], 2)
    loads = [sum(cost for cost, worker in zip(costs, given, strict=True) if worker == n) for n in (0, 1)]
    assert sorted(loads) == [12.0, 12.0]
    common = Piece(1.0, "root", 10.0)
    assert spread([common, Piece(100.0), common], 2) == [1, 0, 1]  # what is in common is done once
    assert spread([], 3) == []
    assert torch.tensor(spread([Piece(1.0)] * 6, 3)).bincount().tolist() == [2, 2, 2]
