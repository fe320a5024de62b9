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

# In the metadata: what is kept beside the tensors, and its checksum.
_RECORD, _RECORD_SUM = "#record", "#record-sum"


def save_tensors(file: Path, tensors: Mapping[str, Tensor], record: Any = None) -> None:
    """Writes tensors with a checksum of each, and a record of anything that JSON can hold."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sums = {name: _checksum(tensor) for name, tensor in plain.items()}
    if record is not None:
        text = json.dumps(record)
        sums |= {_RECORD: text, _RECORD_SUM: _sum(text.encode())}
    with whole(file) as partial:
        save_file(plain, partial, metadata=sums or None)


def load_tensors(file: Path, ending: str = "") -> dict[str, Tensor]:
    """Reads tensors, or those whose names end so. They map the file instead of copying it.

    Raises:
        ResumeError: missing or damaged; names the file.
    """
    found, sums = _read(file, ending)
    for name, tensor in found.items():
        if sums.get(name) != _checksum(tensor):
            raise damaged(file, f"the checksum of {name} is another one")
    return found


def load_record(file: Path) -> Any:
    """Reads the record beside the tensors.

    Raises:
        ResumeError: missing or damaged; names the file.
    """
    _, sums = _read(file, None)
    text = sums.get(_RECORD, "")
    if sums.get(_RECORD_SUM) != _sum(text.encode()):
        raise damaged(file, "the checksum of its record is another one")
    return json.loads(text)


def damaged(file: Path, error: object) -> ResumeError:
    """The error for a file that cannot be used."""
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ResumeError(f"{file}: missing or damaged ({why}); delete this file and run again")


def _read(file: Path, ending: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors whose names end so, none where that is None, and the metadata."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = [] if ending is None else [name for name in opened.keys() if name.endswith(ending)]  # noqa: SIM118 - not a dict
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise damaged(file, error) from error


def _checksum(tensor: Tensor) -> str:
    """Of the bytes, the type and the shape."""
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return f"{zlib.crc32(flat.numpy().data):08x} {tensor.dtype} {tuple(tensor.shape)}"


def _sum(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"
