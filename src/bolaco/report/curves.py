"""What a report draws of a run, in so few points that it can be kept beside the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from bolaco.checkpoint.info import MatrixCurve
from bolaco.models.structure import Site
from bolaco.storage.budget import Ranks

POINTS = 32


def retained_energy(spectrum: Tensor, points: int = POINTS) -> list[float]:
    """Which share of the energy each of ``points`` ranks retains, the ranks evenly spaced up to the full rank.

    Args:
        spectrum: ``[k]``, descending: the energy of each component, that is, the squared error of leaving it out.
        points: how many shares to return; number ``i``, from 1, is of rank ``i k / points``, rounded, at least 1.

    Returns:
        Non-decreasing shares in [0, 1], rounded to six digits; the last one is 1. Of a spectrum without any energy
        all are 1.
    """
    exact = spectrum.double()
    total = float(exact.sum())
    if total <= 0:
        return [1.0] * points
    ranks = (torch.arange(1, points + 1) * len(exact) / points).round().long().clamp(min=1)
    shares = exact.cumsum(0)[ranks - 1] / total
    return [round(min(value, 1.0), 6) for value in shares.tolist()]


def matrix_curves(sites: Iterable[Site], spectra: Mapping[str, Tensor], ranks: Ranks) -> dict[str, MatrixCurve]:
    """What the report draws of every matrix, by name.

    A site with a spectrum has :func:`retained_energy` of it, and ``kept``, the share that the site's rank retains (1
    where it stays dense). Energy is squared error in the metric of the method that the spectrum is from.

    Args:
        sites: matrices and stacks. The matrices of a stack all get the shape, spectrum and rank of the whole stack,
            because the stack is what was cut.
        spectra: of the sites that may be factored, by name.
        ranks: of the sites, by name; None, or no entry, is dense.
    """
    result: dict[str, MatrixCurve] = {}
    for site in sites:
        shape = (site.out_features, site.in_features)
        curve = MatrixCurve(shape=shape)
        spectrum, rank = spectra.get(site.name), ranks.get(site.name)
        if spectrum is not None:
            total = float(spectrum.sum())
            cut = 0.0 if rank is None or total <= 0 else float(spectrum[rank:].sum()) / total
            curve = MatrixCurve(shape=shape, energy=retained_energy(spectrum), kept=1 - cut)
        result |= {member.name: curve for member in site.members}
    return result


def thinned(values: Sequence[float], points: int = POINTS) -> list[float]:
    """``values`` in at most ``points`` means of neighbouring values, each over nearly the same number of them."""
    count = min(points, len(values))
    edges = [i * len(values) // count for i in range(count + 1)] if count else []
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
