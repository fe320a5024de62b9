"""Tensors in a file of a work folder: written whole or not at all, and known to be as they were written when read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bolaco.errors import ResumeError
from bolaco.work.files import whole

# The one entry of the metadata, which several would be in a random order in: checksums, and what is kept beside.
_ENTRY = "bolaco"


def save_tensors(file: Path, tensors: Mapping[str, Tensor], record: Any = None) -> None:
    """Writes tensors with a checksum of each, and a record of anything that JSON can hold."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps([{name: _checksum(tensor) for name, tensor in sorted(plain.items())}, record])
    with whole(file) as partial:
        save_file(plain, partial, metadata={_ENTRY: f"{_sum(text)} {text}"})


def load_tensors(file: Path, ending: str = "") -> dict[str, Tensor]:
    """Reads tensors, or those whose names end so. They map the file instead of copying it.

    Raises:
        ResumeError: missing or damaged; names the file.
    """
    found, sums, _ = _read(file, ending)
    for name, tensor in found.items():
        if sums.get(name) != _checksum(tensor):
            raise damaged(file, f"the checksum of {name} is another one")
    return found


def load_record(file: Path) -> Any:
    """Reads the record beside the tensors.

    Raises:
        ResumeError: missing or damaged; names the file.
    """
    return _read(file, None)[2]


def damaged(file: Path, error: object) -> ResumeError:
    """The error for a file that cannot be used."""
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ResumeError(f"{file}: missing or damaged ({why}); delete this file and run again")


def _read(file: Path, ending: str | None) -> tuple[dict[str, Tensor], dict[str, str], Any]:
    """The tensors whose names end so, none where that is None; the checksums of all; the record."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            found = {name: opened.get_tensor(name) for name in names if ending is not None and name.endswith(ending)}
            entry = (opened.metadata() or {}).get(_ENTRY, "")
    except (OSError, SafetensorError) as error:
        raise damaged(file, error) from error
    known, _, text = entry.partition(" ")
    if known != _sum(text):
        raise damaged(file, "its checksums are not as they were written")
    sums, record = json.loads(text)
    if sums.keys() != set(names):
        raise damaged(file, "other tensors than were written")
    return found, sums, record


def _checksum(tensor: Tensor) -> str:
    """Of the bytes, the type and the shape."""
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return f"{zlib.crc32(flat.numpy().data):08x} {tensor.dtype} {tuple(tensor.shape)}"


def _sum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
