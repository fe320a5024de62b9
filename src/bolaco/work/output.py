"""The folder that a run writes: it must not exist before, and appears when it is complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bolaco.errors import OutputExistsError, RecipeError

UNFINISHED = ".partial-"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when the block succeeds and vanishes when it fails.

    Its files are as readable as it is: safetensors writes for the owner alone, whatever the umask says.

    Raises:
        OutputExistsError: ``out`` exists.
    """
    refuse_existing(out)
    partial = out.with_name(f".{out.name}{UNFINISHED}{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
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


def refuse_existing(out: Path) -> None:
    """Raises OutputExistsError if ``out`` is there already."""
    if out.exists() or out.is_symlink():  # a link that leads nowhere too
        raise OutputExistsError(f"{out}: exists already and is not overwritten; choose another name or remove it first")


def work_beside(out: Path, work: Path | None) -> Path:
    """The work folder of a run that writes ``out``: ``work`` if it is given, else ``<out>.work``.

    It is removed at the end, and the output must not exist before, so neither may hold the other.

    Raises:
        OutputExistsError: ``out`` exists.
        RecipeError: one is inside the other, one cannot be written, or the work folder is a link.
    """
    refuse_existing(out)
    work = work or out.with_name(out.name + ".work")
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
    return work
