"""What a run leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from transformers import PreTrainedModel

from bolaco.checkpoint.info import Info
from bolaco.models.load import load_model

AnInfo = TypeVar("AnInfo", bound=Info)


@dataclass(frozen=True)
class Result(Generic[AnInfo]):
    """The folder that was written, and what its ``bolaco.json`` says."""

    path: Path
    info: AnInfo

    def load(self) -> PreTrainedModel:
        """The model."""
        return load_model(str(self.path))
