"""Tensors that are pages of files: their memory is given back when they have had their turn, and read again later.

safetensors maps files instead of copying them. Of such pages only those that were looked at take memory; they go on
taking it until the system needs it, and count as this process's until then. What is not a page of a file, or is one
that was written to, is never touched here, so that giving back can cost time and nothing else.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor

_PAGEMAP = Path("/proc/self/pagemap")
_MAPS = Path("/proc/self/maps")
# Bits of an entry of pagemap (Documentation/admin-guide/mm/pagemap.rst of Linux).
_PRESENT, _SWAPPED, _OF_A_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)


def release(tensors: Iterable[Tensor]) -> int:
    """Gives back the memory of those tensors on the CPU that are unchanged pages of files.

    Nothing happens to other tensors, and none at all on systems that do not tell what a page is (all but Linux).

    Returns:
        Bytes that were in memory and were given back.
    """
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is None or not _PAGEMAP.exists():
        return 0
    page, freed = mmap.PAGESIZE, 0
    with suppress(OSError), _PAGEMAP.open("rb", buffering=0) as pagemap:
        for first, stop in _spans(tensors, page):
            entries = np.frombuffer(os.pread(pagemap.fileno(), 8 * (stop - first), 8 * first), np.uint64)
            present, swapped = entries & _PRESENT != 0, entries & _SWAPPED != 0
            ours = swapped | (present & (entries & _OF_A_FILE == 0))
            if len(entries) < stop - first or ours.any() or not present.any():
                continue
            if _madvise(first * page, (stop - first) * page, advice):
                freed += page * int(present.sum())
    return freed


def mapped(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Bytes of tensors that lie in mapped files, and bytes of all; what is shared counts once."""
    ranges = _mapped_ranges()
    starts = np.array([first for first, _ in ranges], dtype=np.uint64)
    inside = total = 0
    for place, size in {(t.data_ptr(), t.nbytes) for t in tensors if t.device.type == "cpu"}:
        total += size
        index = int(np.searchsorted(starts, np.uint64(place), side="right")) - 1
        if index >= 0 and place + size <= ranges[index][1]:
            inside += size
    return inside, total


def _spans(tensors: Iterable[Tensor], page: int) -> list[tuple[int, int]]:
    """First page and the one after the last of every tensor on the CPU."""
    places = {(t.data_ptr(), t.nbytes) for t in tensors if t.device.type == "cpu" and t.nbytes}
    return sorted((place // page, -(-(place + size) // page)) for place, size in places)


def _mapped_ranges() -> list[tuple[int, int]]:
    """Addresses of this process that are files, in order; those that follow one another are one."""
    found: list[tuple[int, int]] = []
    with suppress(OSError):
        for line in _MAPS.read_text().splitlines():
            addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
            if inode == "0":
                continue
            first, stop = (int(address, 16) for address in addresses.split("-"))
            if found and found[-1][1] == first:
                first = found.pop()[0]
            found.append((first, stop))
    return found


def _madvise(address: int, size: int, advice: int) -> bool:
    libc = ctypes.CDLL(None)
    return bool(libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice)) == 0)
