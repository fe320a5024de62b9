"""Activation-aware SVD (ASVD, arXiv 2312.05821): inputs weigh by how large they are, no bias.

The same product as the SVD of W S, times S^-1, with S = diag((E|x|)^alpha): a diagonal metric C = S^2. The paper's
alpha is 0.5.

Deviations from the paper: ranks are not chosen by its sensitivity search (any allocator here serves), and no inverse
of S is taken, so inputs that are always zero need no guard.
"""

from pydantic import Field
from torch import Tensor

from bolaco.factorize.method import Method
from bolaco.factorize.solver import Factors, InputMetric, low_rank
from bolaco.settings import Section
from bolaco.statistics.magnitude import MAGNITUDE
from bolaco.statistics.statistic import SiteStatistics


class AsvdOptions(Section):
    """How strongly inputs are weighed."""

    alpha: float = Field(0.5, ge=0, description="exponent of E|x|; 0 is the plain SVD")


def metric(statistics: SiteStatistics, options: AsvdOptions) -> InputMetric:
    """The squared scaling, a diagonal ``[in]``."""
    return InputMetric(statistics[MAGNITUDE].pow(options.alpha).square())


def prepare(
    weight: Tensor, metric: InputMetric, statistics: SiteStatistics, max_rank: int, options: AsvdOptions
) -> Factors:
    """Factors without a bias."""
    return low_rank(weight, metric, max_rank)


METHOD = Method(
    name="asvd",
    paper="arXiv 2312.05821",
    summary="inputs weighted by their mean absolute value, no bias (ASVD)",
    prepare=prepare,
    metric=metric,
    needs=(MAGNITUDE,),
    options=AsvdOptions,
)
