"""A student from a store: trained, with its keys in the store, and with a choice of how it uses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bolaco.distill.predict import chosen_retrieval
from bolaco.distill.record import Retrieval
from bolaco.distill.settings import Studying
from bolaco.distill.store import Store
from bolaco.distill.student import Student, learn, new_student, student_texts


@dataclass(frozen=True)
class Studied:
    """A trained student.

    Attributes:
        student: in evaluation mode.
        store: what it retrieves from, with its keys.
        retrieval: how; its share is 0 where the store is not used.
        losses: of every step.
    """

    student: Student
    store: Store
    retrieval: Retrieval
    losses: list[float]


def study(
    store: Store,
    settings: Studying,
    held_out: float,
    seed: int,
    file: Path,
    tick: Callable[[int], object] | None = None,
) -> Studied:
    """Trains a student, and chooses how it uses its store.

    Args:
        store: of the teacher.
        settings: how.
        held_out: share of generated texts that the student does not see, and the choice is made on.
        seed: of everything that is drawn.
        file: where the steps are kept.
        tick: is told of steps.

    Raises:
        RecipeError: no student can be made of the settings.
        DataError: a text is longer than the student reads.
    """
    seen, apart = store.divided(held_out)
    student = new_student(student_texts(seen, settings), store.labels, settings, seed)
    losses = learn(student, seen, settings, seed, file, tick)
    _, keys = student.read(student.encode([item.text for item in seen.items], "the store"))
    seen = replace(seen, keys=keys)
    unused = Retrieval(neighbours=settings.neighbours[0], share=0.0, temperature=settings.temperature)
    if not settings.similarity or not len(apart):
        return Studied(student, seen, unused, losses)
    chosen = chosen_retrieval(student, seen, apart, settings.temperature, settings.neighbours)
    return Studied(student, seen, chosen, losses)
