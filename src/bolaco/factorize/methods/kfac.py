"""Two-sided metric: Kronecker-factored Fisher on the output, second moment on the input.

Minimises ||G^(1/2) (W - W') A^(1/2)||_F with A = E[x x^T] and G = E[g g^T], g the loss gradient at the output under
labels sampled from the model (K-FAC, arXiv 1503.05671; as a compression metric arXiv 2505.17974, 2605.15626). Half
the squared error is a second-order estimate of the loss increase in nats a token, so errors compare across matrices.
A is centred and the mean output restored by a bias.
"""

from pydantic import Field
from torch import Tensor

from bolaco.factorize.method import Method
from bolaco.factorize.solver import Factors, InputMetric, OutputMetric, low_rank
from bolaco.settings import Section
from bolaco.statistics.gradient import GRADIENT
from bolaco.statistics.moments import MOMENTS
from bolaco.statistics.statistic import SiteStatistics


class KfacOptions(Section):
    """How far the output metric is trusted."""

    # Small eigenvalues of G are estimated from few tokens, and G is inverted.
    shrinkage: float = Field(
        0.1, ge=0, le=1, description="share of the mean eigenvalue mixed into G, the output metric"
    )


def metric(statistics: SiteStatistics, options: KfacOptions) -> InputMetric:
    """The pooled, centred covariance."""
    return InputMetric(statistics[MOMENTS].covariance)


def prepare(
    weight: Tensor, metric: InputMetric, statistics: SiteStatistics, max_rank: int, options: KfacOptions
) -> Factors:
    """Factors under both metrics, with the mean output restored by a bias."""
    output = OutputMetric(statistics[GRADIENT], options.shrinkage)
    return low_rank(weight, metric, max_rank, mean=statistics[MOMENTS].mean, output=output)


METHOD = Method(
    name="kfac",
    paper="arXiv 2505.17974",
    summary="two-sided: feature PCA weighted by the Kronecker-factored Fisher of the output, with bias",
    prepare=prepare,
    metric=metric,
    needs=(MOMENTS, GRADIENT),
    options=KfacOptions,
    comparable=True,
    centred=True,
)
