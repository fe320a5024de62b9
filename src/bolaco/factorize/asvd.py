"""Activation-aware SVD (ASVD, arXiv 2312.05821): inputs weigh by how large they are, no bias.

The same product as the SVD of W S, times S^-1, with S = diag((E|x|)^alpha) and alpha = 0.5: a diagonal metric C = S^2.

Deviations from the paper: ranks are not chosen by its sensitivity search (any allocator here serves), and no inverse
of S is taken, so inputs that are always zero need no guard.
"""

from torch import Tensor

from bolaco.factorize.method import Method
from bolaco.factorize.solver import Factors, InputMetric, low_rank
from bolaco.statistics.moments import Moments
from bolaco.statistics.site import SiteStatistics

ALPHA = 0.5


def metric(moments: Moments) -> InputMetric:
    """The squared scaling, a diagonal ``[in]``."""
    assert moments.magnitude is not None  # asked for below
    return InputMetric(moments.magnitude.pow(ALPHA).square())


def prepare(weight: Tensor, metric: InputMetric, statistics: SiteStatistics, max_rank: int) -> Factors:
    """Factors without a bias."""
    return low_rank(weight, metric, max_rank)


METHOD = Method(
    name="asvd",
    paper="arXiv 2312.05821",
    summary="inputs weighted by their mean absolute value, no bias (ASVD, alpha 0.5)",
    prepare=prepare,
    metric=metric,
    magnitudes=True,
)
