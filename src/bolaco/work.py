"""The work folder of a run: what is finished, so that the same command continues after any interruption.

Every artefact is written under a temporary name and renamed, so a file that exists is whole. The folder is locked
while a run uses it (the lock dies with the process) and belongs to one recipe, one set of weights and one text.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from bolaco.errors import BolacoError, ResumeError
from bolaco.recipe import Recipe, differing_fields


class WorkFolder:
    """A locked folder of artefacts; use as a context manager.

    Args:
        path: the folder; created if missing.
        recipe: the run's recipe. A folder started with another one is refused, except that the number of trials may
            change.

    Raises:
        ResumeError: in use by another run, of another recipe, or damaged.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe
        self._lock = FileLock(path.with_name(path.name + ".lock"))
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> WorkFolder:
        if self.path.exists() and not self.path.is_dir():
            raise ResumeError(f"{self.path}: exists and is not a folder; choose another --work")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ResumeError(
                f"{self.path}: another run is using this work folder; wait for it or choose another -o"
            ) from None
        try:
            self._claim()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _claim(self) -> None:
        mine = self.recipe.model_dump(mode="json")
        if self.path.exists():
            if not (self.path / "recipe.json").exists() and any(self.path.iterdir()):
                raise ResumeError(
                    f"{self.path}: not a work folder of bolaco (no recipe.json in it); choose another --work"
                )
            theirs = self.read("recipe") or mine
            differences = [d for d in differing_fields(theirs, mine) if not d.startswith("search.trials ")]
            if differences:
                raise ResumeError(
                    f"{self.path}: started with another recipe: {'; '.join(differences)}; "
                    "use the same options to continue, or delete the folder to start anew"
                )
        self.path.mkdir(exist_ok=True)
        self.write("recipe", mine)
        self.seconds = self.read("seconds") or {}

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._lock_path.unlink(missing_ok=True)

    @property
    def _lock_path(self) -> Path:
        return self.path.with_name(self.path.name + ".lock")

    def read(self, name: str) -> Any:
        """A JSON artefact, or None if it does not exist yet.

        Raises:
            ResumeError: damaged; names the file.
        """
        path = self.path / f"{name}.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ResumeError(f"{path}: damaged ({error}); delete the folder {self.path} to start anew") from error

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
        known = self.read(name)
        if known is not None and known != value:
            raise ResumeError(f"{self.path}: {what} since this run was started; delete the folder to start anew")
        self.write(name, value)

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
        """Deletes the folder; the lock stays until the ``with`` block ends."""
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


def require_space(folder: Path, needed: int, what: str) -> None:
    """Stops before the work starts if the disk cannot hold its result.

    Raises:
        BolacoError: with both numbers.
    """
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise BolacoError(
            f"{existing}: no space left for {what}: about {needed / 2**20:,.0f} MiB are "
            f"needed, {free / 2**20:,.0f} MiB are free"
        )
