"""Stage ``predict``: what a student answers, mixed with what it finds in its store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bolaco.distill.index import Index, make_index
from bolaco.distill.record import DistilledInfo, Retrieval, read_distilled
from bolaco.distill.store import Store, read_store
from bolaco.distill.student import Student
from bolaco.errors import BolacoError, CheckpointError, DataError
from bolaco.models.load import resolve_device
from bolaco.models.quiet import quiet
from bolaco.settings import first_problem
from bolaco.work.files import write_text
from bolaco.work.output import refuse_existing

STORE = "store"
SHARES = tuple(n / 10 for n in range(10))


def retrieved(store: Store, places: Tensor, how: Retrieval, index: Index) -> tuple[Tensor, Tensor]:
    """What the items of a store say that are nearest to texts.

    Args:
        store: of the items.
        places: ``[texts, width]`` of length 1, by the student.
        how: how many items, and at which temperature their cosines count.
        index: of the store's keys.

    Returns:
        Probabilities ``[texts, labels]``, and the numbers of the items ``[texts, neighbours]``.
    """
    cosines, numbers = index.search(places, how.neighbours)
    weights = (cosines / how.temperature).softmax(-1)
    return (weights.unsqueeze(-1) * store.values[numbers]).sum(1), numbers


def mixed(own: Tensor, found: Tensor, share: float) -> Tensor:
    """A share of what was found and the rest of the student's own answer, ``[texts, labels]`` each."""
    return (1 - share) * own + share * found


def chosen_retrieval(
    student: Student, store: Store, held_out: Store, temperature: float, neighbours: Sequence[int]
) -> Retrieval:
    """How many items, and what share of what they say, suits best texts that the student has not seen.

    Args:
        student: trained.
        store: with keys.
        held_out: texts that are not in it.
        temperature: of cosines.
        neighbours: numbers to choose from.

    Returns:
        That of the least cross-entropy with the held-out values; fewer items and a smaller share where it is the same.
    """
    own, places = student.read(student.encode([item.text for item in held_out.items], "held-out texts"))
    assert store.keys is not None  # the student has read it
    index = make_index(store.keys)
    losses: list[tuple[float, Retrieval]] = []
    for count in neighbours:
        for share in SHARES:
            how = Retrieval(neighbours=count, share=share, temperature=temperature)
            found, _ = retrieved(store, places, how, index)
            answer = mixed(own, found, share).clamp_min(1e-9).log()
            losses.append((float(-(held_out.values * answer).sum(1).mean()), how))
    return min(losses, key=lambda found: found[0])[1]


@dataclass(frozen=True)
class Prediction:
    """An answer.

    Attributes:
        label: the likeliest one.
        probabilities: of all labels.
        items: texts of the store that were nearest, the nearest first; none where it is not used.
    """

    label: str
    probabilities: dict[str, float]
    items: tuple[str, ...]


class Predictor:
    """A student with its store, from a folder that ``bolaco distill`` wrote.

    Args:
        folder: the folder.
        neighbours: items that are retrieved; by default those chosen in training.
        share: of what they say in the answer; 0 leaves the store out.
        device: where the student runs.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
        DataError: its store is empty.
    """

    def __init__(
        self, folder: str | Path, neighbours: int | None = None, share: float | None = None, device: str = "auto"
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.info: DistilledInfo = read_distilled(self.folder)
        try:
            with quiet():
                model = AutoModelForSequenceClassification.from_pretrained(self.folder)
                tokenizer = AutoTokenizer.from_pretrained(self.folder)
            model = model.to(resolve_device(device)).eval()
            self.student = Student(model, tokenizer, self.info.length)
            # Its files can say what fails only then.
            own, place = self.student.read(self.student.encode(["a"], "a text"))
        except BolacoError:
            raise
        except Exception as error:  # files can hold anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{self.folder}: the student cannot be loaded ({reason})") from error
        if own.shape[1] != len(self.info.labels):
            raise CheckpointError(
                f"{self.folder}: the student has {own.shape[1]} labels, distill.json has {len(self.info.labels)}"
            )
        known = self.info.retrieval
        self.retrieval = Retrieval(
            neighbours=known.neighbours if neighbours is None else neighbours,
            share=known.share if share is None else share,
            temperature=known.temperature,
        )
        self.store = read_store(self.folder / STORE, self.info.labels) if self.retrieval.share else None
        if self.store is not None and (self.store.keys is None or self.store.keys.shape[1:] != place.shape[1:]):
            raise CheckpointError(f"{self.folder / STORE}: has no keys of this student, which has not read it")

    def probabilities(self, texts: Sequence[str], what: str = "texts") -> tuple[Tensor, Tensor | None]:
        """Of each label ``[texts, labels]``, and the numbers of the nearest items ``[texts, neighbours]``.

        Raises:
            DataError: a text is empty or too long.
        """
        own, places = self.student.read(self.student.encode(texts, what))
        if self.store is None or self.store.keys is None:
            return own, None
        index = make_index(self.store.keys, self.info.index)
        found, numbers = retrieved(self.store, places, self.retrieval, index)
        return mixed(own, found, self.retrieval.share), numbers

    def predict(self, texts: Sequence[str], what: str = "texts") -> list[Prediction]:
        """Answers for texts.

        Raises:
            DataError: a text is too long, or there is none.
        """
        if not texts:
            raise DataError(f"{what}: there is no text in it")
        found, numbers = self.probabilities(texts, what)
        labels, answers = self.info.labels, []
        for n, row in enumerate(found.tolist()):
            near = [] if numbers is None or self.store is None else numbers[n].tolist()
            items = tuple(self.store.items[i].text for i in near) if self.store is not None else ()
            answers.append(Prediction(labels[row.index(max(row))], dict(zip(labels, row, strict=True)), items))
        return answers


class _Text(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    text: str = Field(min_length=1)
    label: str | None = None


@dataclass(frozen=True)
class Predicted:
    """What ``bolaco distill predict`` did: how many texts, and the share of right answers where labels were given."""

    texts: int
    accuracy: float | None


def predict_file(predictor: Predictor, data: str, out: Path, items: int = 0) -> Predicted:
    """Answers each text of a JSON Lines file, in another one: the line, with ``prediction`` and ``probabilities``.

    Args:
        predictor: the student.
        data: lines with a ``text``, and with a ``label`` where it is known.
        out: file to write; must not exist.
        items: nearest items of the store that are written with each answer.

    Raises:
        DataError: the file cannot be read, a line is not as it should be, or a text is too long.
        OutputExistsError: ``out`` exists.
    """
    refuse_existing(out)
    try:
        lines = Path(data).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{data}: cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8 text'})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(_Text.model_validate_json(line))
            except ValidationError as error:
                raise DataError(f"{data}, line {number}: {first_problem(error, 'the line')}") from None
            if rows[-1].label is not None and rows[-1].label not in predictor.info.labels:
                known = ", ".join(predictor.info.labels)
                raise DataError(f"{data}, line {number}: label {rows[-1].label!r} is none of {known}")
    answers = predictor.predict([row.text for row in rows], data)
    written = []
    for row, answer in zip(rows, answers, strict=True):
        values = row.model_dump(exclude_none=True) | {
            "prediction": answer.label,
            "probabilities": {label: round(value, 6) for label, value in answer.probabilities.items()},
        }
        if items:
            values["items"] = list(answer.items[:items])
        written.append(json.dumps(values, ensure_ascii=False) + "\n")
    write_text(out, "".join(written))
    right = [row.label == answer.label for row, answer in zip(rows, answers, strict=True) if row.label is not None]
    return Predicted(len(rows), sum(right) / len(right) if right else None)
