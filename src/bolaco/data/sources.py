"""Text sources, and the equal-length token blocks packed from them.

A source is a ``.txt``, ``.jsonl`` or ``.parquet`` file, a folder of them, a hub data set (``id``, ``id:config`` or
``id:config:split``), or ``pydoc`` (the English of Python's own documentation, which every Python carries). A slice of
its documents is written behind it: ``c4.jsonl[:1000]``, ``c4.jsonl[1000:]``.

Packing: documents are tokenized one by one in order, concatenated without separators, and cut into blocks of equal
length; nothing is padded and the short rest is dropped. One stream feeds several uses (calibration, validation,
evaluation) with disjoint blocks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bolaco.errors import DataError
from bolaco.work.hub import check_hub

_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_SLICE = re.compile(r"^(?P<name>.*)\[(?P<start>\d*):(?P<stop>\d*)\]$", re.DOTALL)
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}$")


def _is_path(name: str) -> bool:
    return bool(name) and (
        Path(name).expanduser().exists() or Path(name).suffix in _SUFFIXES or name.startswith((".", "/", "~"))
    )


def on_hub(source: str) -> bool:
    """Whether a source is neither here nor pydoc: to read it is to download it."""
    name = split_slice(source)[0]
    return not _is_path(name) and name != "pydoc"


def read_documents(source: str) -> Iterator[str]:
    """Yields the non-empty documents of a source, in order.

    Raises:
        DataError: the source does not exist, cannot be read, or has no text column.
    """
    name, start, stop = split_slice(source)
    documents = itertools.islice(_all_documents(name), start, stop)
    return (text for text in documents if text.strip())


def split_slice(source: str) -> tuple[str, int, int | None]:
    """A source without the slice behind it, and the slice: ``c4.jsonl[10:]`` is ``("c4.jsonl", 10, None)``."""
    match = _SLICE.match(source)
    if match is None:
        return source, 0, None
    return match["name"], int(match["start"] or 0), int(match["stop"]) if match["stop"] else None


def _all_documents(name: str) -> Iterator[str]:
    if name == "pydoc" and not Path(name).exists():
        yield from _pydoc()
    elif _is_path(name):
        path = Path(name).expanduser()
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            yield from _saved(path)
            return
        for file in _files(path):
            if file.stat().st_size:
                yield from _texts_of(file)
    elif _HUB_ID.match(name):
        dataset, config, split = (*name.split(":"), "", "")[:3]
        # C4 asks for a configuration; English is what the field calibrates on.
        arguments = {"name": config or ("en" if dataset == "allenai/c4" else None), "split": split or "train"}
        check_hub(dataset, "README.md", DataError, "dataset")
        yield from _read(name, dataset, arguments)
    else:
        raise DataError(f"{name}: neither a file, a folder nor a hub data set id")


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _READERS and file.is_file())
        if not files:
            raise DataError(f"{path}: the folder holds no {', '.join(_READERS)} file")
        return files
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix not in _READERS:
        raise DataError(f"{path}: unknown kind of file; known are {', '.join(_READERS)}")
    return [path]


def _texts_of(file: Path) -> Iterator[str]:
    """The texts of a local file; of its rows nothing but the text is looked at."""
    try:
        for row in _READERS[file.suffix](file):
            if row.get("text", "") is None:
                continue  # a row without text is none
            yield _text(row, file)
    except DataError:
        raise
    except Exception as error:  # a file can hold anything
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{file}: cannot be read: {reason[0]}") from error


def _text(row: Mapping[str, Any], name: object) -> str:
    text = row.get("text")
    if isinstance(text, str):
        # JSON can write half a character; no tokenizer takes it.
        return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
    found = f"text is {type(text).__name__}" if "text" in row else f"they have {', '.join(map(str, row))}"
    raise DataError(f"{name}: rows have no 'text' string ({found})")


# Files that begin with a byte order mark are read without it.
_ENCODING = "utf-8-sig"


def _plain(file: Path) -> Iterator[dict[str, Any]]:
    yield {"text": file.read_text(encoding=_ENCODING)}


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding=_ENCODING) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{file}: cannot be read: line {number} is no JSON ({error})") from None
                yield _row(row, f"{file}, line {number}")


def _json(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding=_ENCODING) as start:
        is_list = start.read(1024).lstrip().startswith("[")
    if is_list:
        yield from (_row(row, file) for row in json.loads(file.read_text(encoding=_ENCODING)))
    else:
        yield from _lines(file)


def _row(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row is {type(value).__name__}, not an object with a 'text' string")
    return value


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file)
    names = table.schema_arrow.names
    if "text" not in names:
        raise DataError(f"{file}: rows have no 'text' string (they have {', '.join(names)})")
    for batch in table.iter_batches(columns=["text"]):
        yield from ({"text": text} for text in batch.column(0).to_pylist())


_READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".txt": _plain,
    ".jsonl": _lines,
    ".json": _json,
    ".parquet": _parquet,
}


def _saved(path: Path) -> Iterator[str]:
    """The texts of what ``datasets.save_to_disk`` wrote; of several splits the training one, or else the first."""
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
        rows = found
        if isinstance(found, DatasetDict):
            rows = found["train"] if "train" in found else next(iter(found.values()))
        if "text" in rows.column_names:
            rows = rows.select_columns(["text"])
        for row in rows:
            if row.get("text", "") is not None:
                yield _text(row, path)
    except DataError:
        raise
    except Exception as error:  # a folder can hold anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{path}: cannot be read: {reason[0]}") from error


def _read(name: str, builder: str, arguments: dict[str, Any]) -> Iterator[str]:
    from datasets import config, load_dataset
    from datasets.utils.logging import CRITICAL, disable_progress_bar, set_verbosity

    disable_progress_bar()
    set_verbosity(CRITICAL)  # what is wrong is raised, too
    config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a request for every file read, local ones included
    arguments = {"split": "train", **arguments}
    try:
        # Streaming: nothing is copied into a cache, and only what is needed is read.
        for row in load_dataset(builder, streaming=True, **arguments):
            if row.get("text", "") is not None:
                yield _text(row, name)
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
        source: what :func:`read_documents` takes.
        tokenizer: a transformers tokenizer.
        bos: ``text``: special tokens as the tokenizer adds them to each document; ``window``: every block starts with
            BOS, none inside; ``auto``: ``window`` for models that break down without it (Gemma), else ``text``.
        model_type: for ``auto``.
    """

    def __init__(self, source: str, tokenizer: Any, bos: str = "auto", model_type: str = "") -> None:
        if bos == "auto":
            bos = "window" if "gemma" in model_type else "text"
        self.source = source
        self.tokenizer = tokenizer
        self.window_bos = bos == "window"
        if self.window_bos and tokenizer.bos_token_id is None:
            raise DataError("bos: window needs a tokenizer with a BOS token; this one has none")
        self._documents = read_documents(source)
        self._rest = torch.empty(0, dtype=torch.long)
        self.tokens_read = 0

    def take(self, count: int | None, length: int, purpose: str, at_most: bool = False) -> Tensor:
        """The next ``count`` blocks (None: all that are left), shape ``[count, length]``, int64.

        With ``at_most`` fewer will do, but one.

        Raises:
            DataError: the source ends first; the message has both numbers.
        """
        body = length - 1 if self.window_bos else length
        wanted = None if count is None else count * body
        chunks, held = [self._rest], len(self._rest)
        while wanted is None or held < wanted:
            text = next(self._documents, None)
            if text is None:
                break
            ids = self.tokenizer(text, add_special_tokens=not self.window_bos, verbose=False).input_ids
            chunks.append(torch.tensor(ids, dtype=torch.long))
            held += len(ids)
            self.tokens_read += len(ids)
        self._rest = tokens = torch.cat(chunks)
        blocks = held // body if count is None else min(count, held // body) if at_most else count
        if blocks == 0 or held < blocks * body:
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


def fingerprint(*blocks: Tensor) -> str:
    """A short hash of token blocks, to recognise changed text when a run is resumed."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(repr(tuple(block.shape)).encode())
        digest.update(block.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
