"""Training data: text packed into blocks of equal length, or instructions, of which only the responses carry loss.

Instructions are a .jsonl file, each row in one of these forms::

    {"prompt": ..., "response": ...}
    {"instruction": ..., "input": ..., "output": ...}                    (input may be missing or empty)
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}

If the tokenizer has a chat template, a row of any form becomes a conversation in that template. If it has none, a
prompt is followed by its response as it is; an instruction becomes paragraphs that begin with ``Instruction:``,
``Input:`` and ``Response:``; and each turn of a conversation becomes a paragraph that begins with ``User:`` or
``Assistant:``. Responses then end with the end-of-text token.

Batches are padded on the right. That needs no attention mask: a causal model never looks to the right.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bolaco.data.sources import TokenStream, adds_bos, fingerprint, split_slice
from bolaco.errors import DataError
from bolaco.evaluation.losses import IGNORED
from bolaco.models.structure import positions_of
from bolaco.settings import parsed_json
from bolaco.tune.settings import TuneSettings

# One sequence: "input_ids" and "labels", [length] each. A label is the token to predict at its position, which is the
# next one, or IGNORED where there is no loss.
Example = dict[str, Tensor]

# Form of a row -> the keys by which it is recognised.
_FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "response"),
}
_SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}


class Collate:
    """Makes a batch of examples; ``pad`` is the token that fills up the shorter ones."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: list[Example]) -> Example:
        """``input_ids`` and ``labels``, ``[sequences, length of the longest]`` each."""
        fill = {"input_ids": self.pad, "labels": IGNORED}
        pad = torch.nn.utils.rnn.pad_sequence
        return {key: pad([e[key] for e in examples], batch_first=True, padding_value=fill[key]) for key in fill}


@dataclass(frozen=True)
class TuneData:
    """The examples of a run.

    Attributes:
        train: those that are trained on.
        evaluation: those that perplexity is measured on; none of them is trained on.
        collate: makes a batch of some.
        kind: ``text`` or ``instructions``, of those that are trained on.
        evaluation_source: where the evaluation examples are from.
    """

    train: list[Example]
    evaluation: list[Example]
    collate: Collate
    kind: str
    evaluation_source: str

    def tokens(self, count: int) -> list[Tensor]:
        """Token ids ``[1, length]`` of the first ``count`` training sequences, or of all if there are fewer."""
        return [example["input_ids"][None] for example in self.train[:count]]

    @property
    def trained_on(self) -> str:
        """A hash of every training example."""
        return _fingerprint(self.train)

    @property
    def evaluated_on(self) -> str:
        """A hash of every evaluation example."""
        return _fingerprint(self.evaluation)


def _fingerprint(examples: list[Example]) -> str:
    return fingerprint(*(example[key] for example in examples for key in ("input_ids", "labels")))


