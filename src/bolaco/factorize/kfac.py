"""Two-sided metric: Kronecker-factored Fisher on the output, second moment on the input.

Minimises ||G^(1/2) (W - W') A^(1/2)||_F with A = E[x x^T] and G = E[g g^T], g the loss gradient at the output under
labels sampled from the model (K-FAC, arXiv 1503.05671; as a compression metric arXiv 2505.17974, 2605.15626). Half
the squared error is a second-order estimate of the loss increase in nats a token, so errors compare across matrices.
A is centred and the mean output restored by a bias.
"""

from torch import Tensor

from bolaco.factorize.method import Method
from bolaco.factorize.solver import Factors, InputMetric, OutputMetric, low_rank
from bolaco.statistics.moments import Moments
from bolaco.statistics.site import SiteStatistics

# Share of the mean eigenvalue mixed into G: its small eigenvalues are estimated from few tokens, and G is inverted.
SHRINKAGE = 0.1


def metric(moments: Moments) -> InputMetric:
    """The pooled, centred covariance."""
    return InputMetric(moments.covariance)


def prepare(weight: Tensor, metric: InputMetric, statistics: SiteStatistics, max_rank: int) -> Factors:
    """Factors under both metrics, with the mean output restored by a bias."""
    output = OutputMetric(statistics.gradient, SHRINKAGE)
    assert statistics.moments is not None  # the method reads text
    return low_rank(weight, metric, max_rank, mean=statistics.moments.mean, output=output)


METHOD = Method(
    name="kfac",
    paper="arXiv 2505.17974",
    summary="two-sided: feature PCA weighted by the Kronecker-factored Fisher of the output, with bias",
    prepare=prepare,
    metric=metric,
    gradients=True,
    comparable=True,
    centred=True,
)
