"""Factors on disk, by decoder block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from bolaco.factorize.solver import Factors
from bolaco.parallel import team
from bolaco.work.blockstore import BlockStore

_TOKENS = "/tokens"
_FIELDS = tuple(field.name for field in fields(Factors))


class FactorStore(BlockStore):
    """The factors of a model's matrices in one folder."""

    def save(self, layer: int, factors: dict[str, Factors], tokens: Mapping[str, int] | None = None) -> None:
        """Writes one block's factors, by site name, and the calibration tokens that experts were sent, by site name."""
        counts = {f"{name}{_TOKENS}": torch.tensor(count) for name, count in (tokens or {}).items()}
        self.write(layer, _as_tensors(factors) | counts)

    def load(self, layer: int) -> dict[str, Factors]:
        """Reads one block's factors.

        Raises:
            ResumeError: missing or damaged; names the file.
        """
        try:
            return _as_factors(self.read(layer))
        except TypeError as error:
            raise self.damaged(layer, error) from error

    def tokens(self, layers: int) -> dict[str, int]:
        """The calibration tokens that experts were sent, by site name; empty for methods that read no text."""
        return {
            name.removesuffix(_TOKENS): int(count)
            for layer in range(layers)
            for name, count in self.read(layer, _TOKENS).items()
        }

    def spectra(self, layers: int) -> dict[str, Tensor]:
        """The spectrum of every factored matrix."""
        ending = "/spectrum"
        return {
            name.removesuffix(ending): spectrum
            for layer in range(layers)
            for name, spectrum in self.read(layer, ending).items()
        }


def gathered(own: dict[str, Factors]) -> dict[str, Factors]:
    """On the first rank, the factors that all ranks have made, by site name; on the others their own."""
    return _as_factors(team.collected(_as_tensors(own)))


def _as_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    values = {f"{name}/{field}": getattr(item, field) for name, item in factors.items() for field in _FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def _as_factors(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """What :func:`_as_tensors` gave; TypeError if it is not that."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.endswith(_TOKENS):
            continue
        name, _, field = key.rpartition("/")
        found.setdefault(name, {})[field] = value
    return {name: Factors(**values) for name, values in found.items()}
