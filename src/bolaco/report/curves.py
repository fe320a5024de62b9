"""What a report draws: spectra and losses with so few points that they can lie beside the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bolaco.allocate.budget import Ranks
from bolaco.models.structure import Site

POINTS = 32


def retained_energy(spectrum: Tensor, points: int = POINTS) -> list[float]:
    """Share of a descending spectrum ``[k]`` that its first ``i k / points`` components hold, for i = 1 to ``points``.

    Non-decreasing, the last one is 1. A matrix without any energy retains all of it.
    """
    exact = spectrum.double()
    total = float(exact.sum())
    if total <= 0:
        return [1.0] * points
    ranks = (torch.arange(1, points + 1) * len(exact) / points).round().long().clamp(min=1)
    shares = exact.cumsum(0)[ranks - 1] / total
    return [round(min(value, 1.0), 6) for value in shares.tolist()]


def matrix_curves(sites: Iterable[Site], spectra: Mapping[str, Tensor], ranks: Ranks) -> dict[str, dict[str, Any]]:
    """By site name: ``shape`` [out, in], and of factored matrices ``energy`` (:func:`retained_energy`) and ``kept``.

    ``kept`` is the share that the matrix's rank retains. Energy is squared error in the method's own metric.
    """
    result: dict[str, dict[str, Any]] = {}
    for site in sites:
        entry: dict[str, Any] = {"shape": [site.out_features, site.in_features]}
        spectrum, rank = spectra.get(site.name), ranks.get(site.name)
        if spectrum is not None:
            total = float(spectrum.sum())
            cut = 0.0 if rank is None or total <= 0 else float(spectrum[rank:].sum()) / total
            entry |= {"energy": retained_energy(spectrum), "kept": 1 - cut}
        # Of a stack each matrix has the whole of it: that is what was cut.
        result |= {member.name: entry for member in site.members}
    return result


def thinned(values: Sequence[float], points: int = POINTS) -> list[float]:
    """At most ``points`` means of consecutive values, of nearly equal numbers of them."""
    count = min(points, len(values))
    edges = [i * len(values) // count for i in range(count + 1)] if count else []
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
