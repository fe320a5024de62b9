"""Memory: what is free, and what this process has."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device."""
    if device.type == "cuda":
        import torch  # this file is read before torch is needed

        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def largest_resident() -> int:
    """Largest resident memory of this process since its start, in bytes."""
    # getrusage counts kilobytes, on a Mac bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Returns freed memory to the system; glibc keeps what lies below anything that is still in use."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Largest resident memory of this process since the object was made; since its start where that is not possible.

    Linux keeps a high-water mark (VmHWM) and resets it on request; elsewhere getrusage knows that of the whole process
    only. Memory that was freed before does not count.
    """

    def __init__(self) -> None:
        give_back()
        self.reset = self.resettable()

    @staticmethod
    def resettable() -> bool:
        """Resets the mark, if that is possible here."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def bytes(self) -> int:
        """The largest value so far."""
        if self.reset:
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
        return largest_resident()
