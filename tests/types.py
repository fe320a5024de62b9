"""Tiny models of every type: those of benchmarks/tiny.py."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from transformers import PreTrainedModel

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@functools.cache
def tiny() -> ModuleType:
    """The module."""
    spec = importlib.util.spec_from_file_location("bolaco_benchmarks_tiny", BENCHMARKS / "tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def of_type(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A new model."""
    model: PreTrainedModel = tiny().tiny_model(model_type, seed)
    return model


def tokens_for(model: PreTrainedModel, sequences: int = 3, length: int = 12) -> Tensor:
    """Tokens ``[sequences, length]`` that are no special ones."""
    top = model.get_input_embeddings().weight.shape[0]
    return torch.randint(8, top - 1, (sequences, length), generator=torch.Generator().manual_seed(3))
