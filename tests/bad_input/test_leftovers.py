"""What a process leaves that is ended: the next run of the same command removes it, or takes it up."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from bolaco.checkpoint.export import export_dense
from bolaco.errors import BolacoError, OutputExistsError
from bolaco.evaluation import speed
from bolaco.models.walk import cache_tensor
from bolaco.runs import measure
from bolaco.work.folder import WorkFolder, work_beside
from bolaco.work.output import new_folder
from tests.bad_input.common import refused
from tests.command import bolaco, compress, ok, snapshot, what_counts
from tests.models import compress_tiny, compressed, mostly_slow, save_tiny, tiny_llama
from tests.processes import killed

OURS = (".out.partial-17", ".out.partial-999999-0a1b2c")
# As ours, but of another output, no folder, or called otherwise.
THEIRS = (".other.partial-17", ".out.partial-notes", ".out.partial-17-old-notes", "out.partial-17", ".out.partial-5")


def leave_behind() -> None:
    for name in (*OURS, *THEIRS[:-1]):
        Path(name).mkdir()
        Path(name, "model.safetensors").write_text("half")
    Path(THEIRS[-1]).write_text("a file")
    Path(".out.partial-6").symlink_to(THEIRS[0])


def of_new_folder() -> None:
    with new_folder(Path("out")) as folder:
        (folder / "file").write_text("x")


SWEEPING: dict[str, Callable[[], object]] = {
    "a new folder": of_new_folder,
    "a run": lambda: work_beside(Path("out"), None),
    "export": lambda: export_dense(str(compressed("llama", method="svd-llm").path), Path("out")),
}


@pytest.mark.parametrize("how", SWEEPING)
def test_what_was_half_written_is_removed(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    leave_behind()
    SWEEPING[how]()
    assert {path.name for path in Path().iterdir()} - {"out"} == {*THEIRS, ".out.partial-6"}


@pytest.mark.parametrize("how", SWEEPING)
def test_what_is_being_written_stays(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    leave_behind()
    handle = os.open(OURS[1], os.O_RDONLY)  # as another process has it
    fcntl.flock(handle, fcntl.LOCK_EX)
    SWEEPING[how]()
    assert Path(OURS[1], "model.safetensors").is_file()
    assert not Path(OURS[0]).exists()
    os.close(handle)
    shutil.rmtree("out", ignore_errors=True)
    SWEEPING[how]()
    assert not Path(OURS[1]).exists()


def test_a_folder_is_locked_until_it_has_its_name(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out"):
        work_beside(tmp_path / "out", None)
        assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_folders_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows then what is in use."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fcntl, "flock", refuse)
    leave_behind()
    with new_folder(Path("out")) as folder:
        (folder / "file").write_text("x")
    assert Path("out/file").is_file()
    assert Path(OURS[0]).is_dir()


# --- the last moments of a run ------------------------------------------------------------------------------------

HAND = ("--search", "hand")
LAST = {
    "the output is made": ("bolaco.work.output._locked", 1, "before"),
    "the output is remembered": ("bolaco.work.folder.WorkFolder._write_mark", 2, "before"),
    "the output gets its name": ("pathlib.Path.rename", 1, "before"),
    "the output has its name": ("pathlib.Path.rename", 1, "after"),
    "the work folder is removed": ("shutil.rmtree", 2, "after"),
    "the work folder is empty": ("pathlib.Path.rmdir", 1, "before"),
    "the work folder is gone": ("bolaco.work.folder.WorkFolder.close", 1, "after"),
}


@pytest.mark.parametrize(
    "moment", mostly_slow(LAST, "the output is made", "the output has its name", "the work folder is empty")
)
def test_killed_in_its_last_moments(moment: str, place: Path, shared: Path) -> None:
    done = killed(*LAST[moment], compress("out", *HAND))
    assert done.returncode == -signal.SIGKILL, done.stderr
    there = Path("out").is_dir()
    before = snapshot("out")
    again = bolaco(*compress("out", *HAND))
    if moment in ("the work folder is empty", "the work folder is gone"):  # nothing tells any more whose it was
        assert "exists already" in again.err
    else:
        assert again.code == 0, again.err
        assert ("out is complete already" in again.err) == there
    if there:
        assert snapshot("out") == before
    assert {path.name for path in Path().iterdir()} == {"model", "text.txt", "other.txt", "out"}


class Ended(KeyboardInterrupt):
    pass


@contextmanager
def ended_in_the_end() -> Iterator[None]:
    """Runs are ended when their output is there, but the work folder still too."""

    def end(*_: Any) -> None:
        raise Ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "close", end)
        yield


COMMANDS = {
    "compress": compress("out", *HAND),
    "chop": ["compress", "deep", "--keep", "0.6", "--method", "chop", "--eval", "other.txt", "--seq-len", "16"],
    "compare": [
        *("compare", "model", "--methods", "svd", "--keep", "0.8", "--calibration", "text.txt", "--eval", "other.txt"),
        *("--seq-len", "16", "--set", "search.rank_multiple=4", "--set", "calibration.sequences=8"),
    ],
    "tune": [
        *("tune", "model", "--mode", "continued", "--data", "text.txt", "--max-steps", "1", "--seq-len", "32"),
        *("--set", "training.warmup=0", "--set", "evaluation.windows=2"),
    ],
}
COMMANDS = {name: words if name == "compress" else [*words, "-o", "out"] for name, words in COMMANDS.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_whose_output_is_there_is_finished(command: str, place: Path) -> None:
    save_tiny(Path("deep"), tiny_llama(num_hidden_layers=4))
    words = COMMANDS[command]
    with ended_in_the_end():
        assert bolaco(*words).code == 130
    before = snapshot("out")
    assert Path("out.work").is_dir()
    again = ok(*words)
    assert "out is complete already" in again.err
    assert snapshot("out") == before
    assert not Path("out.work").exists()
    assert not Path("out.work.lock").exists()
    refused(words, "out: exists already")


def test_a_work_folder_that_is_kept_takes_nothing_up(place: Path) -> None:
    ok(*compress("out", *HAND, "--keep-work"))
    refused(compress("out", *HAND, "--keep-work"), "out: exists already")


def test_another_output_or_another_recipe_is_not_taken_up(place: Path) -> None:
    words = compress("out", *HAND)
    with ended_in_the_end():
        bolaco(*words)
    refused([*words, "--seed", "5"], "out: exists already")
    shutil.copytree("out", "copy")
    Path("out").rename("moved")
    Path("copy").rename("out")  # the same files, but not what was written
    refused(words, "out: exists already")
    shutil.rmtree("out")
    Path("moved").rename("out")
    assert "out is complete already" in ok(*words).err


def test_a_model_in_memory_is_not_taken_for_that_of_an_earlier_call(tmp_path: Path) -> None:
    with ended_in_the_end(), suppress(Ended):
        compress_tiny(tiny_llama(), tmp_path / "out")
    with pytest.raises(OutputExistsError):
        compress_tiny(tiny_llama(), tmp_path / "out")


# --- SIGTERM ------------------------------------------------------------------------------------------------------


def test_a_run_that_is_asked_to_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    words = compress("out", *HAND)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "load_model", ending)
        done = bolaco(*words)
    assert done.code == 143
    assert done.err.splitlines()[-1] == "bolaco: stopped; the same command continues where this one was"
    assert "Traceback" not in done.err
    assert signal.getsignal(signal.SIGTERM) is before
    assert {path.name for path in Path().iterdir()} == {"model", "text.txt", "other.txt", "out.work"}
    ok(*words)
    ok(*compress("fresh", *HAND))
    assert what_counts("out") == what_counts("fresh")


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_bench_takes_its_process_with_it(
    asked: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "python"
    child.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/id.partial\nmv {tmp_path}/id.partial {tmp_path}/id\nexec sleep 60\n"
    )
    child.chmod(0o755)
    monkeypatch.setattr(speed.sys, "executable", str(child))

    def end() -> None:
        while not (tmp_path / "id").exists():
            time.sleep(0.01)
        time.sleep(0.2)  # until it is waited for
        os.kill(os.getpid(), asked)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=end)
    thread.start()
    try:
        done = bolaco("bench", "model")
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join()
    assert done.code == 128 + asked
    assert done.err.splitlines()[-1] == "bolaco: stopped"  # nothing of it is kept
    child_id = int((tmp_path / "id").read_text())
    with suppress(ChildProcessError):  # it has been waited for
        assert os.waitpid(child_id, 0)[1] == signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(child_id, 0)


# --- files that are mapped ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT])
def test_a_mapped_file_for_which_there_is_no_room(kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said when it is made: whoever writes where a disk has no room is killed by SIGBUS."""

    def refuse(*_: Any) -> None:
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(BolacoError, match=r"hidden\.cache: no space left for hidden states: 4\.0 MiB are needed"):
        cache_tensor((1024, 1024), torch.float32, tmp_path / "hidden.cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("known", [True, False])
def test_a_mapped_file_has_all_its_room(known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:  # to this system
        monkeypatch.delattr(os, "posix_fallocate")
    file = tmp_path / "deep" / "hidden.cache"
    made = cache_tensor((300, 1024), torch.float32, file).fill_(2)
    assert file.stat().st_size == 300 * 4096
    assert file.stat().st_blocks * 512 >= 300 * 4096
    assert float(made.sum()) == 2 * made.numel()
    assert cache_tensor((0, 4), torch.float32, tmp_path / "empty.cache").shape == (0, 4)
