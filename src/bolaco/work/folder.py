"""The work folder of a run: what is finished, so that the same command continues after any interruption.

Each stage of a run leaves an :class:`Artefact`, whose name changes with everything that the stage depends on: settings,
text, weights, and other artefacts. A stage finds its artefact again exactly when all of that is the same, so a recipe
that was changed repeats what depends on the change and nothing else.

Files are written under a temporary name and renamed, so one that exists is whole. The folder is locked while a run uses
it (the lock dies with the process). A run that ends before anything is finished leaves no folder behind. One that was
ended when its output was there already, but this folder still too, is taken up by the same command: it is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, TypeAdapter, ValidationError

from bolaco.errors import ResumeError
from bolaco.parallel import team
from bolaco.progress import Reporter
from bolaco.settings import json_text
from bolaco.work.files import PARTIAL, write_text
from bolaco.work.memory import largest_resident
from bolaco.work.output import check_places, new_folder, refuse_existing, remove_unfinished, sweep

V = TypeVar("V")

# What a folder holds before its first stage is finished; hidden states of a walk are of no use to another run.
_MARK = "recipe.json"
# What the runs said that used the folder.
LOG_FILE = "log.txt"
# In a folder of factors: the ranks up to which they go.
TOP_FILE = "top.json"
_BOOKKEEPING = (_MARK, TOP_FILE, LOG_FILE)
_ENDINGS = (PARTIAL, ".cache", ".seconds.json")


def digest(value: Any) -> str:
    """Twelve digits that change with ``value``: anything JSON can hold, pydantic models, artefacts."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:12]


def work_beside(out: Path, work: Path | None, run: BaseModel | None = None) -> Path:
    """The work folder of a run that writes ``out``: ``work`` if it is given, else ``<out>.work``.

    It is removed at the end, and the output must not exist before, so neither may hold the other. What killed runs have
    left of ``out`` is removed.

    Args:
        out: the output.
        work: the work folder, if it is not that beside the output.
        run: everything the run depends on, if an output that it has finished before may be taken for its result.

    Raises:
        OutputExistsError: ``out`` exists, and is not that of this run, ended in its last moment.
        RecipeError: see :func:`bolaco.work.output.check_places`.
    """
    work = work or out.with_name(out.name + ".work")
    if run is None or not _has_written(work, run, out):
        if out.exists():
            _remove_rest(work)
        refuse_existing(out)
    check_places(out, work)
    sweep(out)
    return work


def _remove_rest(work: Path) -> None:
    """Removes an empty work folder and its lock: what a run leaves that is ended when it has removed all the rest."""
    lock_path = _lock_of(work)
    if not lock_path.is_file() or (work.exists() and (not work.is_dir() or any(work.iterdir()))):
        return
    with suppress(OSError, Timeout), FileLock(lock_path, timeout=0):
        if work.exists():
            work.rmdir()
        lock_path.unlink()


def _lock_of(work: Path) -> Path:
    return work.with_name(work.name + ".lock")


def _has_written(work: Path, run: BaseModel, out: Path) -> bool:
    """Whether ``out`` is the folder that this very run was writing when it left its mark in ``work``."""
    try:
        mark = json.loads((work / _MARK).read_bytes())
        place = os.lstat(out)
        return bool(
            mark["recipe"] == run.model_dump(mode="json")
            and [mark["writes"]["device"], mark["writes"]["inode"]] == [place.st_dev, place.st_ino]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Artefact):
        return value.key
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Artefact:
    """The result of one stage: a JSON value, or a folder of files.

    Attributes:
        folder: the work folder.
        name: of the stage.
        key: changes with everything that the stage depends on.
    """

    folder: Path
    name: str
    key: str

    @property
    def path(self) -> Path:
        """Where its files are; whoever writes one makes the folder."""
        return self.folder / f"{self.name}-{self.key}"

    @property
    def file(self) -> Path:
        """Where its JSON value is."""
        return self.folder / f"{self.name}-{self.key}.json"

    def read(self, kind: type[V]) -> V | None:
        """Its JSON value, or None if it does not exist yet.

        Raises:
            ResumeError: damaged, or not what ``kind`` says; names the file.
        """
        if not self.file.exists():
            return None
        try:
            return TypeAdapter(kind).validate_json(self.file.read_bytes())
        except ValidationError as error:
            raise self.damaged(str(error.errors()[0]["msg"])) from error
        except (OSError, ValueError) as error:
            raise self.damaged(str(error)) from error

    def write(self, value: Any) -> None:
        """Writes its JSON value, whole or not at all; of several ranks, the first one does."""
        if team.is_first():
            write_text(self.file, json_text(_plain(value)))

    def damaged(self, why: str) -> ResumeError:
        """The error to raise for a JSON value that is not what was written."""
        return ResumeError(f"{self.file}: damaged ({why}); delete this file and run again")


