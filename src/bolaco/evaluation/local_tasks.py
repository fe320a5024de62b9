"""Tasks from the user's own files, as task configurations of lm-evaluation-harness.

A file is JSON lines, one item each, in one of three shapes:

- ``query``, ``choices``, ``gold``: which choice continues the query best (ARC, BoolQ, OpenBookQA, PIQA);
- ``context_options``, ``continuation``, ``gold``: after which context the continuation is likeliest (WinoGrande);
- ``context``, ``continuation``: whether the model itself would go on like that, token for token (LAMBADA).

``gold`` is the index of the right choice, from 0. Other fields are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bolaco.errors import DataError
from bolaco.settings import parsed_json

_SUFFIXES = (".jsonl", ".json", ".yaml")  # the last two to say that they are not read

_CONTEXT = "context"


@dataclass(frozen=True)
class LocalTask:
    """The items of one file, cleaned: fields as in the file, texts without white space where they are joined."""

    name: str
    shape: str  # the field that tells it: ``choices``, ``context_options`` or ``context``
    items: list[dict[str, Any]]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of an lm-evaluation-harness task.

        The items are handed over in memory: nothing is copied into a cache, beside the file or elsewhere. There is no
        ``acc_norm`` for context options, because all of them are scored on the same continuation.
        """
        return {
            "task": self.name,
            "custom_dataset": lambda **_: _dataset(self.items),
            "test_split": "test",
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
            **(self._greedy if self.shape == _CONTEXT else self._choice),
        }

    @property
    def _choice(self) -> dict[str, Any]:
        one_context = self.shape == "choices"
        return {
            "output_type": "multiple_choice",
            # An integer as the text tells lm-evaluation-harness that the choices are contexts.
            "doc_to_text": "query" if one_context else "gold",
            "doc_to_target": "gold" if one_context else "continuation",
            "doc_to_choice": self.shape,
            "target_delimiter": " ",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                for metric in (("acc", "acc_norm") if one_context else ("acc",))
            ],
        }

    @property
    def _greedy(self) -> dict[str, Any]:
        """As the harness's own LAMBADA: perplexity is of whole continuations, however many tokens they have."""
        return {
            "output_type": "loglikelihood",
            "doc_to_text": lambda item: item["context"],
            "doc_to_target": lambda item: f" {item['continuation']}",
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        }


def _dataset(items: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(items)}


def is_local(item: str) -> bool:
    """Whether an item of ``--tasks`` means a file or a folder, and not a task by its name."""
    path = Path(item).expanduser()
    if path.suffix in _SUFFIXES or "/" in item or item.startswith((".", "~")):
        return True
    return path.is_dir() and any(path.glob("*.jsonl"))  # a folder that only has a task's name does not hide the task


def read_local(item: str) -> list[LocalTask]:
    """The task of a ``.jsonl`` file, or those of all such files in a folder.

    Raises:
        DataError: no such file, or a malformed one; the message has the file and the line.
    """
    path = Path(item).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.glob("*.jsonl") if file.is_file())
        if not files:
            raise DataError(f"{item}: the folder holds no .jsonl file")
        return [_read(file) for file in files]
    if not path.is_file():
        raise DataError(f"{item}: no such file")
    if path.suffix != ".jsonl":
        raise DataError(f"{item}: unknown kind of file; a task file is .jsonl")
    return [_read(path)]


def _read(file: Path) -> LocalTask:
    items: list[dict[str, Any]] = []
    shape = ""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                raw = parsed_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                shape = shape or _shape_of(raw)
                items.append(_SHAPES[shape](raw))
            except json.JSONDecodeError as error:
                raise DataError(f"{file}, line {number}: not JSON ({error.msg}, column {error.colno})") from None
            except UnicodeDecodeError:
                raise DataError(f"{file}, line {number}: not UTF-8") from None
            except ValueError as error:
                raise DataError(f"{file}, line {number}: {error}") from None
    if not items:
        raise DataError(f"{file}: the file holds no items")
    return LocalTask(str(file), shape, items)


def _shape_of(raw: Any) -> str:
    """The shape of a file is that of its first item; a context beside choices is a field that is ignored."""
    found = [name for name in _SHAPES if isinstance(raw, dict) and name in raw]
    if len(found) > 1 and _CONTEXT in found:
        found.remove(_CONTEXT)
    if len(found) != 1:
        raise ValueError(
            "expected an object with query, choices and gold, or context_options, continuation and gold, or context "
            "and continuation"
        )
    return found[0]


def _text(raw: Any, name: str) -> str:
    if not isinstance(raw, dict) or name not in raw:
        raise ValueError(f"{name} is missing")
    if not isinstance(raw[name], str) or not raw[name].strip():
        raise ValueError(f"{name} must be a string that is not empty")
    text: str = raw[name]
    return text


def _options(raw: Any, name: str) -> tuple[list[str], int]:
    """The options and the index of the right one."""
    if not isinstance(raw, dict) or name not in raw:
        raise ValueError(f"{name} is missing")
    options, gold = raw[name], raw.get("gold")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o.strip() for o in options):
        raise ValueError(f"{name} must be a list of two or more strings, none of them empty")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(options):
        raise ValueError(f"gold must be the index of one of {len(options)} {name}, from 0; it is {gold!r}")
    return options, gold


def prompt(query: str) -> str:
    """What a choice follows, after one space.

    Task files of this shape end in the question; the field asks it, as lm-evaluation-harness's own ARC, BoolQ and PIQA
    do, with an "Answer:" below.
    """
    query = query.rstrip()
    return f"{query}\nAnswer:" if query.rpartition("\n")[2].startswith("Question:") else query


def _one_context(raw: Any) -> dict[str, Any]:
    query = prompt(_text(raw, "query"))
    choices, gold = _options(raw, "choices")
    return {"query": query, "choices": [choice.strip() for choice in choices], "gold": gold}


def _many_contexts(raw: Any) -> dict[str, Any]:
    continuation = _text(raw, "continuation").strip()
    contexts, gold = _options(raw, "context_options")
    return {"context_options": [text.rstrip() for text in contexts], "continuation": continuation, "gold": gold}


def _greedy_item(raw: Any) -> dict[str, Any]:
    return {"context": _text(raw, _CONTEXT).rstrip(), "continuation": _text(raw, "continuation").strip()}


_SHAPES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "choices": _one_context,
    "context_options": _many_contexts,
    _CONTEXT: _greedy_item,
}
