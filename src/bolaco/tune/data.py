"""What is trained on: text packed into equal blocks, or instructions of which only the responses carry loss.

Instructions are a .jsonl file whose rows are all of one of these forms::

    {"prompt": ..., "response": ...}
    {"instruction": ..., "input": ..., "output": ...}                    (input may be missing or empty)
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}

Where the tokenizer has a chat template, every form is a conversation in it. Where it has none, a prompt is taken as it
is, an instruction becomes paragraphs that begin with ``Instruction:``, ``Input:`` and ``Response:``, and a conversation
one paragraph a turn, ``User:`` or ``Assistant:``; responses end with the end-of-text token.

Sequences are padded on the right. No attention mask is needed for that: a causal model does not look there.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bolaco.data.sources import TokenStream, adds_bos, fingerprint, split_slice
from bolaco.errors import DataError
from bolaco.tune.loss import IGNORED
from bolaco.tune.settings import TuneSettings

Example = dict[str, Tensor]

_FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "response"),
}
_SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}


class Collate:
    """Pads examples to the longest of a batch."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: list[Example]) -> Example:
        """Tensors ``[sequences, length]``."""
        fill = {"input_ids": self.pad, "labels": IGNORED}
        pad = torch.nn.utils.rnn.pad_sequence
        return {key: pad([e[key] for e in examples], batch_first=True, padding_value=fill[key]) for key in fill}


@dataclass(frozen=True)
class TuneData:
    """Examples, each with ``input_ids`` and ``labels`` ``[length]``: the token after each position, or none.

    Attributes:
        train: to train on.
        evaluation: held out.
        collate: makes a batch of examples.
        kind: ``text`` or ``instructions``.
        evaluation_source: where the held-out ones are from.
        fingerprint: changes with any token.
    """

    train: list[Example]
    evaluation: list[Example]
    collate: Collate
    kind: str
    evaluation_source: str
    fingerprint: str

    def tokens(self, count: int) -> list[Tensor]:
        """At most ``count`` sequences to train on, ``[1, length]`` each."""
        return [example["input_ids"][None] for example in self.train[:count]]


