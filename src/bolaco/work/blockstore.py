"""Tensors on disk, one safetensors file per decoder block, each written whole or not at all."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bolaco.errors import ResumeError


def _checksum(tensor: Tensor) -> str:
    """Of the bytes, the type and the shape."""
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return f"{zlib.crc32(flat.numpy().data):08x} {tensor.dtype} {tuple(tensor.shape)}"


class BlockStore:
    """A folder of blocks; reading maps a file instead of copying it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, layer: int) -> Path:
        """File of one block."""
        return self.folder / f"block-{layer:05d}.safetensors"

    def has(self, layer: int) -> bool:
        """Whether the block is finished."""
        return self.path(layer).is_file()

    def complete(self, layers: int) -> bool:
        """Whether all of so many blocks are finished."""
        return all(self.has(layer) for layer in range(layers))

    def write(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Writes one block under a temporary name and renames it."""
        partial = self.path(layer).with_suffix(".partial")
        plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, partial, metadata={name: _checksum(tensor) for name, tensor in plain.items()} or None)
        partial.replace(self.path(layer))

    def read(self, layer: int, ending: str = "") -> dict[str, Tensor]:
        """Reads one block, or of it the tensors whose names end so.

        Raises:
            ResumeError: missing or damaged; names the file.
        """
        try:
            with safe_open(self.path(layer), framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys() if name.endswith(ending)}  # noqa: SIM118 - not a dict
                sums = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise self.damaged(layer, error) from error
        for name, tensor in found.items():
            if sums.get(name) != _checksum(tensor):
                raise self.damaged(layer, f"the checksum of {name} is another one")
        return found

    def damaged(self, layer: int, error: object) -> ResumeError:
        """The error for a file that cannot be used."""
        return ResumeError(f"{self.path(layer)}: missing or damaged ({error}); delete this file and run again")
