"""Folders, disks and signals that are in the way cost nobody anything: no file is lost, none is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bolaco.allocate.search.run import Evaluator
from bolaco.models.find import inspect_structure
from bolaco.runs import compress as runs
from bolaco.work import tensors as tensors_module
from tests.bad_input.common import contents, one_line, refused
from tests.command import bolaco, compress, ok, snapshot, what_counts
from tests.models import english, save_tiny, slow, tiny_llama

PYTHON_LOCK = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


# --- output and work folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full folder", "empty folder", "file"])
def test_existing_output(place: Path, kind: str) -> None:
    if kind == "file":
        Path("out").write_text("mine")
    else:
        Path("out").mkdir()
    if kind == "full folder":
        Path("out/notes.txt").write_text("mine")
    refused(compress("out"), "out: exists already and is not overwritten")
    refused(["export", "model", "--dense", "-o", "out"], "")


def test_output_that_appears_meanwhile(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = runs.perplexities_of

    def slow(*args: Any) -> Any:
        Path("out").mkdir()
        Path("out/notes.txt").write_text("mine")
        return measure(*args)

    monkeypatch.setattr(runs, "perplexities_of", slow)
    one_line(bolaco(*compress("out", "--search", "hand")), "out: exists already and is not overwritten")
    assert snapshot("out").keys() == {"out/notes.txt"}
    assert list(Path().glob(".*")) == []


@pytest.mark.parametrize(
    ("out", "work"), [("same", "same"), ("work/out", "work"), ("out", "out/work"), ("out", "./out")]
)
def test_output_and_work_folder_inside_each_other(place: Path, out: str, work: str) -> None:
    refused(compress(out, "--work", work), "must not be one inside the other")


@pytest.mark.parametrize("out", ["text.txt/out", "text.txt/deep/out"])
def test_a_file_where_a_folder_should_be(place: Path, out: str) -> None:
    refused(compress(out), "is not a folder")


def test_a_file_as_work_folder(place: Path) -> None:
    refused(compress("out", "--work", "text.txt"), "text.txt: exists and is not a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(place: Path) -> None:
    Path("closed").mkdir(mode=0o500)
    refused(compress("closed/out"), "closed", "Permission denied")


def test_unrelated_work_folder(place: Path) -> None:
    Path("papers").mkdir()
    Path("papers/thesis.tex").write_text("mine")
    refused(compress("out", "--work", "papers"), "papers: not a work folder of bolaco")
    Path("papers/recipe.json").write_text('{"dough": "500 g"}')
    refused(compress("out", "--work", "papers"), "papers: not a work folder of bolaco")
    Path("papers/thesis.tex").unlink()
    refused(compress("out", "--work", "papers"), "papers: not a work folder of bolaco")
    Path("papers/recipe.json").write_text("[]")
    refused(compress("out", "--work", "papers"), "papers/recipe.json: damaged")


def test_work_folder_of_an_earlier_version(place: Path) -> None:
    Path("old.work/factors").mkdir(parents=True)
    Path("old.work/recipe.json").write_text('{"version": 1, "keep": 0.8, "model": "model"}')
    Path("old.work/factors/block-00000.safetensors").write_text("factors")
    refused(compress("out", "--work", "old.work"), "old.work: started by an earlier version", "delete the folder")


def _other_recipe() -> list[str]:
    return compress("out", "--seed", "4", search_min_keep=0.3)


def _other_weights() -> list[str]:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.01
    Path("model").unlink()
    save_tiny(Path("model"), model)
    return compress("out")


def _other_text() -> list[str]:
    Path("text.txt").write_text(english(1200, seed=7))
    return compress("out")


@pytest.mark.parametrize("other", [_other_recipe, _other_weights, slow(_other_text)])
def test_work_folder_of_something_else_is_of_no_harm(begun: Path, other: Callable[[], list[str]]) -> None:
    """What was there stays there, and the result is as if nothing had been."""
    words = other()
    before = {name: value for name, value in contents().items() if name.startswith("out.work/")}
    del before["out.work/recipe.json"]
    ok(*words, "--keep-work")
    assert before.items() <= contents().items()
    Path("out").rename("found")
    ok(*words, "--work", "fresh.work")
    assert what_counts("found") == what_counts("out")


def test_work_folder_in_use(begun: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", PYTHON_LOCK, "out.work.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        refused(compress("out"), "out.work: another run is using this work folder")
    finally:
        holder.communicate("")
    ok(*compress("out"))


# File in a work folder -> what the message says to delete.
DELETED = {
    "recipe.json": "the folder out.work",
    "dense-*.json": "this file",
    "search-*/selection.json": "it",
    "factors-*/top.json": "the folder out.work/factors-*",
}


@pytest.mark.parametrize(
    ("pattern", "text"),
    [(pattern, '{"half": ') for pattern in DELETED]
    + [("search-*/selection.json", "[0, 1, 99]"), ("dense-*.json", "{}"), ("factors-*/top.json", '{"a": "b"}')]
    + [slow(pattern, text) for pattern in DELETED for text in ("", "17")]
    + [slow("search-*/selection.json", '["a"]'), slow("search-*/selection.json", "[]")]
    + [slow("factors-*/top.json", '{"half": 1')],
)
def test_damaged_work_folder(begun: Path, shared: Path, pattern: str, text: str) -> None:
    (file,) = Path("out.work").glob(pattern)
    file.write_text(text)
    what = DELETED[pattern].replace("out.work/factors-*", str(file.parent))
    refused(compress("out"), f"{file}: damaged", f"delete {what}")
    shutil.rmtree(what.rpartition(" ")[2]) if "folder" in what else file.unlink()  # as the message says
    ok(*compress("out"))
    assert what_counts("out") == what_counts(shared / "out")


@pytest.mark.parametrize("text", [slow(""), '{"half": ', slow("17")])
def test_seconds_that_cannot_be_read_are_counted_anew(begun: Path, shared: Path, text: str) -> None:
    (file,) = begun.glob("*.seconds.json")
    file.write_text(text)
    ok(*compress("out"))
    assert what_counts("out") == what_counts(shared / "out")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-100], slow(lambda data: b""), slow(lambda data: b"x" * len(data))]
)
def test_damaged_factors(begun: Path, shared: Path, damage: Callable[[bytes], bytes]) -> None:
    (file,) = Path("out.work").glob("factors-*/block-00001.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    one_line(bolaco(*compress("out")), f"{file}: missing or damaged", "delete")
    file.unlink()  # as the message says
    ok(*compress("out"))
    assert what_counts("out") == what_counts(shared / "out")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"garbage\n" + data,
        lambda data: data + b"garbage\n",
        lambda data: b'{"op_code": 3}\n' + data,
        lambda data: data + b'{"op_code": 99, "worker_id": "x"}\n',
        lambda data: b"\xff\xfe\x00\n" * 3,
        lambda data: b"[]\n" + data,
        lambda data: data.replace(b"levels", b"lovels"),
        lambda data: data.replace(b'"objective":', b'"objective":"', 1),
    ],
    ids=["first line", "last line", "no fields", "unknown operation", "binary", "list", "renamed", "half a string"],
)
def test_damaged_journal(begun: Path, shared: Path, damage: Callable[[bytes], bytes]) -> None:
    (file,) = Path("out.work").glob("search-*/trials.journal")
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    one_line(bolaco(*compress("out")), f"{file}: the trial journal is damaged")
    file.unlink()  # as the message says
    ok(*compress("out"))
    assert what_counts("out") == what_counts(shared / "out")


# --- a full disk --------------------------------------------------------------------------------------------------


def bytes_needed() -> int:
    """Factors of every matrix but v at its highest multiple of 4, and at most 21,664 parameters of a checkpoint."""
    sites = [site for site in inspect_structure(tiny_llama()).sites if site.type != "v"]
    sides = [(site.out_features + site.in_features, site.size) for site in sites]
    return 4 * (sum((size - 1) // both // 4 * 4 * both for both, size in sides) + 21_664)


def test_too_little_space_is_seen_before_the_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = bytes_needed()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    refused(compress("out"), "no space left for the factors and the checkpoint: about 0.1 MiB are needed")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    ok(*compress("out", "--search", "hand"))


def test_the_cache_on_disk_counts_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = bytes_needed() + 8 * 32 * 32 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    refused(compress("out", calibration_cache="disk"), "no space left")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    ok(*compress("out", "--search", "hand", calibration_cache="disk"))


@pytest.mark.parametrize("kind", ["OSError", "SafetensorError"])
def test_full_disk_while_writing_factors(place: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    calls = []

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        calls.append(path)
        if len(calls) < 2:
            save_file(tensors, path, metadata=metadata)
            return
        path.write_bytes(b"half")
        if kind == "OSError":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise tensors_module.SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(tensors_module, "save_file", full)
        one_line(bolaco(*compress("out", "--search", "hand")), "no space left on the disk", "give the same command")
    (first,) = Path("out.work").glob("factors-*/block-00000.safetensors")
    written = first.stat().st_mtime_ns
    assert not Path("out").exists()
    ok(*compress("out", "--search", "hand", "--keep-work"))
    assert first.stat().st_mtime_ns == written
    ok(*compress("fresh", "--search", "hand"))
    assert what_counts("out") == what_counts("fresh")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small disk, or changes how it is mounted."""
    disk = tmp_path / "disk"

    def mounted(*options: str) -> Path:
        disk.mkdir(exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)]
        try:
            subprocess.run(words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("may not mount a disk here")
        return disk

    yield mounted
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_that_is_full_from_the_start(place: Path, mount: Callable[..., Path]) -> None:
    (mount("size=8k") / "data").write_bytes(bytes(8192))
    refused(compress("disk/out"), "no space left on the disk")


@pytest.mark.parametrize(("size", "stage"), [("32k", "factorize"), ("148k", "write")])
def test_really_full_disk(
    place: Path, mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, size: str, stage: str
) -> None:
    disk = mount(f"size={size}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))  # the estimate lets it pass
    words = compress("disk/out", "--search", "hand")
    one_line(bolaco(*words), "no space left on the disk")
    assert not (disk / "out").exists()
    assert list(disk.glob(".*")) == []
    finished = {file: file.stat().st_mtime_ns for file in disk.glob("out.work/factors-*/*.safetensors")}
    assert len(finished) == {"factorize": 0, "write": 2}[stage]
    assert (disk / "out.work").exists() == (stage == "write")
    mount("remount", "size=4m")
    ok(*words, "--keep-work")
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    ok(*compress("fresh", "--search", "hand"))
    assert what_counts("disk/out") == what_counts("fresh")


def test_read_only_disk(place: Path, mount: Callable[..., Path]) -> None:
    mount("size=1m", "ro")
    for work in ("disk/out.work", "work"):
        refused(compress("disk/out", "--work", work), "disk/out: cannot be written", "Read-only file system")


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


def test_interrupt(place: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Evaluator.scores
    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return scores(*args)

    words = compress("out")
    # A shell's background jobs ignore the signal, and so would this process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Evaluator, "scores", interrupted)
            done = bolaco(*words)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 130
    assert done.err.splitlines()[-1] == "bolaco: stopped; the same command continues where this one was"
    assert "Traceback" not in done.err
    assert not Path("out").exists()
    assert not Path("out.work.lock").exists()
    again = ok(*words)
    assert "search: 2 trials are in the ledger already" in again.err
    assert what_counts("out") == what_counts(shared / "out")