def prepare_data(settings: TuneSettings, tokenizer: Any, config: Any, processes: int = 1) -> TuneData:
    """Reads training and evaluation examples; if they come from one source, evaluation gets its beginning.

    Args:
        settings: settings of the run.
        tokenizer: tokenizer of the model.
        config: configuration of the model.
        processes: processes that train together; without ``data.sequences``, no more is read than their steps need.

    Raises:
        DataError: data that cannot be read, are too short or malformed, or sequences longer than the model's positions.
    """
    length, held_out = settings.data.seq_len, settings.evaluation.source
    positions = positions_of(config)
    if positions is not None and length > positions:
        raise DataError(f"data.seq_len: {length} tokens, but the model has {positions} positions; lower it")
    windows, wanted = settings.evaluation.windows, settings.data.sequences
    training = settings.training
    if wanted is None and training.max_steps is not None:
        wanted = training.max_steps * training.batch * training.gradient_accumulation * processes
    source = _open(settings.data.source, settings, tokenizer, config.model_type)
    if held_out is None:
        evaluation = source.take(windows, "evaluation", at_most=False)
    else:
        other = _open(held_out, settings, tokenizer, config.model_type)
        evaluation = other.take(windows, "evaluation", at_most=True)
    train = source.take(wanted, "tuning", at_most=settings.data.sequences is None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return TuneData(train, evaluation, Collate(pad or 0), source.kind, held_out or settings.data.source)


class _Source(Protocol):
    """Hands out the examples of one source in order, each once."""

    kind: str

    def take(self, count: int | None, purpose: str, at_most: bool) -> list[Example]:
        """The next ``count`` examples, or with None all that are left.

        Raises:
            DataError: there are fewer left; with ``at_most``, there are none.
        """


def _open(source: str, settings: TuneSettings, tokenizer: Any, model_type: str) -> _Source:
    length = settings.data.seq_len
    column = settings.data.text_column
    if column is None and _holds_instructions(source):
        return _Instructions(source, tokenizer, length, settings.data.train_on == "all")
    return _Text(TokenStream(source, tokenizer, settings.bos, model_type, column), length)


class _Text:
    """Blocks of ``length`` tokens, of which each predicts the next."""

    kind = "text"

    def __init__(self, stream: TokenStream, length: int) -> None:
        self.stream, self.length = stream, length

    def take(self, count: int | None, purpose: str, at_most: bool) -> list[Example]:
        blocks = self.stream.take(count, self.length, purpose, at_most)
        after = torch.full((1,), IGNORED)
        return [{"input_ids": block, "labels": torch.cat([block[1:], after])} for block in blocks]


class _Instructions:
    """Instructions, cut to ``length`` tokens; with ``everything``, prompts carry loss too."""

    kind = "instructions"

    def __init__(self, source: str, tokenizer: Any, length: int, everything: bool) -> None:
        self.source, self.length = source, length
        self._examples = _Encoder(source, tokenizer, length, everything).examples()

    def take(self, count: int | None, purpose: str, at_most: bool) -> list[Example]:
        found = list(itertools.islice(self._examples, count))
        if not found or (not at_most and count is not None and len(found) < count):
            raise DataError(
                f"{self.source}: too short for {purpose}: {count or 1} instructions with a response within "
                f"{self.length} tokens are needed, {len(found)} are left"
            )
        return found


def _rows(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and content of every row of a .jsonl file that is in the source's slice."""
    name, start, stop = split_slice(source)
    with Path(name).expanduser().open("rb") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in itertools.islice(lines, start, stop):
            try:
                row = parsed_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                raise DataError(f"{name}, line {number}: no JSON ({error})") from None
            if not isinstance(row, dict):
                raise DataError(f"{name}, line {number}: a {type(row).__name__}, not an object")
            yield number, row


def _holds_instructions(source: str) -> bool:
    """Whether this is a .jsonl file whose first row is not plain text."""
    path = Path(split_slice(source)[0]).expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    first = next(_rows(source), None)
    return first is not None and "text" not in first[1]


class _Encoder:
    """Turns rows into examples."""

    def __init__(self, source: str, tokenizer: Any, length: int, everything: bool) -> None:
        self.source, self.tokenizer, self.length, self.everything = source, tokenizer, length, everything
        self.start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []

    def examples(self) -> Iterator[Example]:
        """An example of every row, but for those in which no token with loss is left after cutting."""
        for number, row in _rows(self.source):
            where = f"{split_slice(self.source)[0]}, line {number}"
            ids, carries = self._encode(self._parts(where, row))
            tokens = torch.tensor(ids[: self.length])
            labels = torch.where(torch.tensor(carries[: self.length]), tokens, IGNORED)
            labels = torch.cat([labels[1:], torch.full((1,), IGNORED)])
            if bool((labels != IGNORED).any()):
                yield {"input_ids": tokens, "labels": labels}

    def _encode(self, parts: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
        """Tokens of pieces of text, and whether each token carries loss."""
        # A chat template writes the beginning of the text itself.
        ids = [] if self.tokenizer.chat_template else list(self.start)
        carries = [self.everything] * len(ids)
        for text, response in parts:
            more = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            ids += more
            carries += [response or self.everything] * len(more)
        return ids, carries

    def _parts(self, where: str, row: dict[str, Any]) -> list[tuple[str, bool]]:
        """A row as pieces of text, each with whether it is a response."""
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
        """A conversation, once it is known to be one."""
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
        """A conversation without a chat template."""
        parts = []
        for turn in turns:
            speaker, said = _SPEAKERS[turn["role"]], turn["content"]
            if speaker == "Assistant":
                parts += [("Assistant: ", False), (said + self._end, True), ("\n\n", False)]
            else:
                parts.append((f"{speaker}: {said}\n\n", False))
        return parts

    def _chat(self, where: str, turns: list[dict[str, str]]) -> list[tuple[str, bool]]:
        """A conversation in the chat template; a response is what the template adds for a turn of the assistant."""
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
        """Text of a conversation; with ``ask`` up to where the assistant's next turn begins."""
        text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
        return text