class WorkFolder:
    """A locked folder of artefacts; use as a context manager. Of several ranks, the first one locks and clears it.

    Args:
        path: the folder; made if it does not exist.
        recipe: what the run does, kept in the folder for whoever looks into it.
        out: what the run writes.

    Attributes:
        finished: ``out`` is there already, written by this very run before it was ended in its last moment.

    Raises:
        OutputExistsError: ``out`` is there already, and not of this run.
        ResumeError: in use by another run, or not a work folder.
    """

    def __init__(self, path: Path, recipe: BaseModel, out: Path | None = None) -> None:
        self.path, self.recipe, self.out = path, recipe, out
        self.finished = False
        self._lock_path = _lock_of(path)
        self._lock = FileLock(self._lock_path)
        self._made = False

    def __enter__(self) -> WorkFolder:
        self.finished = team.first(self._enter)
        return self

    def _enter(self) -> bool:
        """Locks the folder; whether its output is finished."""
        if self.path.exists() and not self.path.is_dir():
            raise ResumeError(f"{self.path}: exists and is not a folder; choose another --work")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ResumeError(
                f"{self.path}: another run is using this work folder; wait for it or choose another -o"
            ) from None
        except (FileExistsError, NotADirectoryError) as error:
            raise ResumeError(f"{self.path}: cannot be made, {error.filename} is not a folder") from None
        try:
            self._claim()
        except BaseException:
            if self._made:
                self._clear()
            self._unlock()
            raise
        return self.finished

    def _claim(self) -> None:
        self._made = not self.path.exists()
        if not self._made:
            theirs = self._mark()
            if theirs is None and any(file.suffix != PARTIAL for file in self.path.iterdir()):
                raise ResumeError(f"{self.path}: not a work folder of bolaco (no {_MARK} in it); choose another --work")
            if theirs is not None and theirs.keys() - {"writes"} != {"format", "recipe"}:
                what = (
                    "started by an earlier version of bolaco; delete the folder to start anew"
                    if "version" in theirs
                    else f"not a work folder of bolaco (its {_MARK} is none of ours); choose another --work"
                )
                raise ResumeError(f"{self.path}: {what}")
            if self.out is not None and _has_written(self.path, self.recipe, self.out):
                self.finished = True
                return
            if theirs is None or not self._started():
                self._forget()
            self._remove_unfinished(theirs)
        if self.out is not None:
            refuse_existing(self.out)
        self.path.mkdir(exist_ok=True)
        self._write_mark()

    def _write_mark(self, writes: Path | None = None) -> None:
        """Says what the run does, and the folder that it is writing, which keeps its inode when it gets its name."""
        mark: dict[str, Any] = {"format": 2, "recipe": self.recipe.model_dump(mode="json")}
        if writes is not None:
            place = writes.stat()
            mark["writes"] = {"folder": str(writes.absolute()), "device": place.st_dev, "inode": place.st_ino}
        write_text(self.path / _MARK, json.dumps(mark))

    def _mark(self) -> dict[str, Any] | None:
        """The recipe that the folder was last used for."""
        file = self.path / _MARK
        if not file.exists():
            return None
        try:
            found: dict[str, Any] = TypeAdapter(dict[str, Any]).validate_json(file.read_bytes())
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise ResumeError(f"{file}: damaged ({why}); delete the folder {self.path} to start anew") from error
        return found

    def __exit__(self, *_: object) -> None:
        if not team.is_first():
            return
        if self.path.exists() and not self._started():
            self._clear()
        self._unlock()

    def _unlock(self) -> None:
        # In this order: unlinked after the release, the file could be somebody else's lock already.
        self._lock_path.unlink(missing_ok=True)
        self._lock.release()

    def _files(self) -> Iterator[Path]:
        return (file for file in self.path.rglob("*") if file.is_file())

    def _started(self) -> bool:
        """Whether a stage has left something, so that there is something to continue."""
        return any(file.name not in _BOOKKEEPING and not file.name.endswith(_ENDINGS) for file in self._files())

    def _forget(self) -> None:
        for file in list(self._files()):
            if file.name in _BOOKKEEPING or file.name.endswith(_ENDINGS):
                file.unlink(missing_ok=True)

    def _clear(self) -> None:
        """Removes a folder with nothing to continue; one that was there before stays, empty."""
        self._forget()
        folders = sorted((path for path in self.path.rglob("*") if path.is_dir()), reverse=True)
        for folder in [*folders, self.path] if self._made else folders:
            with suppress(OSError):
                folder.rmdir()

    def artefact(self, name: str, /, **depends: Any) -> Artefact:
        """The place of a stage's result.

        Args:
            name: of the stage.
            depends: everything that the result depends on, by name: settings, fingerprints of text and weights, other
                artefacts. What is not named here does not make the stage run again.
        """
        return Artefact(self.path, name, digest({"stage": name, **depends}))

    def kept(self, name: str) -> set[Path]:
        """What there is of a stage, whatever it depends on."""
        return {path for path in self.path.iterdir() if path.name.startswith(f"{name}-")}

    def discard(self, *names: str, but: Collection[Path] = ()) -> None:
        """Removes what there is of these stages, but for some of it."""
        if not team.is_first():
            return
        for path in [path for name in names for path in self.kept(name) if path not in but]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _remove_unfinished(self, mark: dict[str, Any] | None) -> None:
        """Removes the output folder that a killed run was writing, by the mark that it has left."""
        writes = (mark or {}).get("writes")
        if isinstance(writes, dict) and isinstance(writes.get("folder"), str):
            remove_unfinished(Path(writes["folder"]))

    @contextmanager
    def output(self, out: Path) -> Iterator[Path]:
        """:func:`bolaco.work.output.new_folder`, remembered here: a run that is killed leaves nothing of it behind."""
        with new_folder(out) as partial:
            self._write_mark(partial)
            try:
                yield partial
            except BaseException:
                with suppress(OSError):
                    self._write_mark()
                raise

    @contextmanager
    def output_file(self, out: Path) -> Iterator[Path]:
        """The same for an output that is one file: a name to write under."""
        refuse_existing(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + PARTIAL)
        try:
            yield partial
            self._write_mark(partial)  # a file keeps its inode when it gets its name
            refuse_existing(out)
            partial.rename(out)
        finally:
            partial.unlink(missing_ok=True)

    def taken_up(self, reporter: Reporter, keep: bool) -> bool:
        """Closes the folder if its output is :attr:`finished`, and says so; whether it was."""
        if self.finished:
            self.close(keep)
            reporter.say(f"{self.out} is complete already")
        return self.finished

    def close(self, keep: bool = False) -> None:
        """Deletes the folder, or keeps it for another run; the lock stays until the ``with`` block ends.

        What tells that it is a work folder, and that its output is there, goes last: a run that is ended meanwhile is
        finished by the next call.
        """
        if not team.is_first():
            return
        if keep:
            self._write_mark()
            return
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _MARK:
                entry.unlink()
        (self.path / _MARK).unlink(missing_ok=True)
        self.path.rmdir()


class Clock:
    """Seconds of each stage of a run, those before an interruption included.

    Args:
        folder: where they are kept.
        run: everything the run depends on.
        tell: is told what each stage took.
    """

    def __init__(self, folder: Path, run: Any, tell: Callable[[str], None] | None = None) -> None:
        self._tell = tell
        self._file = folder / f"{digest(run)}.seconds.json"
        self.seconds: dict[str, float] = {}
        with suppress(OSError, ValueError):
            self.seconds = TypeAdapter(dict[str, float]).validate_json(self._file.read_bytes())

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the block's duration to the stage's seconds, also when it is interrupted by an error."""
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + took, 3)
            if team.is_first():
                write_text(self._file, json.dumps(self.seconds))
            if self._tell is not None:
                self._tell(f"{stage}: {took:.1f} s, {largest_resident() / 2**20:,.0f} MiB resident at most so far")
