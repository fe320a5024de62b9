"""Feature-based factorization: principal components of the output, with a bias (arXiv 2405.10616, section 3.1).

Minimises E||y - y'||^2 over rank-r affine maps. The output covariance is W Sigma W^T with Sigma the pooled covariance
of the input, so one input covariance serves every matrix that shares the input.
"""

from torch import Tensor

from bolaco.factorize.method import Method, NoOptions
from bolaco.factorize.solver import Factors, InputMetric, low_rank
from bolaco.statistics.moments import MOMENTS
from bolaco.statistics.statistic import SiteStatistics


def metric(statistics: SiteStatistics, options: NoOptions) -> InputMetric:
    """The pooled, centred covariance."""
    return InputMetric(statistics[MOMENTS].covariance)


def prepare(
    weight: Tensor, metric: InputMetric, statistics: SiteStatistics, max_rank: int, options: NoOptions
) -> Factors:
    """Factors with the mean output restored by a bias."""
    return low_rank(weight, metric, max_rank, mean=statistics[MOMENTS].mean)


METHOD = Method(
    name="afm",
    paper="arXiv 2405.10616",
    summary="feature PCA: pooled output covariance, with bias (Bolaco, AFM, LoRD)",
    prepare=prepare,
    metric=metric,
    needs=(MOMENTS,),
    centred=True,
)
