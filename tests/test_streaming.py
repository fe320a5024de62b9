"""Weights that stay in their files: pages given back, and results that are the same bytes streamed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bolaco.checkpoint import write
from bolaco.models import walk
from bolaco.models.load import load_model
from bolaco.models.turns import needs_streaming, why_not_streamed
from bolaco.work import pages
from bolaco.work.blockstore import BlockStore
from bolaco.work.pages import mapped, release
from tests.command import digest, furnish, info, ok
from tests.models import FAMILIES, TINY, compress_tiny, mostly_slow, save_tiny

linux = pytest.mark.skipif(not pages._PAGEMAP.exists(), reason="only Linux says what pages are")


def mapped_tensor(folder: Path, size: int = 4_000_000) -> torch.Tensor:
    save_file({"a": torch.arange(size, dtype=torch.float32)}, folder / "a.safetensors")
    with safe_open(folder / "a.safetensors", framework="pt") as file:
        found: torch.Tensor = file.get_tensor("a")
    return found


@linux
def test_pages_of_a_file_are_given_back_and_read_again(tmp_path: Path) -> None:
    tensor = mapped_tensor(tmp_path)
    total = tensor.double().sum()
    resident = psutil.Process().memory_info().rss
    freed = release([tensor])
    assert freed >= 0.9 * tensor.nbytes
    assert psutil.Process().memory_info().rss < resident - 0.8 * tensor.nbytes
    assert tensor.double().sum() == total


@linux
def test_pages_that_were_written_to_stay(tmp_path: Path) -> None:
    tensor = mapped_tensor(tmp_path)
    tensor[1000] = -5.0
    assert release([tensor]) == 0
    assert tensor[1000] == -5.0
    assert tensor[1001] == 1001.0


def test_memory_that_is_no_file_stays() -> None:
    tensor = torch.arange(1_000_000)
    assert release([tensor, torch.empty(0), torch.empty(3, device="meta")]) == 0
    assert torch.equal(tensor, torch.arange(1_000_000))


@linux
def test_what_is_mapped_is_told_apart(tmp_path: Path) -> None:
    tensor = mapped_tensor(tmp_path, 1000)
    assert mapped([tensor, tensor]) == (4000, 4000)
    assert mapped([tensor, torch.zeros(500)]) == (4000, 6000)


def test_what_is_asked_for_comes_before_what_fits() -> None:
    assert needs_streaming(1, True)
    assert not needs_streaming(10**15, False)
    assert needs_streaming(10**15, None)
    assert not needs_streaming(1, None)


@linux
def test_converted_weights_are_not_streamed(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "model"))
    assert why_not_streamed(load_model(folder, device="cpu")) == ""
    assert "number format" in why_not_streamed(load_model(folder, "bfloat16", "cpu"))


def run(out: str, *more: str) -> tuple[dict[str, Any], str]:
    """What counts of a small default run in this folder, and what it said."""
    settings = [f"--set={name}={value}" for name, value in TINY.items() if name.startswith(("cal", "eval"))]
    words = ["compress", "model", "--keep", "0.6", "--calibration", "text.txt", "--eval", "other.txt", "-o", out]
    done = ok(*words, "--device", "cpu", *settings, *more)
    record = info(out)
    del record["seconds"], record["recipe"]
    return record | {file.name: digest(file) for file in Path(out).glob("*.safetensors")}, done.out + done.err


@linux
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "llama", "gemma2", "gpt2"))
def test_the_result_is_the_same_streamed_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.chdir(furnish(tmp_path, save_tiny(tmp_path / "made", FAMILIES[family]())))
    monkeypatch.setattr(write, "FILE_BYTES", 30_000)
    whole, said = run("whole", "--set", "stream=false")
    assert "streamed" not in said
    streamed, said = run("streamed", "--set", "stream=true")
    assert "weights are streamed" in said
    assert streamed == whole
    assert sum(name.endswith(".safetensors") for name in whole) > 1
    assert {path.name for path in Path("streamed").iterdir()} == {path.name for path in Path("whole").iterdir()}


@linux
def test_a_streamed_run_that_was_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(furnish(tmp_path))
    whole, _ = run("whole", "--set", "stream=false")
    with monkeypatch.context() as patch:

        def killed(self: BlockStore, layer: int, ending: str = "") -> dict[str, torch.Tensor]:
            if self.folder.name == "parts" and layer == 1:
                raise KeyboardInterrupt
            return read(self, layer, ending)

        read = BlockStore.read
        patch.setattr(BlockStore, "read", killed)
        with pytest.raises((KeyboardInterrupt, AssertionError)):
            run("out", "--set", "stream=true")
    assert not Path("out").exists()
    assert run("out", "--set", "stream=true")[0] == whole


@linux
def test_what_cannot_be_streamed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnish(tmp_path))
    _, said = run("out", "--set", "stream=true", "--dtype", "bfloat16")
    assert "weights are not streamed and stay in memory as a whole: they are not in memory as they are" in said


def test_hidden_states_go_to_files_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not tell; ``memory`` is obeyed."""
    files: list[Path] = []
    real = walk.preallocate
    monkeypatch.setattr(walk, "preallocate", lambda file, *rest: files.append(file) or real(file, *rest))
    values = {"method": "kfac", "storage": "pivoted"}
    options = {"refinement.steps": 2, "refinement.held_out": 1}
    found, weights = {}, "model.safetensors"
    for name, share, cache in (("room", 0.25, "auto"), ("short", 0.0, "auto"), ("asked", 0.0, "memory")):
        monkeypatch.setattr(walk, "_CACHED", share)
        files.clear()
        given = options | {"calibration.cache": cache}
        out = compress_tiny(FAMILIES["llama"](), tmp_path / name, options=given, **values).path
        found[name] = {file.name.split("-")[0] for file in files}, digest(out / weights)
    assert found["room"] == found["asked"] == (set(), found["short"][1])
    assert found["short"][0] == {"inputs", "hidden.cache", "original.cache", "compressed.cache"}
