"""Fisher-weighted SVD (FWSVD, arXiv 2207.00112): inputs weigh by the Fisher information of their weights, no bias.

F_ij is the mean over sequences of (dL/dW_ij)^2 with the text's own next tokens as labels. The weights of one input
share one importance, c_j = sum_i F_ij, so the metric diag(c) is diagonal and has a closed form; it is each matrix's
own, not shared by the matrices of an input.

Deviations from the paper: the Fisher information is that of language modelling on the calibration text, not of a
fine-tuning task, and nothing is tuned afterwards.
"""

import torch
from torch import Tensor

from bolaco.factorize.method import Method, NoOptions
from bolaco.factorize.solver import Factors, InputMetric, low_rank
from bolaco.statistics.fisher import FISHER
from bolaco.statistics.statistic import SiteStatistics

# Importance, in units of the mean, below which inputs count alike: those the loss hardly reaches still keep an order.
LEAST = 1e-6


def importance(fisher: Tensor) -> Tensor:
    """The metric's diagonal ``[in]``: ``fisher`` over its mean, not below :data:`LEAST`; ones where all is zero."""
    exact = fisher.double()
    mean = float(exact.mean())
    return (exact / mean).clamp(min=LEAST) if mean > 0 else torch.ones_like(exact)


def prepare(
    weight: Tensor, metric: InputMetric, statistics: SiteStatistics, max_rank: int, options: NoOptions
) -> Factors:
    """Factors without a bias."""
    return low_rank(weight, InputMetric(importance(statistics[FISHER])), max_rank)


METHOD = Method(
    name="fwsvd",
    paper="arXiv 2207.00112",
    summary="inputs weighted by the empirical Fisher information of their weights, no bias (FWSVD)",
    prepare=prepare,
    needs=(FISHER,),
)
