"""Text sources, and the equal-length token blocks packed from them.

A source is a ``.txt``, ``.jsonl`` or ``.parquet`` file, a folder of them, a hub data set (``id``, ``id:config`` or
``id:config:split``), or ``pydoc`` (the English of Python's own documentation, which every Python carries). A run that
compresses has one more, ``self``: what the model writes itself (:mod:`bolaco.data.written`). A slice of a source's
documents is written behind it: ``c4.jsonl[:1000]``, ``c4.jsonl[1000:]``. A .txt file is one document; of other
files and data sets each row is one, by its column ``text``, or else ``messages``, or one that is named. A column holds
texts, or conversations, which become text by the chat template of the tokenizer.

Packing: documents are tokenized one by one in order, concatenated without separators, and cut into blocks of equal
length; nothing is padded and the short rest is dropped. One stream feeds several uses (calibration, validation,
evaluation) with disjoint blocks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bolaco.data.memory import IN_MEMORY, InMemory
from bolaco.errors import DataError
from bolaco.work.hub import check_hub

_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_SLICE = re.compile(r"^(?P<name>.*)\[(?P<start>\d*):(?P<stop>\d*)\]$", re.DOTALL)
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}$")


def _is_path(name: str) -> bool:
    return bool(name) and (
        Path(name).expanduser().exists() or Path(name).suffix in _SUFFIXES or name.startswith((".", "/", "~"))
    )


# The turns of a conversation: role, content, and what else its chat template reads.
Conversation = list[dict[str, Any]]
_COLUMNS = ("text", "messages")
# The source that is what the model writes itself.
SELF = "self"


def is_self(source: str) -> bool:
    """Whether a source is the model itself; a file or folder of that name is what it is."""
    return source == SELF and not _is_path(source)


def on_hub(source: str) -> bool:
    """Whether a source is neither here nor pydoc: to read it is to download it."""
    name = split_slice(source)[0]
    return not _is_path(name) and name not in ("pydoc", SELF) and not name.startswith(IN_MEMORY)


def read_documents(source: str, column: str | None = None) -> Iterator[str]:
    """Yields the non-empty texts of a source, in order.

    Args:
        source: see above.
        column: of rows; by default ``text``.

    Raises:
        DataError: the source does not exist, cannot be read, has no such column, or holds conversations.
    """
    for document in _documents(source, column):
        if not isinstance(document, str):
            raise DataError(f"{source}: a conversation becomes text by the template of a tokenizer only")
        yield document


def _documents(source: str, column: str | None) -> Iterator[str | Conversation]:
    """The documents of a source that are not empty."""
    name, start, stop = split_slice(source)
    documents = itertools.islice(_all_documents(name, column), start, stop)
    return (found for found in documents if (found.strip() if isinstance(found, str) else found))


def split_slice(source: str) -> tuple[str, int, int | None]:
    """A source without the slice behind it, and the slice: ``c4.jsonl[10:]`` is ``("c4.jsonl", 10, None)``."""
    match = _SLICE.match(source)
    if match is None:
        return source, 0, None
    return match["name"], int(match["start"] or 0), int(match["stop"]) if match["stop"] else None


def _all_documents(name: str, column: str | None) -> Iterator[str | Conversation]:
    if name.startswith(IN_MEMORY):
        raise DataError(f"{name}: was given to a function of Python and is no source; name another one")
    if name == SELF and not Path(name).exists():
        raise DataError(
            f"{name}: text of the model itself is there for --calibration only, and whole; "
            "`bolaco generate-text` writes a file of it"
        )
    if name == "pydoc" and not Path(name).exists():
        yield from _pydoc()
    elif _is_path(name):
        path = Path(name).expanduser()
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            yield from _saved(path, column)
            return
        for file in _files(path):
            if file.stat().st_size:
                yield from _documents_of(file, column)
    elif _HUB_ID.match(name):
        dataset, config, split = (*name.split(":"), "", "")[:3]
        # C4 asks for a configuration; English is what the field calibrates on.
        arguments = {"name": config or ("en" if dataset == "allenai/c4" else None), "split": split or "train"}
        check_hub(dataset, "README.md", DataError, "dataset")
        yield from _read(name, dataset, arguments, column)
    else:
        raise DataError(f"{name}: neither a file, a folder nor a hub data set id")


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"{path}: the folder holds no {', '.join(_SUFFIXES)} file")
        return files
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path}: unknown kind of file; known are {', '.join(_SUFFIXES)}")
    return [path]


def _documents_of(file: Path, column: str | None) -> Iterator[str | Conversation]:
    """The documents of a local file; of its rows nothing but the column is looked at."""
    try:
        if file.suffix == ".txt":
            yield file.read_text(encoding=_ENCODING)
            return
        for row in _READERS[file.suffix](file, column):
            document = _document(row, column, file)
            if document is not None:
                yield document
    except DataError:
        raise
    except Exception as error:  # a file can hold anything
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{file}: cannot be read: {reason[0]}") from error


def _column(names: Collection[str], column: str | None) -> str:
    """The column that documents are in, of those that there are."""
    return column or next((name for name in _COLUMNS if name in names), _COLUMNS[0])


def _document(row: Mapping[str, Any], column: str | None, name: object) -> str | Conversation | None:
    """What a row holds; None where it is null.

    Raises:
        DataError: the row has no such column, or that is neither text nor a conversation.
    """
    column = _column(row.keys(), column)
    if column not in row:
        raise _no_column(name, column, row)
    found = row[column]
    if isinstance(found, str):
        # JSON can write half a character; no tokenizer takes it.
        return found if found.isascii() else found.encode("utf-8", "replace").decode("utf-8")
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(turn, Mapping) for turn in found):
        raise DataError(f"{name}: rows have no {column!r} string ({column} is {type(found).__name__})")
    if not all(isinstance(turn.get("role"), str) and "content" in turn for turn in found):
        raise DataError(f"{name}: {column} must be a list of turns, each with a role and its content")
    # Columns hold null for what a turn does not have; a template looks whether it is there.
    return [{key: value for key, value in turn.items() if value is not None or key == "content"} for turn in found]


def _no_column(name: object, column: str, names: Iterable[str]) -> DataError:
    found = ", ".join(map(str, names))
    return DataError(f"{name}: rows have no {column!r} string (they have {found}); name the column with --text-column")


# Files that begin with a byte order mark are read without it.
_ENCODING = "utf-8-sig"


def _lines(file: Path, _: str | None) -> Iterator[dict[str, Any]]:
    with file.open(encoding=_ENCODING) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{file}: cannot be read: line {number} is no JSON ({error})") from None
                yield _row(row, f"{file}, line {number}")


def _json(file: Path, column: str | None) -> Iterator[dict[str, Any]]:
    with file.open(encoding=_ENCODING) as start:
        is_list = start.read(1024).lstrip().startswith("[")
    if is_list:
        yield from (_row(row, file) for row in json.loads(file.read_text(encoding=_ENCODING)))
    else:
        yield from _lines(file, column)


def _row(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row is {type(value).__name__}, not an object with a 'text' string")
    return value


def _parquet(file: Path, column: str | None) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file)
    names = table.schema_arrow.names
    column = _column(names, column)
    if column not in names:
        raise _no_column(file, column, names)
    for batch in table.iter_batches(columns=[column]):
        yield from ({column: value} for value in batch.column(0).to_pylist())


# The rows of a file, of a table only with the column that is wanted.
_READERS: dict[str, Callable[[Path, str | None], Iterator[dict[str, Any]]]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".parquet": _parquet,
}


def _saved(path: Path, column: str | None) -> Iterator[str | Conversation]:
    """The documents of what ``datasets.save_to_disk`` wrote; of several splits the training one, or else the first."""
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
        rows = found
        if isinstance(found, DatasetDict):
            rows = found["train"] if "train" in found else next(iter(found.values()))
        column = _column(rows.column_names, column)
        if column not in rows.column_names:
            raise _no_column(path, column, rows.column_names)
        for row in rows.select_columns([column]):
            document = _document(row, column, path)
            if document is not None:
                yield document
    except DataError:
        raise
    except Exception as error:  # a folder can hold anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path}: cannot be read: {reason[0]}") from error


def _read(name: str, builder: str, arguments: dict[str, Any], column: str | None) -> Iterator[str | Conversation]:
    from datasets import config, load_dataset
    from datasets.utils.logging import CRITICAL, disable_progress_bar, set_verbosity

    disable_progress_bar()
    set_verbosity(CRITICAL)  # what is wrong is raised, too
    config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a request for every file read, local ones included
    arguments = {"split": "train", **arguments}
    try:
        # Streaming: nothing is copied into a cache, and only what is needed is read.
        for row in load_dataset(builder, streaming=True, **arguments):
            document = _document(row, column, name)
            if document is not None:
                yield document
    except DataError:
        raise
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{name}: cannot be read: {reason[0]}") from error


def _pydoc() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts a BOS token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


class TokenStream:
    """Hands out disjoint blocks of one source's tokens, in order.

    Args:
        source: what :func:`read_documents` takes, or documents in memory.
        tokenizer: a transformers tokenizer.
        bos: ``text``: special tokens as the tokenizer adds them to each document; ``window``: every block starts with
            BOS, none inside; ``auto``: ``window`` for models that break down without it (Gemma), else ``text``.
        model_type: for ``auto``.
        column: of rows, see :func:`read_documents`; conversations are written by the tokenizer's chat template.
    """

    def __init__(
        self,
        source: str | InMemory,
        tokenizer: Any,
        bos: str = "auto",
        model_type: str = "",
        column: str | None = None,
    ) -> None:
        if bos == "auto":
            bos = "window" if "gemma" in model_type else "text"
        self.source = source if isinstance(source, str) else source.name
        self.tokenizer = tokenizer
        self.window_bos = bos == "window"
        if self.window_bos and tokenizer.bos_token_id is None:
            raise DataError("bos: window needs a tokenizer with a BOS token; this one has none")
        self.column = column
        self._documents: Iterator[str | Conversation] = (
            _documents(source, column) if isinstance(source, str) else iter(source.documents)
        )
        self._rest = torch.empty(0, dtype=torch.long)
        self.tokens_read = 0

    def take(self, count: int | None, length: int, purpose: str, at_most: bool = False) -> Tensor:
        """The next ``count`` blocks (None: all that are left), shape ``[count, length]``, int64.

        With ``at_most`` fewer will do, but one.

        Raises:
            DataError: the source ends first; the message has both numbers. Or a conversation cannot be written.
        """
        body = length - 1 if self.window_bos else length
        wanted = None if count is None else count * body
        chunks, held = [self._rest], len(self._rest)
        while wanted is None or held < wanted:
            document = next(self._documents, None)
            if document is None:
                break
            ids = self._ids(document)
            chunks.append(torch.tensor(ids, dtype=torch.long))
            held += len(ids)
            self.tokens_read += len(ids)
        self._rest = tokens = torch.cat(chunks)
        blocks = held // body if count is None else min(count, held // body) if at_most else count
        if blocks == 0 or held < blocks * body:
            self._check_slice()
            raise DataError(
                f"{self.source}: too short for {purpose}: {max(blocks, 1)} x {length} tokens are needed, "
                f"{held} are left; give more text, fewer sequences or a smaller length"
            )
        self._rest = tokens[blocks * body :]
        result = tokens[: blocks * body].view(blocks, body)
        if self.window_bos:
            start = torch.full((blocks, 1), self.tokenizer.bos_token_id)
            result = torch.cat([start, result], dim=1)
        return result

    def _ids(self, document: str | Conversation) -> list[int]:
        """The tokens of a document. A chat template writes the special tokens itself."""
        special = not self.window_bos
        if not isinstance(document, str):
            document, special = self._written(document), False
        ids: list[int] = self.tokenizer(document, add_special_tokens=special, verbose=False).input_ids
        return ids

    def _written(self, turns: Conversation) -> str:
        """A conversation as text; without BOS where each window gets one."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                f"{self.source}: its rows are conversations, but the tokenizer has no chat template; name a column of "
                "text with --text-column"
            )
        try:
            text: str = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # a template is a program of its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{self.source}: the chat template refuses a conversation: {reason}") from error
        return text.removeprefix(self.tokenizer.bos_token or "") if self.window_bos else text

    def _check_slice(self) -> None:
        """Raises DataError where nothing was read because the slice begins behind the last document."""
        name, start, _ = split_slice(self.source)
        if start and not self.tokens_read:
            count = sum(1 for _ in _all_documents(name, self.column))
            if count <= start:
                raise DataError(
                    f"{self.source}: takes what follows document {start}, but {name} has {count} in all; a slice "
                    "counts documents, and a .txt file is one"
                )


def fingerprint(*blocks: Tensor) -> str:
    """A short hash of token blocks, to recognise changed text when a run is resumed."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(repr(tuple(block.shape)).encode())
        digest.update(block.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
