"""A run of `bolaco delta` that is killed at any moment ends, given again, with the same bytes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command import digest, ok
from tests.deltas import delta_words, save_pair
from tests.models import slow
from tests.processes import killed

# moment -> method, and when it is: function, in which call of it, before or after.
MOMENTS = {
    "between two blocks of gradients": ("default", "bolaco.work.blockstore.BlockStore.write", 1, "after"),
    "between two blocks of spectra": ("default", "bolaco.work.blockstore.BlockStore.write", 6, "after"),
    "between two quantized blocks": ("default", "bolaco.delta.method.FormStore.save", 1, "after"),
    "between two blocks of Delta-CoMe": ("delta-come", "bolaco.delta.method.FormStore.save", 1, "after"),
    "between two steps of BitDelta": ("bitdelta", "torch.autograd.grad", 12, "before"),
    "while the tensors are written": ("lowrank", "bolaco.delta.run.write_tensors", 1, "before"),
    "before the result is measured": ("lowrank", "bolaco.delta.run.read_delta", 1, "before"),
}
CHANGES: dict[str, dict[str, Any]] = {
    "default": {"options_rounds": 1},
    "bitdelta": {"options_steps": 14, "options_length": 32},
}
LEFT_OUT = ("between two blocks of spectra", "while the tensors are written")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the killed processes: sums must be added in the same order to give the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair; leave it as it is."""
    return save_pair(tmp_path_factory.mktemp("pair"))


def words(out: str, method: str) -> list[str]:
    return delta_words(out, method=method, ratio="1/2", **CHANGES.get(method, {}))


def what_counts(out: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((Path(out) / "bolaco.json").read_text())
    del record["seconds"]
    return record | {"tensors": digest(Path(out) / "delta.safetensors")}


@pytest.mark.parametrize("moment", [slow(moment) if moment in LEFT_OUT else moment for moment in MOMENTS])
def test_killed(moment: str, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("base", "tuned", "text.txt"):
        (tmp_path / place).symlink_to(pair / place)
    monkeypatch.chdir(tmp_path)
    method, *when = MOMENTS[moment]
    done = killed(*when, words("out", method))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not Path("out").exists()
    finished = {path: path.stat().st_mtime_ns for path in Path("out.work").rglob("block-*.safetensors")}
    assert bool(finished) == (method != "bitdelta")
    ok(*words("out", method), "--keep-work")
    # A walk of gradients repeats the block after which it has not yet kept where it was.
    kept = [path for path in finished if not path.relative_to("out.work").parts[0].startswith("gradient")]
    assert [path.stat().st_mtime_ns for path in kept] == [finished[path] for path in kept]
    ok(*words("whole", method))
    assert what_counts("out") == what_counts("whole")
    assert list(Path().glob(".*")) == []
