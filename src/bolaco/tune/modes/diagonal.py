"""Bolaco's post-training (arXiv 2405.10616, section 3.3): two vectors a matrix, inside the subspace that is there.

``y = (B A + diag(b) B' diag(d) A') x``, where B' and A' are some columns of B and the same rows of A, all frozen, and
only b (from 0) and d (from 0.1) are trained. It folds: column j of B becomes ``B_j + d_j (b o B_j)``.

The paper trains on instructions, 64 a step; its released script has size 64 and a learning rate of 1e-2. Pivoted
matrices are trained as two balanced factors and pivoted again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.layers import FollowerLinear, LowRankLinear
from bolaco.tune.factored import stored, two_factors
from bolaco.tune.mode import Context, Defaults, Mode, Options, Prepared


class DiagonalOptions(Options):
    """Size and start of the tuned term."""

    size: int = Field(256, gt=0, description="columns of B and rows of A in it; the rank, where that is less")
    start: float = Field(0.1, description="of d")


class DiagonalLinear(nn.Module):
    """A frozen two-factor layer with the tuned term.

    Args:
        layer: the frozen factors.
        chosen: ``[size]``, which columns of B and rows of A.
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
        """The layer with the term in its factor B, computed in float64."""
        weight = self.layer.expand.weight.data
        columns = weight[:, self.chosen].double()
        weight[:, self.chosen] = (columns * (1 + self.b.data.double()[:, None] * self.d.data.double())).to(weight.dtype)
        return self.layer


def prepare(context: Context) -> Prepared:
    """Factored matrices with b and d."""
    model, options = context.model, context.options
    matrices, touched = context.factored, set()
    packed = [matrix for matrix in matrices if not isinstance(matrix.of(model), LowRankLinear | FollowerLinear)]
    two_factors(model, packed)
    for i, matrix in enumerate(matrices):
        layer = matrix.of(model)
        assert isinstance(layer, LowRankLinear | FollowerLinear)
        generator = torch.Generator().manual_seed(context.settings.seed * 100_003 + i)
        chosen = torch.randperm(layer.rank, generator=generator)[: options.size]
        matrix.put(model, DiagonalLinear(layer, chosen, options.start))
        touched.add(matrix.name if matrix in packed else f"{matrix.name}.expand.weight")

    def finish() -> PreTrainedModel:
        for matrix in matrices:
            tuned = matrix.of(model)
            assert isinstance(tuned, DiagonalLinear)
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
