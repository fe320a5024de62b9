"""The task: labelled texts in a JSON Lines file, and how they are divided."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bolaco.errors import DataError
from bolaco.settings import first_problem


class Labelled(BaseModel):
    """A line of a task: a text and its label."""

    model_config = ConfigDict(frozen=True, strict=True)

    text: str = Field(min_length=1)
    label: str = Field(min_length=1)


@dataclass(frozen=True)
class Task:
    """Labelled texts.

    Attributes:
        name: of the file.
        labels: all labels, in the order in which they are numbered.
        texts: the texts.
        targets: for each text the number of its label.
    """

    name: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    targets: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Changes with any text or label."""
        return hashlib.sha256(json.dumps([self.labels, self.texts, self.targets]).encode()).hexdigest()[:16]

    def part(self, numbers: Sequence[int]) -> Task:
        """The task with these of its texts."""
        texts = tuple(self.texts[n] for n in numbers)
        return Task(self.name, self.labels, texts, tuple(self.targets[n] for n in numbers))

    def of_label(self, label: int) -> list[int]:
        """Numbers of the texts with a label."""
        return [number for number, target in enumerate(self.targets) if target == label]

    def divided(self, share: float, seed: int) -> tuple[Task, Task]:
        """Two parts, of which the second has about ``share`` of the texts of each label and the first the others.

        A label with one text only has it in the first part.
        """
        draw, first, second = random.Random(seed), [], []
        for label in range(len(self.labels)):
            numbers = self.of_label(label)
            draw.shuffle(numbers)
            count = min(len(numbers) - 1, max(1, round(share * len(numbers))))
            second += numbers[:count]
            first += numbers[count:]
        return self.part(sorted(first)), self.part(sorted(second))


def read_task(file: str, labels: Sequence[str] | None = None, known: bool = False) -> Task:
    """Reads a task.

    Args:
        file: JSON Lines, each with a ``text`` and a ``label``; empty lines and further fields are left alone.
        labels: what there is; by default the labels that occur, in alphabetical order.
        known: ``labels`` are those of another file: not all of them need to occur here, and one is enough.

    Raises:
        DataError: it cannot be read or is empty, a line is not as it should be or has an unknown label, a label never
            occurs, or there is one only.
    """
    path = Path(file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise DataError(f"{file}: cannot be read ({reason})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = Labelled.model_validate_json(line)
        except ValidationError as error:
            raise DataError(f"{file}, line {number}: {first_problem(error, 'the line')}") from None
        if labels is not None and row.label not in labels:
            raise DataError(f"{file}, line {number}: label {row.label!r} is none of {', '.join(labels)}")
        rows.append(row)
    if not rows:
        raise DataError(f'{file}: there is no labelled text in it; a line is {{"text": .., "label": ..}}')
    names = tuple(labels or sorted({row.label for row in rows}))
    if not known:
        missing = [name for name in names if name not in {row.label for row in rows}]
        if missing:
            raise DataError(f"{file}: label {missing[0]!r} never occurs; give a text of it, or leave it out of labels")
        if len(names) < 2:
            raise DataError(f"{file}: has the label {names[0]!r} only; two are needed to tell one from the other")
    numbers = {name: number for number, name in enumerate(names)}
    return Task(file, names, tuple(row.text for row in rows), tuple(numbers[row.label] for row in rows))
