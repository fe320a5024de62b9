"""Reading GGUF files in seconds where their vocabulary is large."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def plain_reader() -> Iterator[None]:
    """While this lasts, transformers reads GGUF files through a plain view of the mapped file.

    The reader of the gguf package slices the file several times for each token of the vocabulary. A slice of a
    ``numpy.memmap`` costs several times what that of an array does: with 262,144 tokens that is 13 seconds instead of
    4, each time a configuration, a tokenizer or a model is read.
    """
    import gguf

    # transformers looks the class up in the package whenever it reads a file.
    package: Any = gguf
    original = package.GGUFReader

    class Plain(original):  # type: ignore[misc, valid-type]
        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._plain = mapped.view(np.ndarray)

    package.GGUFReader = Plain
    try:
        yield
    finally:
        package.GGUFReader = original
