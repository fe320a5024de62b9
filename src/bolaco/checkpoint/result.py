"""What a run leaves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import PreTrainedModel

from bolaco.checkpoint.info import Info
from bolaco.models.load import load_model, load_tokenizer

AnInfo = TypeVar("AnInfo", bound=Info)


@dataclass(frozen=True)
class Result(Generic[AnInfo]):
    """The folder that was written, and what its ``bolaco.json`` says."""

    path: Path
    info: AnInfo

    def load(self) -> PreTrainedModel:
        """The model, read anew."""
        return load_model(str(self.path))

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, read when it is first asked for."""
        return self.load()

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(str(self.path))


@dataclass(frozen=True)
class ModelResult(Generic[AnInfo]):
    """A compressed model in memory, its tokenizer, and what ``bolaco.json`` would say of it; no folder is left."""

    model: PreTrainedModel
    tokenizer: Any
    info: AnInfo
