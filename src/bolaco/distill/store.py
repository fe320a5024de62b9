"""Stage ``store``: texts that the teacher has written, with what it knows of them.

A store is a folder: ``items.jsonl`` has a text, its label and where it is from in each line, ``items.safetensors`` in
the same order what the teacher thinks of each label (``probabilities``), where it puts the text (``embeddings``), and
where the student does (``keys``, once there is one).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bolaco.data.written import Known, Writer, Writing
from bolaco.distill.prompt import Prompts, in_template
from bolaco.distill.settings import Distillation
from bolaco.distill.task import Labelled, Task
from bolaco.distill.teacher import Judgement, Teacher
from bolaco.errors import CheckpointError, DataError

_ITEMS, _TENSORS = "items.jsonl", "items.safetensors"


class Item(Labelled):
    """A line of ``items.jsonl``."""

    origin: Literal["labelled", "generated"]


@dataclass(frozen=True)
class Store:
    """Texts and what is known of them.

    Attributes:
        labels: their names.
        items: the texts.
        probabilities: ``[items, labels]``, of the teacher.
        embeddings: ``[items, width]``, of the teacher: centred, of length 1.
        keys: ``[items, width of the student]``, of the student, of length 1; None before there is one.
    """

    labels: tuple[str, ...]
    items: tuple[Item, ...]
    probabilities: Tensor
    embeddings: Tensor
    keys: Tensor | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def targets(self) -> Tensor:
        """``[items]``, the number of each label."""
        return torch.tensor([self.labels.index(item.label) for item in self.items], dtype=torch.long)

    @property
    def generated(self) -> Tensor:
        """``[items]``, whether the teacher has written a text."""
        return torch.tensor([item.origin == "generated" for item in self.items], dtype=torch.bool)

    @property
    def values(self) -> Tensor:
        """``[items, labels]``, what is retrieved: the label of a labelled text, else the teacher's probabilities."""
        known = nn.functional.one_hot(self.targets, len(self.labels)).to(self.probabilities)
        return torch.where(self.generated[:, None], self.probabilities, known)

    def part(self, numbers: Tensor | Sequence[int]) -> Store:
        """The store with these of its items."""
        chosen = torch.as_tensor(numbers, dtype=torch.long)
        return replace(
            self,
            items=tuple(self.items[n] for n in chosen.tolist()),
            probabilities=self.probabilities[chosen],
            embeddings=self.embeddings[chosen],
            keys=None if self.keys is None else self.keys[chosen],
        )

    def divided(self, share: float) -> tuple[Store, Store]:
        """Two parts, of which the second has about ``share`` of the generated texts of each label."""
        apart = torch.zeros(len(self), dtype=torch.bool)
        for label in range(len(self.labels)):
            some = (self.generated & (self.targets == label)).nonzero()[:, 0]
            # Every so many, in the order in which they were written.
            apart[some[:: round(1 / share)][: len(some) // 2]] = True
        return self.part((~apart).nonzero()[:, 0]), self.part(apart.nonzero()[:, 0])

    def save(self, folder: Path) -> None:
        """Writes the folder, which must not exist."""
        folder.mkdir(parents=True)
        lines = [item.model_dump_json() + "\n" for item in self.items]
        (folder / _ITEMS).write_text("".join(lines), encoding="utf-8")
        tensors = {"probabilities": self.probabilities, "embeddings": self.embeddings}
        tensors |= {} if self.keys is None else {"keys": self.keys}
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(plain, folder / _TENSORS, metadata={"labels": json.dumps(self.labels)})


def read_store(folder: Path, labels: Sequence[str]) -> Store:
    """Reads what :meth:`Store.save` wrote.

    Raises:
        CheckpointError: it is not there, or is damaged; names the file.
        DataError: it is empty.
    """
    try:
        lines = (folder / _ITEMS).read_text(encoding="utf-8").splitlines()
        items = tuple(TypeAdapter(Item).validate_json(line) for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise CheckpointError(f"{folder / _ITEMS}: cannot be read ({reason})") from None
    except ValidationError as error:
        raise CheckpointError(f"{folder / _ITEMS}: damaged ({error.errors()[0]['msg']})") from None
    if not items:
        raise DataError(f"{folder}: the store is empty; give a lower store.certainty, or more store.samples")
    try:
        tensors = load_file(folder / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / _TENSORS}: missing or damaged ({str(error).splitlines()[0]})") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes.get("probabilities") != (len(items), len(labels)) or any(s[0] != len(items) for s in shapes.values()):
        raise CheckpointError(
            f"{folder / _TENSORS}: damaged ({len(items)} items and {len(labels)} labels, but {shapes})"
        )
    unknown = {item.label for item in items} - set(labels)
    if unknown or "embeddings" not in tensors:
        what = f"label {min(unknown)!r} is none of {', '.join(labels)}" if unknown else "no embeddings"
        raise CheckpointError(f"{folder}: damaged ({what})")
    return Store(tuple(labels), items, tensors["probabilities"], tensors["embeddings"], tensors.get("keys"))


@dataclass(frozen=True)
class Kept:
    """What became of the texts that were drawn, by label: how many were kept, copies, or not what was asked for."""

    drawn: dict[str, int]
    kept: dict[str, int]
    copies: dict[str, int]
    uncertain: dict[str, int]


def judged(
    teacher: Teacher, prompts: Prompts, texts: Sequence[str], settings: Distillation, what: str | None
) -> Judgement:
    """What the teacher thinks of texts; ``what`` they are, or None to cut those that are too long.

    Raises:
        DataError: one is too long for it.
    """
    rows = teacher.encode(in_template(settings.prompt.template, texts), len(prompts.classify), what)
    return teacher.judge(prompts.classify, rows, prompts.tokens, settings.prompt.batch)


def build_store(
    teacher: Teacher,
    prompts: Prompts,
    task: Task,
    center: Tensor,
    settings: Distillation,
    folder: Path,
    tick: Callable[[int], object] | None = None,
) -> tuple[Store, Kept]:
    """Draws texts for every label, and keeps those that are new and of which the teacher is certain.

    The labelled texts are put before them.

    Args:
        teacher: which is frozen.
        prompts: of the stages before.
        task: the labelled texts.
        center: ``[width]``, mean embedding of the labelled texts; what is common to all texts says nothing.
        settings: how.
        folder: where finished batches are kept.
        tick: is told of texts that are drawn.

    Raises:
        DataError: no text was kept.
    """
    known, near = Known(), _Near(settings.store.copies)
    own = judged(teacher, prompts, task.texts, settings, task.name)
    parts = [_unit(own.embeddings - center)]
    probabilities = [own.probabilities]
    items = [
        Item(text=text, label=task.labels[target], origin="labelled")
        for text, target in zip(task.texts, task.targets, strict=True)
    ]
    for item in items:
        known.is_new(item.text)
    near.add(parts[0])
    counts = {name: dict.fromkeys(task.labels, 0) for name in ("drawn", "kept", "copies", "uncertain")}
    wanted = -(-settings.store.samples // len(task.labels))
    for label, name in enumerate(task.labels):
        for texts in _drawn(teacher, prompts.generate[label], label, wanted, settings, folder / f"label-{label}"):
            if tick is not None:
                tick(len(texts))
            new = [text for text in texts if known.is_new(text)]
            counts["drawn"][name] += len(texts)
            counts["copies"][name] += len(texts) - len(new)
            if not new:
                continue
            found = judged(teacher, prompts, new, settings, None)
            certain = found.probabilities[:, label] >= settings.store.certainty
            counts["uncertain"][name] += int((~certain).sum())
            places = _unit(found.embeddings - center)
            chosen = [n for n in certain.nonzero()[:, 0].tolist() if near.is_new(places[n])]
            counts["copies"][name] += int(certain.sum()) - len(chosen)
            counts["kept"][name] += len(chosen)
            items += [Item(text=new[n], label=name, origin="generated") for n in chosen]
            parts.append(places[chosen])
            probabilities.append(found.probabilities[chosen])
    kept = Kept(**counts)
    if not sum(kept.kept.values()):
        drawn, copies, uncertain = (sum(found.values()) for found in (kept.drawn, kept.copies, kept.uncertain))
        raise DataError(
            f"the store is empty: of {drawn} texts of the teacher {copies} were copies or empty and {uncertain} not "
            "certain; lower store.certainty, raise store.samples or give the prompts more steps"
        )
    return Store(task.labels, tuple(items), torch.cat(probabilities), torch.cat(parts)), kept


def _drawn(
    teacher: Teacher, prompt: Tensor, label: int, wanted: int, settings: Distillation, folder: Path
) -> Iterator[list[str]]:
    """Texts of a label, ``wanted`` in all, in batches of which some can be empty texts."""
    store = settings.store
    writing = Writing(
        length=settings.reinforce.length,
        temperature=store.temperature,
        top_p=store.top_p,
        batch=min(store.batch, wanted),
        seed=(settings.seed + label) % 2**32,
    )
    writer = Writer(teacher.model, teacher.tokenizer, writing, folder, prompt)
    for number in range(-(-wanted // writing.batch)):
        yield writer.batch(number)[: wanted - number * writing.batch]


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(vectors, dim=1)


class _Near:
    """Which places were there before, by the cosine."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._places: Tensor | None = None

    def add(self, places: Tensor) -> None:
        self._places = places if self._places is None else torch.cat([self._places, places])

    def is_new(self, place: Tensor) -> bool:
        """Whether a place is far enough from all others; if so it is one of them from now on."""
        if self._places is not None and len(self._places) and float((self._places @ place).max()) > self._most:
            return False
        self.add(place[None])
        return True
