"""The work folder of a run: what is finished, so that the same command continues after any interruption.

Every artefact is written under a temporary name and renamed, so a file that exists is whole. The folder is locked
while a run uses it (the lock dies with the process) and, once a stage has left something in it, belongs to one recipe,
one set of weights and one text. A run that ends before that leaves no folder behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel
from transformers import PreTrainedModel

from bolaco.errors import BolacoError, ResumeError
from bolaco.recipe import differing_fields

# What a folder holds before its first stage is finished.
_BOOKKEEPING = ("recipe.json", "seconds.json", "model.json", "texts.json", "hidden.cache")


class WorkFolder:
    """A locked folder of artefacts; use as a context manager.

    Args:
        path: the folder; created if missing.
        recipe: what the run depends on: a recipe, a comparison of several, or the settings of a tuning run. A folder
            started with another one is refused, except that the number of trials may change.

    Raises:
        ResumeError: in use by another run, of another recipe, or damaged.
    """

    def __init__(self, path: Path, recipe: BaseModel) -> None:
        self.path, self.recipe = path, recipe
        self._lock_path = path.with_name(path.name + ".lock")
        self._lock = FileLock(self._lock_path)
        self._made = False
        self.seconds: dict[str, float] = {}

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
        mine = self.recipe.model_dump(mode="json")
        self._made = not self.path.exists()
        if not self._made:
            theirs = self.read("recipe", dict)
            if theirs is None and any(file.suffix != ".partial" for file in self.path.iterdir()):
                raise ResumeError(
                    f"{self.path}: not a work folder of bolaco (no recipe.json in it); choose another --work"
                )
            if theirs is not None and "version" not in theirs:
                raise ResumeError(
                    f"{self.path}: not a work folder of bolaco (its recipe.json is none of ours); choose another --work"
                )
            if theirs is None or not self._started():
                self._forget()
                theirs = mine
            differences = differing_fields(theirs, mine)
            differences = [d for d in differences if not d.startswith("search.trials ")]
            if differences:
                named = "; ".join(differences[:4]) + (f"; and {len(differences) - 4} more" if differences[4:] else "")
                raise ResumeError(
                    f"{self.path}: started with another recipe: {named}; "
                    "use the same options to continue, or delete the folder to start anew"
                )
        self.path.mkdir(exist_ok=True)
        self.write("recipe", mine)
        self.seconds = self.read("seconds", dict) or {}
        self._remove_unfinished()

    def __exit__(self, *_: object) -> None:
        if self.path.exists() and not self._started():
            self._clear()
        self._unlock()

    def _unlock(self) -> None:
        # In this order: unlinked after the release, the file could be somebody else's lock already.
        self._lock_path.unlink(missing_ok=True)
        self._lock.release()

    def _started(self) -> bool:
        """Whether a stage has left something, so that there is something to continue."""
        files = (file for file in self.path.rglob("*") if file.is_file() and file.suffix != ".partial")
        return any(file.name not in _BOOKKEEPING for file in files)

    def _forget(self) -> None:
        for file in (*(self.path / name for name in _BOOKKEEPING), *self.path.rglob("*.partial")):
            file.unlink(missing_ok=True)

    def _clear(self) -> None:
        """Removes a folder with nothing to continue; one that was there before stays, empty."""
        self._forget()
        folders = sorted((path for path in self.path.rglob("*") if path.is_dir()), reverse=True)
        for folder in [*folders, self.path] if self._made else folders:
            with suppress(OSError):
                folder.rmdir()

    def read(self, name: str, kind: type) -> Any:
        """A JSON artefact, or None if it does not exist yet.

        Raises:
            ResumeError: damaged, or no ``kind``; names the file.
        """
        path = self.path / f"{name}.json"
        if not path.exists():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.damaged(name, str(error)) from error
        if not isinstance(value, kind):
            raise self.damaged(name, f"{type(value).__name__} instead of {kind.__name__}")
        return value

    def damaged(self, name: str, why: str) -> ResumeError:
        """The error to raise for a JSON artefact that does not hold what was written."""
        return ResumeError(f"{self.path / name}.json: damaged ({why}); delete the folder {self.path} to start anew")

    def write(self, name: str, value: Any) -> None:
        """Writes a JSON artefact, whole or not at all."""
        partial = self.path / f"{name}.partial"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path / f"{name}.json")

    def same(self, name: str, value: Any, what: str) -> None:
        """Stores ``value`` the first time, and checks it afterwards.

        Raises:
            ResumeError: it differs from what this folder was started with.
        """
        known = self.read(name, str)
        if known is not None and known != value:
            raise ResumeError(f"{self.path}: {what} since this run was started; delete the folder to start anew")
        self.write(name, value)

    def _remove_unfinished(self) -> None:
        """Removes the output folder that a killed run was writing (see :meth:`unfinished`)."""
        folder = self.read("unfinished", str)
        if folder is not None:
            # Only ever what new_folder() makes, whatever the file says.
            if ".partial-" in Path(folder).name:
                shutil.rmtree(folder, ignore_errors=True)
            (self.path / "unfinished.json").unlink()

    @contextmanager
    def unfinished(self, folder: Path) -> Iterator[None]:
        """Remembers a folder that is being written outside this one; if this run is killed, the next one removes it."""
        self.write("unfinished", str(folder.absolute()))
        try:
            yield
        finally:
            (self.path / "unfinished.json").unlink(missing_ok=True)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the block's duration to the stage's seconds, also when it is interrupted by an error."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
            self.write("seconds", self.seconds)

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


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A short hash that changes with any weight, in one pass over the memory and no copy of it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        total = float(flat.sum(dtype=torch.float64))
        sample = flat[:: max(1, len(flat) // 64)].double().tolist()
        digest.update(repr((name, tuple(parameter.shape), total, sample)).encode())
    return digest.hexdigest()[:16]


def require_space(needs: Iterable[tuple[Path, int]], what: str) -> None:
    """Stops before the work starts if a disk cannot hold its results.

    Args:
        needs: folders, which need not exist yet, and the bytes that will be written to each; those on the same disk add
            up.
        what: what is to be written, for the message.

    Raises:
        BolacoError: with both numbers.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needs:
        existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
        device = existing.stat().st_dev
        disks[device] = (existing, size + disks.get(device, (existing, 0))[1])
    for existing, size in disks.values():
        free = shutil.disk_usage(existing).free
        if size > free:
            raise BolacoError(
                f"{existing}: no space left for {what}: about {size / 2**20:,.1f} MiB are needed, "
                f"{free / 2**20:,.1f} MiB are free"
            )