def prepare_data(settings: TuneSettings, tokenizer: Any, config: Any, world: int = 1) -> TuneData:
    """Reads data and evaluation text; where they are one source, evaluation gets its beginning.

    Args:
        settings: of the run.
        tokenizer: of the model.
        config: of the model.
        world: processes that train; how much text is read depends on it.

    Raises:
        DataError: unreadable, too short, or malformed data, or sequences longer than the model's positions.
    """
    length, held_out = settings.data.seq_len, settings.evaluation.source
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise DataError(f"data.seq_len: {length} tokens, but the model has {positions} positions; lower it")
    windows, wanted = settings.evaluation.windows, settings.data.sequences
    training = settings.training
    if wanted is None and training.max_steps is not None:
        wanted = training.max_steps * training.batch * training.gradient_accumulation * world
    source = _Source(settings.data.source, settings, tokenizer, config.model_type)
    if held_out is None:
        evaluation = source.take(windows, "evaluation", at_most=False)
    else:
        other = _Source(held_out, settings, tokenizer, config.model_type)
        evaluation = other.take(windows, "evaluation", at_most=True)
    train = source.take(wanted, "tuning", at_most=settings.data.sequences is None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    every = [example[key] for example in (*train, *evaluation) for key in ("input_ids", "labels")]
    kind = "instructions" if source.rows is not None else "text"
    return TuneData(train, evaluation, Collate(pad or 0), kind, held_out or settings.data.source, fingerprint(*every))


class _Source:
    """Examples of one source, in order."""

    def __init__(self, source: str, settings: TuneSettings, tokenizer: Any, model_type: str) -> None:
        self.source, self.length = source, settings.data.seq_len
        self.rows = self.stream = None
        if _holds_instructions(source):
            encoder = _Encoder(source, tokenizer, self.length, settings.data.train_on == "all")
            self.rows = encoder.examples()
        else:
            self.stream = TokenStream(source, tokenizer, settings.bos, model_type)

    def take(self, count: int | None, purpose: str, at_most: bool) -> list[Example]:
        """The next ``count`` examples (None: all that are left); with ``at_most`` fewer will do, but one."""
        if self.stream is not None:
            blocks = self.stream.take(count, self.length, purpose, at_most)
            after = torch.full((1,), IGNORED)
            return [{"input_ids": block, "labels": torch.cat([block[1:], after])} for block in blocks]
        assert self.rows is not None
        found = list(itertools.islice(self.rows, count))
        if not found or (not at_most and count is not None and len(found) < count):
            raise DataError(
                f"{self.source}: too short for {purpose}: {count or 1} instructions with a response within "
                f"{self.length} tokens are needed, {len(found)} are left"
            )
        return found


def _rows(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a .jsonl file, as far as its slice says."""
    name, start, stop = split_slice(source)
    with Path(name).expanduser().open(encoding="utf-8") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in itertools.islice(lines, start, stop):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{name}, line {number}: no JSON ({error})") from None
            if not isinstance(row, dict):
                raise DataError(f"{name}, line {number}: a {type(row).__name__}, not an object")
            yield number, row


def _holds_instructions(source: str) -> bool:
    """Whether this is a .jsonl file of something else than text."""
    path = Path(split_slice(source)[0]).expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    first = next(_rows(source), None)
    return first is not None and "text" not in first[1]


class _Encoder:
    """Rows to examples."""

    def __init__(self, source: str, tokenizer: Any, length: int, everything: bool) -> None:
        self.source, self.tokenizer, self.length, self.everything = source, tokenizer, length, everything
        self.start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []

    def examples(self) -> Iterator[Example]:
        """Of all rows in which a response token is left after cutting."""
        for number, row in _rows(self.source):
            where = f"{split_slice(self.source)[0]}, line {number}"
            ids, carries = self._encode(self._parts(where, row))
            tokens = torch.tensor(ids[: self.length])
            labels = torch.where(torch.tensor(carries[: self.length]), tokens, IGNORED)
            labels = torch.cat([labels[1:], torch.full((1,), IGNORED)])
            if bool((labels != IGNORED).any()):
                yield {"input_ids": tokens, "labels": labels}

    def _encode(self, parts: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
        # Chat templates bring their own beginning.
        ids = [] if self.tokenizer.chat_template else list(self.start)
        carries = [self.everything] * len(ids)
        for text, response in parts:
            more = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            ids += more
            carries += [response or self.everything] * len(more)
        return ids, carries

    def _parts(self, where: str, row: dict[str, Any]) -> list[tuple[str, bool]]:
        """Pieces of text, and whether each is a response."""
        form = next((form for form, keys in _FORMS.items() if all(key in row for key in keys)), None)
        if form is None:
            known = "; ".join(" and ".join(keys) for keys in _FORMS.values())
            raise DataError(f"{where}: has {', '.join(map(str, row)) or 'nothing'}; known are {known}")
        if form == "messages":
            turns = self._turns(where, row["messages"])
            return self._chat(where, turns) if self.tokenizer.chat_template else self._paragraphs(turns)
        keys = ("instruction", "input", "output") if form == "instruction" else ("prompt", "response")
        texts = [row.get(key) or "" for key in keys]
        for key, text in zip(keys, texts, strict=True):
            if not isinstance(text, str):
                raise DataError(f"{where}: {key} is {type(text).__name__}, not a string")
        *question, answer = texts
        if self.tokenizer.chat_template:
            asked = "\n\n".join(part for part in question if part)
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            return self._chat(where, turns)
        if form == "prompt":
            return [(question[0], False), (answer + self._end, True)]
        given = f"Input:\n{question[1]}\n\n" if question[1] else ""
        return [(f"Instruction:\n{question[0]}\n\n{given}Response:\n", False), (answer + self._end, True)]

    @property
    def _end(self) -> str:
        return self.tokenizer.eos_token or ""

    def _turns(self, where: str, messages: Any) -> list[dict[str, str]]:
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and m.get("role") in _SPEAKERS and isinstance(m.get("content"), str) for m in messages
        )
        if not good:
            raise DataError(
                f"{where}: messages must be a list of objects with a content string and a role out of "
                f"{', '.join(_SPEAKERS)}"
            )
        return list(messages)

    def _paragraphs(self, turns: list[dict[str, str]]) -> list[tuple[str, bool]]:
        parts = []
        for turn in turns:
            speaker, said = _SPEAKERS[turn["role"]], turn["content"]
            if speaker == "Assistant":
                parts += [("Assistant: ", False), (said + self._end, True), ("\n\n", False)]
            else:
                parts.append((f"{speaker}: {said}\n\n", False))
        return parts

    def _chat(self, where: str, turns: list[dict[str, str]]) -> list[tuple[str, bool]]:
        parts, done = [], ""
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._rendered(turns[:i], True)
            after = self._rendered(turns[: i + 1], False)
            if not (before.startswith(done) and after.startswith(before)):
                raise DataError(f"{where}: the chat template changes earlier turns; give a row to each response")
            parts += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return parts

    def _rendered(self, turns: list[dict[str, str]], ask: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
        return text
