"""First-order importance of a matrix's elements during pruning, added up over rows and over columns.

The importance of an element is the mean over training steps of ``|dL/dW W|`` while it was not masked (LPAF, arXiv
2306.14152); :mod:`bolaco.transform.prune` finds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bolaco.models.structure import Site
from bolaco.statistics.statistic import FoundStatistic


class _OutputImportance(FoundStatistic):
    """``[out]``: of each output, added up over its row."""

    name = "output-importance"

    def stack(self, values: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(values))

    def numbers(self, site: Site) -> int:
        return site.out_features


class _InputImportance(FoundStatistic):
    """``[in]``: of each input, added up over its column."""

    name = "input-importance"

    def stack(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack(tuple(values)).sum(dim=0)

    def numbers(self, site: Site) -> int:
        return site.in_features


OUTPUT_IMPORTANCE = _OutputImportance()
INPUT_IMPORTANCE = _InputImportance()
