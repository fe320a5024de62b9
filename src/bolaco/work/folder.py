"""The work folder of a run: what is finished, so that the same command continues after any interruption.

Each stage of a run leaves an :class:`Artefact`, whose name changes with everything that the stage depends on: settings,
text, weights, and other artefacts. A stage finds its artefact again exactly when all of that is the same, so a recipe
that was changed repeats what depends on the change and nothing else.

Files are written under a temporary name and renamed, so one that exists is whole. The folder is locked while a run uses
it (the lock dies with the process). A run that ends before anything is finished leaves no folder behind.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, TypeAdapter, ValidationError

from bolaco.errors import ResumeError
from bolaco.settings import json_text
from bolaco.work.files import PARTIAL, write_text
from bolaco.work.output import UNFINISHED

V = TypeVar("V")

# What a folder holds before its first stage is finished; hidden states of a walk are of no use to another run.
_MARK = "recipe.json"
# In a folder of factors: the ranks up to which they go.
TOP_FILE = "top.json"
_BOOKKEEPING = (_MARK, TOP_FILE, "unfinished.json")
_ENDINGS = (PARTIAL, ".cache", ".seconds.json")


def digest(value: Any) -> str:
    """Twelve digits that change with ``value``: anything JSON can hold, pydantic models, artefacts."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:12]


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
        """Writes its JSON value, whole or not at all."""
        write_text(self.file, json_text(_plain(value)))

    def damaged(self, why: str) -> ResumeError:
        """The error to raise for a JSON value that is not what was written."""
        return ResumeError(f"{self.file}: damaged ({why}); delete this file and run again")


class WorkFolder:
    """A locked folder of artefacts; use as a context manager.

    Args:
        path: the folder; made if it does not exist.
        recipe: what the run does, kept in the folder for whoever looks into it.

    Raises:
        ResumeError: in use by another run, or not a work folder.
    """

    def __init__(self, path: Path, recipe: BaseModel) -> None:
        self.path, self.recipe = path, recipe
        self._lock_path = path.with_name(path.name + ".lock")
        self._lock = FileLock(self._lock_path)
        self._made = False

    def __enter__(self) -> WorkFolder:
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
        return self

    def _claim(self) -> None:
        self._made = not self.path.exists()
        if not self._made:
            theirs = self._mark()
            if theirs is None and any(file.suffix != PARTIAL for file in self.path.iterdir()):
                raise ResumeError(f"{self.path}: not a work folder of bolaco (no {_MARK} in it); choose another --work")
            if theirs is not None and theirs.keys() != {"format", "recipe"}:
                what = (
                    "started by an earlier version of bolaco; delete the folder to start anew"
                    if "version" in theirs
                    else f"not a work folder of bolaco (its {_MARK} is none of ours); choose another --work"
                )
                raise ResumeError(f"{self.path}: {what}")
            if theirs is None or not self._started():
                self._forget()
        self.path.mkdir(exist_ok=True)
        write_text(self.path / _MARK, json.dumps({"format": 2, "recipe": self.recipe.model_dump(mode="json")}))
        self._remove_unfinished()

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
        for path in [path for name in names for path in self.kept(name) if path not in but]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _remove_unfinished(self) -> None:
        """Removes the output folder that a killed run was writing (see :meth:`unfinished`)."""
        file = self.path / "unfinished.json"
        if not file.exists():
            return
        with suppress(OSError, ValueError):
            folder = TypeAdapter(str).validate_json(file.read_bytes())
            # Only ever what new_folder() makes, whatever the file says.
            if UNFINISHED in Path(folder).name:
                shutil.rmtree(folder, ignore_errors=True)
        file.unlink()

    @contextmanager
    def unfinished(self, folder: Path) -> Iterator[None]:
        """Remembers a folder that is being written outside this one; if this run is killed, the next one removes it."""
        file = self.path / "unfinished.json"
        write_text(file, json.dumps(str(folder.absolute())))
        try:
            yield
        finally:
            file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes the folder; the lock stays until the ``with`` block ends.

        Results go first: what an interruption leaves is still a work folder.
        """
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in _BOOKKEEPING:
                entry.unlink()
        shutil.rmtree(self.path)


class Clock:
    """Seconds of each stage of a run, those before an interruption included.

    Args:
        folder: where they are kept.
        run: everything the run depends on.
    """

    def __init__(self, folder: Path, run: Any) -> None:
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
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
            write_text(self._file, json.dumps(self.seconds))
