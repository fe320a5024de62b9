"""Sparsity-aware SVD, the second stage of LPAF (arXiv 2306.14152), of weights that were pruned before.

The weight is that of the pruned model. Element (i, j) matters as I_ij, the first-order importance that pruning
accumulated; of all products of a number for each output and one for each input, r_i c_j, that of the sums over rows
and columns is nearest to I (least Kullback-Leibler divergence), and for it the approximation has a closed form.

Deviations from the paper: both diagonals are used, not one; nothing is tuned afterwards (its third stage is training).
"""

from dataclasses import replace

from torch import Tensor

from bolaco.factorize.method import Method
from bolaco.factorize.methods.fwsvd import importance
from bolaco.factorize.solver import Factors, InputMetric, low_rank
from bolaco.statistics.importance import INPUT_IMPORTANCE, OUTPUT_IMPORTANCE
from bolaco.statistics.statistic import SiteStatistics
from bolaco.transform.prune import PruningOptions, pruned_subject


def prepare(
    weight: Tensor, metric: InputMetric, statistics: SiteStatistics, max_rank: int, options: PruningOptions
) -> Factors:
    """Factors without a bias."""
    root = importance(statistics[OUTPUT_IMPORTANCE]).sqrt()
    own = InputMetric(importance(statistics[INPUT_IMPORTANCE]))
    scaled = low_rank(weight.double() * root[:, None], own, max_rank)
    # Columns of one length in the output metric; back from it, both factors stay in a dtype's range.
    return replace(
        scaled, expand_t=(scaled.expand_t / root).to(weight.dtype).contiguous(), reduce=scaled.reduce.to(weight.dtype)
    )


METHOD = Method(
    name="lpaf",
    paper="arXiv 2306.14152",
    summary="gradual first-order pruning, then SVD of the sparse weights by their importance (LPAF)",
    prepare=prepare,
    needs=(OUTPUT_IMPORTANCE, INPUT_IMPORTANCE),
    options=PruningOptions,
    subject=pruned_subject,
)
