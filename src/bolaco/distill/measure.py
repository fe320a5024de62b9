"""How right answers are: of the teacher, of the student alone, and of the student with more and more of its store."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from bolaco.distill.index import make_index
from bolaco.distill.predict import mixed, retrieved
from bolaco.distill.record import Accuracy
from bolaco.distill.study import Studied
from bolaco.distill.task import Task
from bolaco.distill.teacher import Judgement

# Sizes of the store that accuracy is measured at, beside its own.
_SIZES = (16, 64, 256, 1024, 4096)


def accuracy_of(probabilities: Tensor, task: Task) -> float:
    """The share of right answers, of probabilities ``[texts, labels]``."""
    return float((probabilities.argmax(1) == torch.tensor(task.targets)).double().mean())


def answers_of(studied: Studied, texts: tuple[str, ...], what: str) -> tuple[Tensor, Tensor]:
    """Probabilities ``[texts, labels]`` of the student alone, and with its store."""
    own, places = studied.student.read(studied.student.encode(texts, what))
    if not studied.retrieval.share or studied.store.keys is None:
        return own, own
    found, _ = retrieved(studied.store, places, studied.retrieval, make_index(studied.store.keys))
    return own, mixed(own, found, studied.retrieval.share)


def measured(studied: Studied, teacher: Judgement, task: Task, seed: int) -> Accuracy:
    """Accuracy on the texts that are reported on.

    Args:
        studied: the student.
        teacher: what the teacher thinks of the same texts.
        task: the texts.
        seed: of the items that a smaller store has.
    """
    own, answer = answers_of(studied, task.texts, task.name)
    _, places = studied.student.read(studied.student.encode(task.texts, task.name))
    order = list(range(len(studied.store)))
    random.Random(seed).shuffle(order)
    by_size = {0: accuracy_of(own, task)}
    for size in [*(size for size in _SIZES if size < len(order)), len(order)]:
        some = studied.store.part(sorted(order[:size]))
        if studied.retrieval.share and some.keys is not None:
            found, _ = retrieved(some, places, studied.retrieval, make_index(some.keys))
            by_size[size] = accuracy_of(mixed(own, found, studied.retrieval.share), task)
    confusion = torch.zeros(len(task.labels), len(task.labels), dtype=torch.long)
    for target, guess in zip(task.targets, answer.argmax(1).tolist(), strict=True):
        confusion[target, guess] += 1
    return Accuracy(
        source=task.name,
        texts=len(task.texts),
        teacher=accuracy_of(teacher.probabilities, task),
        student=accuracy_of(own, task),
        mixed=accuracy_of(answer, task),
        by_size=by_size,
        confusion=confusion.tolist(),
    )
