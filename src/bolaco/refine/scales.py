"""Scales of the rows and columns of matrices, trained while the matrices stay, and multiplied into them afterwards.

They have few parameters, so little text goes far, and cost none in the result (arXiv 2602.06694 trains scales of a
quantized model this way).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bolaco.layers import FactoredLinear
from bolaco.models.structure import Structure


class _Scaled(nn.Module):
    """A matrix ``[out, in]`` with a factor for each row and each column, all 1 at first."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.rows = nn.Parameter(torch.ones(rows, 1, dtype=weight.dtype, device=weight.device))
        self.columns = nn.Parameter(torch.ones(1, columns, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.rows * self.columns


@contextmanager
def scaled(structure: Structure, blocks: Sequence[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """While it lasts, all matrices of the sites have scales; gives these, and norms and biases. Then they are folded.

    Args:
        structure: where the matrices are.
        blocks: every decoder block in order, in the form in which they are trained.
    """
    linears = [linear for layer, block in enumerate(blocks) for linear in _linears(structure, layer, block)]
    vectors = [p for block in blocks for p in block.parameters() if p.ndim < 2 and p.is_floating_point()]
    made = [_Scaled(linear.weight) for linear in linears]
    for linear, scales in zip(linears, made, strict=True):
        parametrize.register_parametrization(linear, "weight", scales)
    try:
        yield [*(p for scales in made for p in scales.parameters()), *vectors]
    finally:
        for linear in linears:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
            linear.weight.requires_grad_(False)


def _linears(structure: Structure, layer: int, block: nn.Module) -> Iterator[nn.Linear]:
    """The Linears that the matrices of a block consist of, each once."""
    known: set[int] = set()
    for sites in structure.modules(layer).values():
        module = block.get_submodule(structure.name_in_block(sites[0]))
        found = module.modules() if isinstance(module, FactoredLinear) or len(sites) > 1 else [module]
        for linear in found:
            if isinstance(linear, nn.Linear) and id(linear) not in known:
                known.add(id(linear))
                yield linear
