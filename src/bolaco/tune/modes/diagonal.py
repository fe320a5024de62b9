"""Bolaco's post-training (arXiv 2405.10616, section 3.3): two vectors for each factored matrix are trained.

A matrix ``B A`` becomes ``B A + diag(b) B' diag(d) A'``, where B' is some columns of B and A' the same rows of A, all
frozen. Only b, which starts at 0, and d, which starts at 0.1, are trained. Afterwards they are folded into B, whose
column j becomes ``B_j + d_j (b * B_j)``, element by element: rank and size stay as they are.

The paper trains on instructions, 64 in a step; its released script has size 64 and a learning rate of 1e-2. A matrix
that is not stored as two factors is trained as two balanced ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.layers import FollowerLinear, LowRankLinear
from bolaco.tune.factored import in_two_factors, stored, two_factors
from bolaco.tune.mode import Context, Defaults, Mode, Options, Prepared


class DiagonalOptions(Options):
    """Size and start of the term that is trained."""

    size: int = Field(256, gt=0, description="columns of B and rows of A in the term; the rank, if that is less")
    start: float = Field(0.1, description="initial value of d")


class DiagonalLinear(nn.Module):
    """A frozen layer of two factors, plus the term that is trained.

    Args:
        layer: the layer; B is the weight of its ``expand``.
        chosen: which columns of B and rows of A are in the term, ``[size]``.
        start: initial value of d.
    """

    def __init__(self, layer: LowRankLinear | FollowerLinear, chosen: Tensor, start: float) -> None:
        super().__init__()
        self.layer = layer
        like = layer.expand.weight
        self.register_buffer("chosen", chosen.to(like.device))
        self.chosen: Tensor
        self.b = nn.Parameter(torch.zeros(layer.out_features, dtype=like.dtype, device=like.device))
        self.d = nn.Parameter(torch.full((len(chosen),), start, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        inner = self.layer.reduced(x)
        columns = self.layer.expand.weight[:, self.chosen]
        tuned: Tensor = self.layer.expand(inner) + self.b * F.linear(inner[..., self.chosen] * self.d, columns)
        return tuned

    def fold(self) -> LowRankLinear | FollowerLinear:
        """The layer, with the term added to B; computed in float64."""
        weight = self.layer.expand.weight.data
        columns = weight[:, self.chosen].double()
        weight[:, self.chosen] = (columns * (1 + self.b.data.double()[:, None] * self.d.data.double())).to(weight.dtype)
        return self.layer


def prepare(context: Context) -> Prepared:
    """Adds the term to every factored matrix; b and d require gradients."""
    model, options = context.model, context.options
    matrices, touched = context.factored, set()
    packed = [matrix for matrix in matrices if not in_two_factors(matrix.of(model))]
    two_factors(model, packed)
    for i, matrix in enumerate(matrices):
        layer = matrix.of(model)
        assert isinstance(layer, LowRankLinear | FollowerLinear)  # all are in two factors now
        generator = torch.Generator().manual_seed(context.settings.seed * 100_003 + i)
        chosen = torch.randperm(layer.rank, generator=generator)[: options.size]
        matrix.put(model, DiagonalLinear(layer, chosen, options.start))
        touched.add(matrix.name if matrix in packed else f"{matrix.name}.expand.weight")

    def finish() -> PreTrainedModel:
        for matrix in matrices:
            tuned = matrix.of(model)
            assert isinstance(tuned, DiagonalLinear)  # put there above
            matrix.put(model, tuned.fold())
        stored(model, matrices)
        return model

    return Prepared(finish, frozenset(touched))


MODE = Mode(
    name="diagonal",
    paper="arXiv 2405.10616, section 3.3",
    summary="two vectors a factored matrix, folded into it afterwards (Bolaco's post-training)",
    defaults=Defaults(learning_rate=2e-3, epochs=2.0, schedule="linear"),
    prepare=prepare,
    check=lambda context: context.factored,
    options=DiagonalOptions,
)
