"""How a method changes what it factors before it factors it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bolaco.models.subject import Subject
from bolaco.progress import Reporter


@dataclass(frozen=True)
class SubjectTask:
    """What a subject is made from.

    Attributes:
        subject: the model's own matrices; not to be changed.
        tokens: ``[sequences, length]``, the calibration text.
        keep: the keep ratio of the run.
        options: of the method.
        seed: of the run.
        folder: where results go, so that an interrupted run finds them again. A statistic that is found on the way
            is stored in the folder of its name.
        reporter: where progress goes.
    """

    subject: Subject
    tokens: Tensor
    keep: float
    options: Any
    seed: int
    folder: Path
    reporter: Reporter


MakeSubject = Callable[[SubjectTask], Subject]
