"""Files that are written whole or not at all, room for them, and values read from them."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bolaco.errors import BolacoError, CheckpointError, no_space
from bolaco.settings import parsed_json

# What a file is called while it is written.
PARTIAL = ".partial"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write under; what is there becomes ``path`` when the block succeeds."""
    partial = path.with_name(path.name + PARTIAL)
    yield partial
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all, also where the power fails."""
    with whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def checksum(path: Path) -> int:
    """CRC-32 of a file of any size."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found = zlib.crc32(part, found)
    return found


def preallocate(file: Path, size: int, what: str) -> None:
    """Gives a file room for so many bytes on its disk: a file that is mapped has no other way to say that it is full.

    Raises:
        BolacoError: the disk has no such room; the file is removed.
    """
    with file.open("ab") as opened:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, max(size, 1))
            else:
                _fill(opened, size)
        except OSError as error:
            file.unlink()
            if not no_space(error):
                raise
            raise BolacoError(
                f"{file}: no space left for {what}: {size / 2**20:,.1f} MiB are needed; free some, or choose another "
                "--work on a larger disk"
            ) from error


def _fill(opened: IO[bytes], size: int) -> None:
    """Zeros up to a size, where a system has no call for it."""
    while (missing := size - opened.seek(0, os.SEEK_END)) > 0:
        opened.write(bytes(min(missing, 2**24)))
    opened.flush()


def read_json(path: Path) -> Any:
    """The values in a JSON file.

    Raises:
        CheckpointError: it cannot be read, or is no JSON.
    """
    try:
        return parsed_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


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
