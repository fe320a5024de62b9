"""Plain truncated SVD of the weight: the data-free baseline (Eckart and Young, 1936)."""

from torch import Tensor

from bolaco.factorize.method import Method, NoOptions
from bolaco.factorize.solver import Factors, InputMetric, low_rank
from bolaco.statistics.statistic import SiteStatistics


def prepare(
    weight: Tensor, metric: InputMetric, statistics: SiteStatistics, max_rank: int, options: NoOptions
) -> Factors:
    """Factors without a bias; the metric is the identity."""
    return low_rank(weight, metric, max_rank)


METHOD = Method(
    name="svd",
    paper="Eckart-Young 1936",
    summary="plain truncated SVD of the weight; reads no text",
    prepare=prepare,
)
