"""Factored matrices in the form in which they are trained, and back in the form in which they are stored.

Whatever a matrix is stored as, it is trained as two factors of one size. Modes then know one form only, and pivoting
again afterwards keeps the coefficients of pivoted storage small, which training them directly does not. The rank
stays, so the way back is exact (:mod:`bolaco.factorize.pivot`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bolaco.compressed import low_rank_linear
from bolaco.factorize.pivot import pivot
from bolaco.layers import FollowerLinear, LeadLinear, LowRankLinear, PivotedLinear
from bolaco.tune.mode import Matrix


def factors_of(module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    """Factors ``[out, rank]`` and ``[rank, in]`` of a factored layer, and its bias ``[out]`` or None; detached."""
    if isinstance(module, LowRankLinear):
        own: Tensor | None = module.expand.bias
        return module.expand.weight.detach(), module.reduce.weight.detach(), None if own is None else own.detach()
    assert isinstance(module, PivotedLinear)
    kept, rest = module.pivot.weight.detach(), module.rest.weight.detach()
    one = torch.eye(module.rank, dtype=kept.dtype, device=kept.device)
    made = module.dense_bias()
    bias = None if made is None else made.detach()
    if module.side == "rows":
        return torch.cat([one, rest])[module.order], kept, bias
    return kept, torch.cat([one, rest], dim=1)[:, torch.argsort(module.order)], bias


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
        expand, reduce, bias = factors_of(module)
        layer = low_rank_linear(*balanced(expand, reduce), bias)
        matrix.put(model, layer)
        found[matrix.name] = layer
    return found


def stored(model: nn.Module, matrices: Iterable[Matrix]) -> None:
    """Brings two-factor layers into the form their configuration entry names, of the same rank.

    The entry of a pivoted matrix gets its new side.
    """
    for matrix in matrices:
        layer, entry = matrix.of(model), matrix.entry
        if entry is None or "side" not in entry:
            continue
        assert isinstance(layer, LowRankLinear)
        expand, reduce, bias = factors_of(layer)
        form = pivot(expand.cpu(), reduce.cpu())
        with torch.device("meta"):
            made = PivotedLinear(layer.in_features, layer.out_features, layer.rank, bias is not None, form.side)
        made.load_state_dict(form.state(None if bias is None else bias.cpu()), assign=True)
        matrix.put(model, made.to(expand.device).requires_grad_(False))
        entry["side"] = form.side


def growth(model: nn.Module) -> dict[str, float]:
    """Largest coefficient of each pivoted matrix, by the name of its site."""
    return {
        name.replace(".parts.", "."): float(module.rest.weight.detach().abs().max())
        if module.rest.weight.numel()
        else 0.0
        for name, module in model.named_modules()
        if isinstance(module, PivotedLinear)
    }
