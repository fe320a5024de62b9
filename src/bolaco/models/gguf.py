"""Reading GGUF files through transformers, once: it reads the whole vocabulary again for each of the configuration,
the tokenizer and the weights, which takes seconds each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf

_Reader: Any = gguf.GGUFReader


@lru_cache(maxsize=1)
def _reader(path: str, modified: int, size: int) -> Any:
    return _Reader(path)


def _known(path: Any, mode: str = "r") -> Any:
    if mode != "r":
        return _Reader(path, mode)
    status = Path(path).stat()
    return _reader(str(path), status.st_mtime_ns, status.st_size)


@contextmanager
def reading_once() -> Iterator[None]:
    """While it lasts the file that was read last is not parsed again, as long as it has not changed."""
    package: Any = gguf
    package.GGUFReader = _known
    try:
        yield
    finally:
        package.GGUFReader = _Reader
