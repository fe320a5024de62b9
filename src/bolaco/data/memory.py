"""Texts that are in memory already: a list of documents, a column of a data set, or blocks of tokens.

Such a text has a name that changes with its content, which stands where a source would stand in recipes and reports.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from bolaco.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

# What functions take where the command line takes the name of a source.
Data: TypeAlias = "str | Sequence[str] | Dataset | Tensor"

IN_MEMORY = "in memory: "
_TEXT = "text"


@dataclass(frozen=True)
class InMemory:
    """A text in memory.

    Attributes:
        name: what it is called in a recipe: how much it is, and a hash of it.
        documents: its documents; empty where it is tokens.
        tokens: ``[blocks, length]``, int64; None where it is documents.
    """

    name: str
    documents: tuple[str, ...] = field(default=(), repr=False)
    tokens: Tensor | None = field(default=None, repr=False)


def in_memory(data: Sequence[str] | Dataset | Tensor, purpose: str) -> InMemory:
    """What was given for ``purpose``, with its name.

    Raises:
        DataError: it is none of these, or empty.
    """
    if isinstance(data, Tensor):
        return _blocks(data, purpose)
    documents = tuple(_documents(data, purpose))
    if not documents:
        raise DataError(f"{purpose}: there is no text in it")
    # Lengths keep the bounds of documents apart.
    digest = _digest(part for text in documents for part in (len(text).to_bytes(8, "little"), text.encode()))
    return InMemory(f"{IN_MEMORY}{len(documents)} documents, {digest}", documents)


def _documents(data: Any, purpose: str) -> Iterator[str]:
    columns = getattr(data, "column_names", None)
    if columns is not None:
        if not isinstance(columns, list) or _TEXT not in columns:
            raise DataError(f"{purpose}: a data set with a column {_TEXT!r} is expected, this one has {columns}")
        # A row without text is none.
        data = [text for row in data.select_columns([_TEXT]) if (text := row[_TEXT]) is not None]
    elif not isinstance(data, Sequence) or isinstance(data, bytes):
        raise DataError(
            f"{purpose}: expected the name of a source, a list of strings, a datasets.Dataset or a tensor of tokens "
            f"[blocks, length], got {type(data).__name__}"
        )
    for number, text in enumerate(data):
        if not isinstance(text, str):
            raise DataError(f"{purpose}: document {number} is {type(text).__name__}, not a string")
        if text.strip():
            yield text


def _blocks(data: Tensor, purpose: str) -> InMemory:
    whole = not (data.is_floating_point() or data.is_complex() or data.dtype == torch.bool)
    if data.dim() != 2 or not whole or data.numel() == 0:
        raise DataError(
            f"{purpose}: a tensor of tokens is [blocks, length] of integers, this one is "
            f"{list(data.shape)} of {str(data.dtype).removeprefix('torch.')}"
        )
    tokens = data.detach().to("cpu", torch.int64).contiguous()
    digest = _digest([repr(tuple(tokens.shape)).encode(), tokens.numpy().tobytes()])
    return InMemory(f"{IN_MEMORY}{len(tokens)} blocks of {tokens.shape[1]} tokens, {digest}", tokens=tokens)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


class BlockStream:
    """Hands out disjoint blocks of tokens that are there already, in order, without adding any.

    Args:
        given: the tokens.
    """

    def __init__(self, given: InMemory) -> None:
        assert given.tokens is not None
        self.name, self._tokens, self._taken = given.name, given.tokens, 0

    def take(self, count: int | None, length: int, purpose: str) -> Tensor:
        """The next ``count`` blocks (None: all that are left), shape ``[count, length]``, int64.

        Raises:
            DataError: there are not as many, or they are shorter.
        """
        left = len(self._tokens) - self._taken
        wanted = max(left, 1) if count is None else count
        if wanted > left or length > self._tokens.shape[1]:
            raise DataError(
                f"{self.name}: too short for {purpose}: {wanted} x {length} tokens are needed, "
                f"{left} x {self._tokens.shape[1]} are left; give more blocks, fewer sequences or a smaller length"
            )
        self._taken += wanted
        return self._tokens[self._taken - wanted : self._taken, :length].contiguous()
