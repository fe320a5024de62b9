"""Text that a model writes itself: a random first word, a short greedy start, then sampling.

The recipe is that of data-free quantization (LLM-QAT, arXiv 2305.17888; of pruning, arXiv 2410.17170 and 2406.15524): a
first token drawn evenly from the vocabulary makes texts differ, the most likely tokens after it begin a text that the
model finds natural, and sampling keeps to its own distribution from there. A batch depends on the settings and its
number only, so a run that was ended goes on with the next one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from bolaco.errors import DataError, ResumeError
from bolaco.models.structure import positions_of
from bolaco.settings import Section
from bolaco.work.files import write_text

# Batches without a new text after which a model is taken to have no more to say.
_PATIENCE = 20
# Words of the overlapping pieces by which a text is recognised, and the share of known ones that makes it a copy.
_PIECE, _COPIED = 8, 0.5


class Writing(Section):
    """How a model writes."""

    length: int = Field(1024, ge=2, description="tokens of a text at most")
    greedy: int = Field(4, ge=0, description="tokens after the first that are the most likely ones")
    temperature: float = Field(1.0, gt=0, description="of the sampling")
    top_p: float = Field(0.95, gt=0, le=1, description="probability of the likeliest tokens that are sampled from")
    batch: int = Field(16, gt=0, description="texts that are written at once")
    seed: int = Field(0, ge=0, lt=2**32)


class _GreedyStart(LogitsProcessor):
    """Leaves the likeliest token alone while a text is shorter than ``until`` tokens."""

    def __init__(self, until: int) -> None:
        self.until = until

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= self.until:
            return scores
        best = scores.argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, best, scores.gather(-1, best))


def first_tokens(tokenizer: Any) -> Tensor:
    """Token ids that a text can begin with: words or their beginnings, in letters; all but special ones if none is."""
    special = set(tokenizer.all_special_ids)
    ids = [number for number in range(len(tokenizer)) if number not in special]
    letters = [number for number in ids if tokenizer.decode([number]).strip().isalpha()]
    return torch.tensor(letters or ids)


def sampled(
    model: PreTrainedModel,
    tokenizer: Any,
    settings: Writing,
    seed: int,
    start: Tensor,
    prefix: Tensor | None = None,
    greedy: int = 0,
) -> list[list[int]]:
    """Continues a batch of texts up to ``settings.length`` tokens each, with a cache of keys and values.

    Args:
        model: in evaluation mode.
        tokenizer: of the model; its end-of-sequence token ends a text.
        settings: how; their seed is not used.
        seed: of this batch.
        start: ``[batch, n]`` token ids that the texts begin with; n may be 0 where there is a prefix.
        prefix: ``[batch, vectors, width]`` embeddings in front of the tokens, which are no part of the text.
        greedy: how many tokens after ``start`` are not sampled.

    Returns:
        The token ids of each text, ``start`` included, without what follows the end-of-sequence token and without it.
    """
    batch, given = start.shape
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=0,
        max_new_tokens=settings.length - given,
        eos_token_id=end,
        pad_token_id=0 if pad is None else pad,
    )
    inputs: dict[str, Any] = {"input_ids": start.to(model.device)}
    # Of embeddings alone transformers gives back the new tokens, and counts these only.
    seen = given
    if prefix is not None:
        parts = [prefix.to(model.device, model.dtype)]
        if given:
            parts.append(model.get_input_embeddings()(start.to(model.device)))
        inputs, seen = {"inputs_embeds": torch.cat(parts, dim=1)}, 0
    length = inputs["input_ids" if prefix is None else "inputs_embeds"].shape[1]
    inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.long, device=model.device)
    processors = LogitsProcessorList([_GreedyStart(seen + greedy)] if greedy else [])
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), _only(model, config):
        torch.manual_seed(seed)
        rows: Tensor = model.generate(**inputs, logits_processor=processors)  # type: ignore[operator]
    texts = []
    for first, row in zip(start.tolist(), rows[:, seen:].tolist(), strict=True):
        texts.append(first + (row[: row.index(end)] if end in row else row))
    return texts


@contextmanager
def _only(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """The model generates as ``config`` says, whatever its own settings (such as a repetition penalty) are."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def check_length(settings: Writing, config: Any, vectors: int = 0) -> None:
    """Stops where texts would not fit into the model.

    Raises:
        DataError: with both numbers.
    """
    positions = positions_of(config)
    if positions is not None and settings.length + vectors > positions:
        prompt = f" behind a prompt of {vectors} vectors" if vectors else ""
        raise DataError(
            f"texts of {settings.length} tokens{prompt} were asked for, but the model has {positions} positions; "
            f"lower the length to {positions - vectors}"
        )


