"""Factored matrices in the form in which they are trained, and back in the form in which they are stored.

However a matrix is stored, it is trained as the product of two factors of equal scale. So a mode has to know one form
only, and it trains better: the coefficients of pivoted storage, for one, grow when they are trained directly, and stay
small when the trained product is pivoted anew. The way back is exact up to rounding, because training keeps the rank.
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
    """Factors of equal scale: singular vectors, each side multiplied by the roots of the singular values.

    Args:
        expand: ``[out, rank]``.
        reduce: ``[rank, in]``.

    Returns:
        Factors of the same shapes, dtypes and product. ``expand.T @ expand`` and ``reduce @ reduce.T`` are one and the
        same diagonal matrix. Computed in float64.
    """
    left, left_core = torch.linalg.qr(expand.double())
    right, right_core = torch.linalg.qr(reduce.double().T)
    u, values, vt = torch.linalg.svd(left_core @ right_core.T)
    root = values.sqrt()
    return (left @ (u * root)).to(expand.dtype), ((root[:, None] * vt) @ right.T).to(reduce.dtype)


def in_two_factors(layer: nn.Module) -> bool:
    """Whether a matrix is stored as it is trained: as two factors, one of which it may share with other matrices."""
    # A subclass with a kind of its own is another form.
    plain = isinstance(layer, FactoredLinear) and layer.kind == LowRankLinear.kind
    return plain or isinstance(layer, LeadLinear | FollowerLinear)


def two_factors(model: nn.Module, matrices: Iterable[Matrix]) -> dict[str, LowRankLinear | FollowerLinear]:
    """Puts factored matrices into the model as two balanced factors, which do not require gradients yet.

    Matrices that share a factor stay as they are: a factor cannot be balanced for two of them at once.

    Returns:
        The layers, by the names of their matrices.

    Raises:
        RecipeError: :func:`stored` would not find the storage of one of them.
    """
    found: dict[str, LowRankLinear | FollowerLinear] = {}
    for matrix in matrices:
        layer = matrix.of(model)
        if isinstance(layer, LeadLinear | FollowerLinear):
            found[matrix.name] = layer
            continue
        assert isinstance(layer, FactoredLinear)  # these are what is called factored
        STORAGES.get(layer.kind)  # a missing package is noticed before training, not after
        expand, reduce = (factor.detach() for factor in layer.factors())
        made = low_rank_linear(*balanced(expand, reduce), layer.dense_bias())
        matrix.put(model, made)
        found[matrix.name] = made
    return found


def stored(model: nn.Module, matrices: Iterable[Matrix]) -> None:
    """Undoes :func:`two_factors` after training: packs every layer into the form it was stored in, of the same rank.

    Entries of the configuration are updated in place, because a form can have details that depend on the weights.
    """
    for matrix in matrices:
        layer, entry = matrix.of(model), matrix.entry
        if entry is None or not isinstance(layer, FactoredLinear) or entry["kind"] == layer.kind:
            continue  # it is trained as it is stored
        packed = STORAGES.get(entry["kind"]).pack(layer)
        matrix.put(model, packed.requires_grad_(False))
        # A part of a split projection has its name in its entry.
        part = {"name": entry["name"]} if "name" in entry else {}
        entry.clear()
        entry.update(part | packed.entry())


def growth(model: nn.Module) -> dict[str, float]:
    """By matrix, the factor by which rounding errors can grow; of matrices in whose stored form they can."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, FactoredLinear))
    found = {name.replace(".parts.", "."): layer.growth() for name, layer in layers}
    return {name: factor for name, factor in found.items() if factor is not None}
