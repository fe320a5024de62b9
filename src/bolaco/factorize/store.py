"""Factors on disk: one safetensors file per decoder block, written whole or not at all."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bolaco.errors import ResumeError
from bolaco.factorize.solver import Factors

_FIELDS = tuple(field.name for field in fields(Factors))


class FactorStore:
    """The factors of a model's matrices in one folder; reading maps the file instead of copying it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, layer: int) -> Path:
        """File of one block."""
        return self.folder / f"block-{layer:05d}.safetensors"

    def has(self, layer: int) -> bool:
        """Whether the block is finished."""
        return self.path(layer).is_file()

    def spectra(self, layers: int) -> dict[str, torch.Tensor]:
        """The spectrum of every factored matrix."""
        return {name: item.spectrum for layer in range(layers) for name, item in self.load(layer).items()}

    def save(self, layer: int, factors: dict[str, Factors]) -> None:
        """Writes one block's factors, by site name."""
        tensors = {}
        for name, item in factors.items():
            for field in _FIELDS:
                value = getattr(item, field)
                if value is not None:
                    tensors[f"{name}/{field}"] = value.contiguous().cpu()
        partial = self.path(layer).with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(self.path(layer))

    def load(self, layer: int) -> dict[str, Factors]:
        """Reads one block's factors.

        Raises:
            ResumeError: missing or damaged; names the file.
        """
        path = self.path(layer)
        found: dict[str, dict[str, torch.Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    name, _, field = key.rpartition("/")
                    found.setdefault(name, {})[field] = file.get_tensor(key)
            return {name: Factors(**values) for name, values in found.items()}
        except (OSError, SafetensorError, TypeError) as error:
            raise ResumeError(f"{path}: missing or damaged ({error}); delete this file and run again") from error
