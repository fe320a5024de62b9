"""Hashes of a model's tensors: what a mode does not train must come out bit for bit as it went in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from bolaco.checkpoint.info import Unchanged
from bolaco.errors import CheckpointError


def _hash(digest: Any, tensor: Tensor) -> None:
    digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def digests(model: nn.Module, names: Collection[str] | None = None) -> dict[str, str]:
    """SHA-256 of each tensor of a state dict, or of those of these names."""
    found = {}
    for name, tensor in model.state_dict().items():
        if names is None or name in names:
            digest = hashlib.sha256()
            _hash(digest, tensor)
            found[name] = digest.hexdigest()
    return found


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters that are not trained, and of the buffers that a checkpoint holds."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.requires_grad:
            digest.update(name.encode())
            _hash(digest, tensor)
    return digest.hexdigest()


def check_unchanged(model: nn.Module, before: dict[str, str], touched: frozenset[str], mode: str) -> Unchanged:
    """What of the input is in the result bit for bit: all that the mode did not mean to touch.

    Args:
        model: the result as loaded.
        before: :func:`digests` of the input.
        touched: names of modules or parameters that may have changed.
        mode: its name.

    Raises:
        CheckpointError: another tensor has changed; names it.
    """
    kept = {
        name: digest
        for name, digest in before.items()
        if not any(name == other or name.startswith(f"{other}.") for other in touched)
    }
    found = digests(model, kept.keys())
    for name, digest in kept.items():
        if found.get(name) != digest:
            raise CheckpointError(f"{name}: changed by mode {mode!r}, which does not train it")
    whole = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return Unchanged(tensors=len(kept), sha256=whole)
