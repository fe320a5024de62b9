"""Nearest keys by cosine: exact search, or FAISS for stores that are large."""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import torch
from torch import Tensor

from bolaco.errors import MissingPackageError

# Keys from which on `auto` takes FAISS, if it is installed; below, exact search takes milliseconds.
_LARGE = 20_000


class Index(Protocol):
    """Finds the nearest of some keys."""

    def search(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Cosines ``[queries, count]`` in falling order, and the numbers of the keys ``[queries, count]``."""


class Exact:
    """All cosines at once.

    Args:
        keys: ``[keys, width]`` of length 1.
    """

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys

    def search(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See :class:`Index`."""
        found = (queries @ self._keys.T).topk(min(count, len(self._keys)), dim=1)
        return found.values, found.indices


class Faiss:
    """A graph of near neighbours (HNSW, arXiv 1603.09320) by FAISS (arXiv 2401.08281): almost always the nearest.

    Args:
        keys: as for :class:`Exact`.

    Raises:
        MissingPackageError: FAISS is not installed.
    """

    _LINKS, _BUILD, _SEARCH = 32, 200, 128

    def __init__(self, keys: Tensor) -> None:
        try:
            import faiss
        except ImportError:
            raise MissingPackageError("student.index faiss needs FAISS; pip install 'bolaco[retrieval]'") from None
        self._index: Any = faiss.IndexHNSWFlat(keys.shape[1], self._LINKS, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = self._BUILD
        self._index.add(keys.float().contiguous().numpy())

    def search(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See :class:`Index`."""
        count = min(count, self._index.ntotal)
        self._index.hnsw.efSearch = max(self._SEARCH, 2 * count)
        cosines, numbers = self._index.search(queries.float().contiguous().numpy(), count)
        return torch.from_numpy(cosines), torch.from_numpy(numbers)


def _auto(keys: Tensor) -> Index:
    return Faiss(keys) if len(keys) >= _LARGE and importlib.util.find_spec("faiss") else Exact(keys)


INDICES = {"auto": _auto, "exact": Exact, "faiss": Faiss}


def make_index(keys: Tensor, kind: str = "auto") -> Index:
    """The index of a kind over keys ``[keys, width]`` of length 1.

    Raises:
        MissingPackageError: FAISS was asked for and is not installed.
    """
    return INDICES[kind](keys)
