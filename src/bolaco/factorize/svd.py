"""Plain truncated SVD of the weight: the data-free baseline (Eckart and Young, 1936)."""

from torch import Tensor

from bolaco.factorize.solver import Factors, InputMetric, low_rank
from bolaco.statistics.moments import Moments


def metric(moments: Moments) -> InputMetric:
    """The identity."""
    return InputMetric(None)


def prepare(weight: Tensor, metric: InputMetric, moments: Moments, max_rank: int) -> Factors:
    """Factors without a bias."""
    return low_rank(weight, metric, max_rank)
