"""Hashes of a model's tensors, to prove that what a mode does not train comes out as it went in, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bolaco.checkpoint.info import Unchanged
from bolaco.errors import CheckpointError


def tensor_digests(
    model: nn.Module, names: Collection[str] | None = None, stored: torch.dtype | None = None
) -> dict[str, str]:
    """SHA-256 of every tensor of the model's state dict, by name; with ``names``, of these only.

    With ``stored`` they are those of the tensors once they have been stored in this number format.
    """
    found = {}
    for name, tensor in model.state_dict().items():
        if names is None or name in names:
            digest = hashlib.sha256()
            rounded = stored is not None and tensor.is_floating_point()
            _add(digest, tensor.to(stored).to(tensor.dtype) if rounded else tensor)
            found[name] = digest.hexdigest()
    return found


def frozen_digest(model: nn.Module) -> str:
    """One SHA-256 of everything in the model's state dict that does not require a gradient."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.requires_grad:
            digest.update(name.encode())
            _add(digest, tensor)
    return digest.hexdigest()


def check_unchanged(before: Mapping[str, str], result: nn.Module, touched: Collection[str], mode: str) -> Unchanged:
    """Compares the result with the input, but for what the mode trains.

    Args:
        before: :func:`tensor_digests` of the input.
        result: the result, as loaded from its folder.
        touched: names of the modules and parameters that may be different.
        mode: name of the mode.

    Raises:
        CheckpointError: another tensor is different, or missing; names it.
    """
    kept = {
        name: digest
        for name, digest in before.items()
        if not any(name == other or name.startswith(f"{other}.") for other in touched)
    }
    found = tensor_digests(result, kept.keys())
    for name, digest in kept.items():
        if found.get(name) != digest:
            raise CheckpointError(f"{name}: changed by mode {mode!r}, which does not train it")
    together = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return Unchanged(tensors=len(kept), sha256=together)


def _add(digest: Any, tensor: Tensor) -> None:
    """Adds shape, dtype and bytes of a tensor to a hash."""
    digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
