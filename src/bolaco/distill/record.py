"""``distill.json``: what a distillation was, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bolaco.errors import CheckpointError
from bolaco.settings import first_problem
from bolaco.work.files import read_json

FILE = "distill.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=True)


class Retrieval(_Record):
    """How the store is used: how many items, what share of the answer is theirs, the temperature of their cosines."""

    neighbours: int = Field(gt=0)
    share: float = Field(ge=0, le=1)
    temperature: float = Field(gt=0)


class LearnedRecord(_Record):
    """Of a prompt: the loss of every step, and by step that on held-out texts, in nats."""

    losses: list[float]
    held_out: dict[int, float]


class SampledRecord(_Record):
    """Means over texts that were sampled with the prompts; see :class:`bolaco.distill.reinforce.Sampled`."""

    reward: float
    certainty: float
    kl: float
    distinct: float
    texts: list[list[str]]


class ReinforcedRecord(_Record):
    """See :class:`bolaco.distill.reinforce.Reinforced`."""

    rewards: list[float]
    kl: list[float]
    weights: list[float]
    before: SampledRecord
    after: SampledRecord


class StoreRecord(_Record):
    """Texts of each label: drawn, kept, copies, and not certain enough."""

    drawn: dict[str, int]
    kept: dict[str, int]
    copies: dict[str, int]
    uncertain: dict[str, int]


class Accuracy(_Record):
    """On the labelled texts that are reported on.

    Attributes:
        source: which they are.
        texts: how many.
        teacher, student, mixed: share of right answers: of the prompted teacher, of the student alone, with its store.
        by_size: the last one, with so many items of the store.
        confusion: ``[label][answer]`` counts of the last one.
    """

    source: str
    texts: int
    teacher: float
    student: float
    mixed: float
    by_size: dict[int, float]
    confusion: list[list[int]]


class DistilledInfo(_Record):
    """Content of ``distill.json``.

    Attributes:
        teacher: as it was named.
        labels: in the order in which they are numbered.
        length: tokens that the student reads at most.
        index: see :data:`bolaco.distill.index.INDICES`.
        parameters, parameters_teacher: how many.
        losses: of the student.
    """

    teacher: str
    labels: tuple[str, ...] = Field(min_length=2)
    length: int = Field(gt=0)
    index: str
    retrieval: Retrieval
    parameters: int
    parameters_teacher: int
    classify: LearnedRecord
    generate: LearnedRecord
    reinforced: ReinforcedRecord
    store: StoreRecord
    losses: list[float]
    accuracy: Accuracy
    settings: dict[str, Any]
    seconds: dict[str, float]
    versions: dict[str, str]


def read_distilled(folder: Path) -> DistilledInfo:
    """The record of a folder that ``bolaco distill`` wrote.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not (folder / FILE).is_file():
        raise CheckpointError(f"{folder}: no folder that `bolaco distill` wrote (no {FILE} in it)")
    try:
        return DistilledInfo.model_validate(read_json(folder / FILE))
    except ValidationError as error:
        raise CheckpointError(f"{folder / FILE}: damaged ({first_problem(error, 'the record')})") from None
