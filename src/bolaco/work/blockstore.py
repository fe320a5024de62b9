"""Tensors on disk, one safetensors file per decoder block, each written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from bolaco.errors import ResumeError
from bolaco.parallel import team
from bolaco.work.tensors import damaged, load_tensors, save_tensors


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
        """Writes one block, whole or not at all; of several ranks, the first one does."""
        if team.is_first():
            save_tensors(self.path(layer), tensors)

    def read(self, layer: int, ending: str = "") -> dict[str, Tensor]:
        """Reads one block, or of it the tensors whose names end so.

        Raises:
            ResumeError: missing or damaged; names the file.
        """
        return load_tensors(self.path(layer), ending)

    def damaged(self, layer: int, error: object) -> ResumeError:
        """The error for a file that cannot be used."""
        return damaged(self.path(layer), error)
