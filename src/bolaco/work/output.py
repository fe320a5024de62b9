"""The folder that a run writes: it must not exist before, and appears when it is complete."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bolaco.errors import OutputExistsError, RecipeError

# What new_folder() calls a folder until it is complete: by what it will be called, and the process that writes it.
_UNFINISHED = re.compile(r"\.(?P<out>.+)\.partial-\d+(-[0-9a-f]+)?", re.DOTALL)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when the block succeeds and vanishes when it fails.

    It is locked while it is written, and the lock dies with the process: what a killed run has left is removed here.
    Its files are as readable as it is: safetensors writes for the owner alone, whatever the umask says.

    Raises:
        OutputExistsError: ``out`` exists.
    """
    refuse_existing(out)
    sweep(out)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}-{secrets.token_hex(3)}")
    partial.mkdir(parents=True)
    lock = _locked(partial)
    try:
        yield partial
        readable = partial.stat().st_mode & 0o666
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(readable)
        refuse_existing(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(out: Path) -> None:
    """Removes what killed runs have left of ``out``, but nothing that a process is still writing."""
    with suppress(OSError):
        for folder in list(out.parent.iterdir()):
            found = _UNFINISHED.fullmatch(folder.name)
            if found is not None and found["out"] == out.name:
                remove_unfinished(folder)


def remove_unfinished(folder: Path) -> None:
    """Removes a folder that :func:`new_folder` made, unless a process is writing it."""
    lock = _locked(folder) if _UNFINISHED.fullmatch(folder.name) else None
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """The open folder, locked until it is closed; None where it is none, is in use, or cannot be locked."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def link_or_copy(source: str, target: str) -> None:
    """A second name for the same file where the file system has such, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def refuse_existing(out: Path) -> None:
    """Raises OutputExistsError if ``out`` is there already."""
    if out.exists() or out.is_symlink():  # a link that leads nowhere too
        raise OutputExistsError(f"{out}: exists already and is not overwritten; choose another name or remove it first")


def check_places(out: Path, work: Path) -> None:
    """Stops if an output or a work folder could not be written, or not be removed in the end.

    Raises:
        RecipeError: one is inside the other, one cannot be written, or the work folder is a link.
    """
    if work.is_symlink():
        raise RecipeError(f"{work}: a link, which cannot be removed in the end; name the folder it leads to by --work")
    for path in (out, work):
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if parent.is_dir() and not os.access(parent, os.W_OK | os.X_OK):
            closed = os.statvfs(parent).f_flag & os.ST_RDONLY
            why = os.strerror(errno.EROFS if closed else errno.EACCES)
            raise RecipeError(f"{path}: cannot be written, {parent}: {why}")
    a, b = out.resolve(), work.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise RecipeError(f"{out} and {work}: the output and the work folder must not be one inside the other")