def batch_seed(settings: Writing, number: int) -> int:
    """The seed of a batch: neighbouring seeds share none."""
    return crc32(f"{settings.seed} {number}".encode())


class Writer:
    """Writes batches of texts into a folder, or finds them there.

    Args:
        model: the model, in evaluation mode.
        tokenizer: of the model.
        settings: how it writes.
        folder: a file for each batch; it is good for one model and one set of settings.
        prefix: ``[vectors, width]`` of a soft prompt in front of every text; the texts then have no random first word.

    Raises:
        DataError: the texts would be longer than the model's positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        settings: Writing,
        folder: Path,
        prefix: Tensor | None = None,
    ) -> None:
        check_length(settings, model.config, 0 if prefix is None else len(prefix))
        self.model, self.tokenizer, self.settings, self.folder, self.prefix = model, tokenizer, settings, folder, prefix
        self._first: Tensor | None = None

    def batch(self, number: int) -> list[str]:
        """The texts of a batch, some of which can be empty or the same.

        Raises:
            ResumeError: the file of the batch is damaged.
        """
        file = self.folder / f"batch-{number:05d}.json"
        if file.exists():
            try:
                return TypeAdapter(list[str]).validate_json(file.read_bytes())
            except (ValidationError, OSError, ValueError):
                raise ResumeError(f"{file}: damaged; delete this file and run again") from None
        ids = self._written(number)
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(texts))
        return texts

    def _written(self, number: int) -> list[list[int]]:
        """The tokens of a batch."""
        settings, seed = self.settings, batch_seed(self.settings, number)
        if self.prefix is not None:
            prefix = self.prefix.expand(settings.batch, *self.prefix.shape)
            start = torch.empty(settings.batch, 0, dtype=torch.long)
            return sampled(self.model, self.tokenizer, settings, seed, start, prefix)
        if self._first is None:
            self._first = first_tokens(self.tokenizer)
        draw = torch.Generator().manual_seed(seed)
        start = self._first[torch.randint(len(self._first), (settings.batch, 1), generator=draw)]
        # Models that are used to a BOS token get it.
        marks = self.tokenizer("", add_special_tokens=True).input_ids[:1]
        if marks and marks[0] == self.tokenizer.bos_token_id:
            start = torch.cat([torch.full_like(start, marks[0]), start], dim=1)
        greedy = min(settings.greedy, settings.length - start.shape[1])
        return sampled(self.model, self.tokenizer, settings, seed, start, greedy=greedy)

    def until(self, enough: Callable[[Sequence[str]], bool], tick: Callable[[int], object] | None = None) -> list[str]:
        """Texts of which none is empty or a copy of an earlier one, batch by batch until there are enough.

        Args:
            enough: is asked after each batch, with all texts so far.
            tick: is told how many new ones a batch has brought.

        Raises:
            DataError: the model writes nothing new any more.
            ResumeError: see :meth:`batch`.
        """
        found: list[str] = []
        known, number, idle = Known(), 0, 0
        while not enough(found):
            new = [text for text in self.batch(number) if known.is_new(text)]
            found += new
            number, idle = number + 1, 0 if new else idle + 1
            if tick is not None:
                tick(len(new))
            if idle == _PATIENCE:
                raise DataError(
                    f"the model wrote {len(found)} different texts and then, in {idle} batches, no other; "
                    "ask for fewer, or raise the temperature or the length"
                )
        return found


class Known:
    """Which texts were there before: the same words, or mostly pieces of words that were."""

    def __init__(self) -> None:
        self._texts: set[str] = set()
        self._pieces: set[int] = set()

    def is_new(self, text: str) -> bool:
        """Whether a text is neither empty nor a copy; if so it is known from now on."""
        words = re.findall(r"\w+", text.lower())
        plain = " ".join(words)
        if not plain or plain in self._texts:
            return False
        pieces = {hash(" ".join(words[i : i + _PIECE])) for i in range(len(words) - _PIECE + 1)}
        if pieces and len(pieces & self._pieces) > _COPIED * len(pieces):
            return False
        self._texts.add(plain)
        self._pieces |= pieces
        return True
