"""Sparsity-aware SVD, the second stage of LPAF (arXiv 2306.14152), of weights that were pruned before.

The weight is that of the pruned model. Element (i, j) matters as I_ij, the first-order importance that pruning
accumulated; of all products of a number for each output and one for each input, r_i c_j, that of the sums over rows
and columns is nearest to I (least Kullback-Leibler divergence), and for it the approximation has a closed form.

Deviations from the paper: both diagonals are used, not one; nothing is tuned afterwards (its third stage is training).
"""

from dataclasses import replace

from torch import Tensor

from bolaco.factorize.fwsvd import importance
from bolaco.factorize.method import Method
from bolaco.factorize.solver import Factors, InputMetric, low_rank
from bolaco.statistics.site import SiteStatistics
from bolaco.systems import SYSTEMS


def prepare(weight: Tensor, metric: InputMetric, statistics: SiteStatistics, max_rank: int) -> Factors:
    """Factors without a bias."""
    assert statistics.outputs is not None  # asked for below
    assert statistics.inputs is not None
    root = importance(statistics.outputs).sqrt()
    scaled = low_rank(weight.double() * root[:, None], InputMetric(importance(statistics.inputs)), max_rank)
    # Columns of one length in the output metric; back from it, both factors stay in a dtype's range.
    return replace(
        scaled, expand_t=(scaled.expand_t / root).to(weight.dtype).contiguous(), reduce=scaled.reduce.to(weight.dtype)
    )


METHOD = Method(
    name="lpaf",
    paper=SYSTEMS["lpaf"].paper,
    summary=SYSTEMS["lpaf"].summary,
    prepare=prepare,
    moments=False,
    prunes=True,
)
