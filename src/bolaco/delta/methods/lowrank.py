"""The leading singular directions of D in 16 bits: what the others are compared with.

The factors share the singular values, so that both are of one size, and are rounded to bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bolaco.delta.form import Form
from bolaco.delta.forms.low_rank import HALF, Group, LowRank
from bolaco.delta.method import DeltaMethod, DeltaTask, NoOptions, no_room
from bolaco.models.structure import Site


def compress(task: DeltaTask, options: NoOptions) -> None:
    """As many directions as the budget of each matrix holds."""

    def make(site: Site, delta: Tensor) -> Form:
        out, width = delta.shape
        each = torch.finfo(HALF).bits * (out + width)
        rank = min(task.budget(site) // each, out, width)
        if rank == 0:
            raise no_room(site, task.budget(site), each)
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        root = values[:rank].sqrt()
        factors = (left[:, :rank] * root).to(HALF), (right[:rank] * root[:, None]).to(HALF)
        return LowRank((Group(factors[0].contiguous(), factors[1].contiguous()),), (out, width))

    task.each_block("singular value decomposition", make)


METHOD = DeltaMethod(
    name="lowrank",
    paper="arXiv 2406.08903",
    summary="the leading singular directions in 16 bits; no text is read",
    compress=compress,
    reads_text=False,
)
