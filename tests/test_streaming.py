"""Weights that stay in their files: pages given back, and results that are the same bytes streamed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bolaco.checkpoint import write
from bolaco.errors import BolacoError, CheckpointError
from bolaco.models import spool, walk
from bolaco.models.load import load_model
from bolaco.models.turns import needs_streaming, why_not_streamed
from bolaco.work import pages
from bolaco.work.blockstore import BlockStore
from bolaco.work.pages import mapped, release
from tests.command import digest, furnish, info, ok
from tests.models import FAMILIES, TINY, compress_tiny, mostly_slow, save_tiny, slow
from tests.types import of_type, tokens_for

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
def test_converted_weights_are_not_streamed_as_they_are(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "model"))
    assert why_not_streamed(load_model(folder, device="cpu")) == ""
    assert "not pages of files" in why_not_streamed(load_model(folder, "bfloat16", "cpu"))


def with_all(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that are not saved too."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


@linux
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize(
    "family",
    [*mostly_slow(FAMILIES, "llama", "qwen2", "gpt2"), "mixtral", "nemotron_h", slow("gpt_oss"), slow("longcat_flash")],
)
def test_a_model_is_the_same_with_all_its_weights_in_files(tmp_path: Path, family: str, dtype: str) -> None:
    model = FAMILIES[family]() if family in FAMILIES else of_type(family)
    folder, spool = str(save_tiny(tmp_path / "model", model)), tmp_path / "work" / "weights"
    plain, other = load_model(folder, dtype, "cpu"), load_model(folder, dtype, "cpu", spool=spool)
    assert not spool.exists()
    assert why_not_streamed(other) == ""
    ours, theirs = with_all(other), with_all(plain)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
        assert ours[name].dtype == tensor.dtype
    assert len({p.data_ptr() for p in other.parameters()}) == len({p.data_ptr() for p in plain.parameters()})
    tokens = tokens_for(model)
    with torch.no_grad():
        assert torch.equal(other(tokens).logits, plain(tokens).logits)
    other.save_pretrained(tmp_path / "again")  # nothing says any more that it was offloaded
    assert with_all(load_model(str(tmp_path / "again"), device="cpu")).keys() == theirs.keys()


@linux
def test_what_is_wrong_with_weights_is_said_as_ever(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 tensors are missing"):
        load_model(str(folder), device="cpu", spool=tmp_path / "spool")
    save_file(weights | {"model.layers.1.mlp.up_proj.weight": lost[:-1]}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing or have another shape"):
        load_model(str(folder), device="cpu", spool=tmp_path / "spool")
    assert not (tmp_path / "spool").exists()


@linux
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(spool, "save_file", full)
    folder = str(save_tiny(tmp_path / "model"))
    with pytest.raises(BolacoError, match="spool: no space left for weights") as error:
        load_model(folder, "bfloat16", "cpu", spool=tmp_path / "spool")
    assert not isinstance(error.value, CheckpointError)
    assert not (tmp_path / "spool").exists()


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
@pytest.mark.parametrize("family", ["mixtral", slow("nemotron_h")])
def test_fused_experts_and_another_number_format_are_streamed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.chdir(furnish(tmp_path, save_tiny(tmp_path / "made", of_type(family))))
    whole, _ = run("whole", "--set", "stream=false", "--dtype", "bfloat16")
    streamed, said = run("streamed", "--set", "stream=true", "--dtype", "bfloat16")
    assert "weights are streamed" in said
    assert "not streamed" not in said
    assert streamed == whole


@linux
def test_what_cannot_be_streamed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnish(tmp_path))
    monkeypatch.setattr("bolaco.models.turns.mapped", lambda tensors: (0, 1))
    _, said = run("out", "--set", "stream=true")
    assert "weights are not streamed and stay in memory as a whole: they are not pages of files here" in said


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
