"""Factored matrices in the form in which they are trained, and back in the form in which they are stored.

Whatever a matrix is stored as, it is trained as two factors of one size. Modes then know one form only, and pivoting
again afterwards keeps the coefficients of pivoted storage small, which training them directly does not. The rank
stays, so the way back is exact (:mod:`bolaco.storage.pivot`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bolaco.layers import FactoredLinear, FollowerLinear, LeadLinear, LowRankLinear
from bolaco.storage.block import low_rank_linear
from bolaco.storage.storage import STORAGES
from bolaco.tune.mode import Matrix


def balanced(expand: Tensor, reduce: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product with equal Gram matrices, diagonal: its singular vectors by the roots of its values.

    Computed in float64, returned in the dtype of the arguments.
    """
    left, left_core = torch.linalg.qr(expand.double())
    right, right_core = torch.linalg.qr(reduce.double().T)
    u, values, vt = torch.linalg.svd(left_core @ right_core.T)
    root = values.sqrt()
    return (left @ (u * root)).to(expand.dtype), ((root[:, None] * vt) @ right.T).to(reduce.dtype)


def two_factors(model: nn.Module, matrices: Iterable[Matrix]) -> dict[str, LowRankLinear | FollowerLinear]:
    """Puts every factored matrix into the model as two balanced factors; by name, frozen as the model is.

    Matrices that share a factor are two factors already and stay as they are: one cannot be balanced without the other.
    """
    found: dict[str, LowRankLinear | FollowerLinear] = {}
    for matrix in matrices:
        module = matrix.of(model)
        if isinstance(module, LeadLinear | FollowerLinear):
            found[matrix.name] = module
            continue
        assert isinstance(module, FactoredLinear)
        expand, reduce = (factor.detach() for factor in module.factors())
        layer = low_rank_linear(*balanced(expand, reduce), module.dense_bias())
        matrix.put(model, layer)
        found[matrix.name] = layer
    return found


def stored(model: nn.Module, matrices: Iterable[Matrix]) -> None:
    """Brings two-factor layers into the form that their configuration entry names, of the same rank.

    The entry is changed with the layer.
    """
    for matrix in matrices:
        layer, entry = matrix.of(model), matrix.entry
        # Matrices that share a factor are stored as they are trained.
        if entry is None or entry["kind"] not in STORAGES:
            continue
        assert isinstance(layer, FactoredLinear)
        packed = STORAGES.get(entry["kind"]).pack(layer)
        matrix.put(model, packed)
        entry.update(packed.entry())


def growth(model: nn.Module) -> dict[str, float]:
    """Of matrices whose stored form lets rounding errors grow, the factor, by the name of their site."""
    found = {}
    for name, module in model.named_modules():
        grows = module.growth() if isinstance(module, FactoredLinear) else None
        if grows is not None:
            found[name.replace(".parts.", ".")] = grows
    return found
