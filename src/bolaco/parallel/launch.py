"""What torchrun says of the processes that it has started; no torch is needed to know."""

from __future__ import annotations

import os


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_as() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0")) if launched() > 1 else 0


def local_device(name: str) -> str:
    """``cuda`` as the GPU of this process among those of its machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" and launched() > 1 else name
