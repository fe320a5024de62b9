"""What a factorization method is: a function from a matrix and its statistics to factors, and what it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bolaco.factorize.solver import Factors, InputMetric
from bolaco.statistics.moments import Moments
from bolaco.statistics.site import SiteStatistics

# prepare(weight [out, in], metric, statistics, max_rank) -> factors of every rank up to max_rank.
Prepare = Callable[[Tensor, InputMetric, SiteStatistics, int], Factors]


def no_metric(moments: Moments) -> InputMetric:
    """The identity: for methods without a metric on the input, or with one of each matrix's own."""
    return InputMetric(None)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A factorization method. Statistics that it does not ask for are None when it is called.

    Attributes:
        name: what ``--method`` takes.
        paper: where it is from, such as ``arXiv 2405.10616``.
        summary: one line for ``bolaco methods``.
        prepare: factors of one matrix under the metric.
        metric: the input metric, from the input's moments; computed once for the matrices that share an input.
        moments: asks for ``statistics.moments``; a method that asks for nothing at all has no text read for it.
        magnitudes: asks for ``moments.magnitude``, the mean absolute inputs.
        gradients: asks for ``statistics.gradient``, the second moment of the loss gradient at the output.
        fisher: asks for ``statistics.fisher``, the empirical Fisher information of the weights by input.
        prunes: asks for the weights of a model pruned before, and for ``statistics.outputs`` and ``inputs``, the
            importances that pruning found.
        comparable: whether squared errors of different matrices are in one unit.
        centred: whether inputs are centred and the mean output restored by a bias.
        package: distribution it comes with; set when it is found.
    """

    name: str
    paper: str
    summary: str
    prepare: Prepare
    metric: Callable[[Moments], InputMetric] = no_metric
    moments: bool = True
    magnitudes: bool = False
    gradients: bool = False
    fisher: bool = False
    prunes: bool = False
    comparable: bool = False
    centred: bool = False
    package: str = "bolaco"

    @property
    def losses(self) -> tuple[str, ...]:
        """Fields of :class:`SiteStatistics` that it needs and that come from loss gradients."""
        wanted = {"gradient": self.gradients, "fisher": self.fisher, "outputs": self.prunes, "inputs": self.prunes}
        return tuple(name for name, asked in wanted.items() if asked)

    @property
    def reads_text(self) -> bool:
        """Whether the weights are not all it looks at."""
        return self.moments or bool(self.losses)
