"""SVD-LLM's truncation-aware whitening (arXiv 2403.07378).

The same product as the SVD of W S, times S^-1, with S S^T = E[x x^T].

Deviation from the paper: no Cholesky factor and no inverse are taken (see solver.py), so no damping is needed.
"""

from torch import Tensor

from bolaco.factorize.method import Method, NoOptions
from bolaco.factorize.solver import Factors, InputMetric, low_rank
from bolaco.statistics.moments import MOMENTS
from bolaco.statistics.statistic import SiteStatistics


def metric(statistics: SiteStatistics, options: NoOptions) -> InputMetric:
    """The second moment, not centred."""
    return InputMetric(statistics[MOMENTS].second_moment)


def prepare(
    weight: Tensor, metric: InputMetric, statistics: SiteStatistics, max_rank: int, options: NoOptions
) -> Factors:
    """Factors without a bias."""
    return low_rank(weight, metric, max_rank)


METHOD = Method(
    name="svd-llm",
    paper="arXiv 2403.07378",
    summary="second moment of the input, no bias (SVD-LLM, DRONE)",
    prepare=prepare,
    metric=metric,
    needs=(MOMENTS,),
)
