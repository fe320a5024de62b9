"""What a factorization method is: a function from a matrix and its statistics to factors, and what it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bolaco.factorize.solver import Factors, InputMetric
from bolaco.plugins import Registry, in_folder
from bolaco.settings import Section
from bolaco.statistics.statistic import GradientStatistic, InputStatistic, SiteStatistics, Statistic, StoredStatistic
from bolaco.transform.subject import MakeSubject

# metric(statistics of an input, options) -> the metric of all matrices that share the input.
Metric = Callable[[SiteStatistics, Any], InputMetric]
# prepare(weight [out, in], metric, statistics, max_rank, options) -> factors of every rank up to max_rank.
Prepare = Callable[[Tensor, InputMetric, SiteStatistics, int, Any], Factors]


class NoOptions(Section):
    """Of a method that has none."""


def no_metric(statistics: SiteStatistics, options: Any) -> InputMetric:
    """The identity: for methods without a metric on the input, or with one of each matrix's own."""
    return InputMetric(None)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A factorization method.

    Attributes:
        name: what ``--method`` takes.
        paper: where it is from, such as ``arXiv 2405.10616``.
        summary: one line for ``bolaco methods``.
        prepare: factors of one matrix under the metric.
        metric: the input metric; computed once for the matrices that share an input.
        needs: the statistics it asks for; ``statistics[KIND]`` gives one of them, and it gets no others. A method that
            asks for none has no text read for it.
        options: what ``--set method.NAME=VALUE`` can change.
        subject: makes what is factored of the model, where that is not the model's own matrices: pruned ones for LPAF.
        comparable: whether squared errors of different matrices are in one unit.
        centred: whether inputs are centred and the mean output restored by a bias.
    """

    name: str
    paper: str
    summary: str
    prepare: Prepare
    metric: Metric = no_metric
    needs: tuple[Statistic[Any], ...] = ()
    options: type[Section] = NoOptions
    subject: MakeSubject | None = None
    comparable: bool = False
    centred: bool = False

    @property
    def inputs(self) -> tuple[InputStatistic[Any], ...]:
        """Of what it needs, the statistics of inputs."""
        return tuple(kind for kind in self.needs if isinstance(kind, InputStatistic))

    @property
    def gradients(self) -> tuple[GradientStatistic, ...]:
        """Of what it needs, the statistics of loss gradients."""
        return tuple(kind for kind in self.needs if isinstance(kind, GradientStatistic))

    @property
    def stored(self) -> tuple[StoredStatistic, ...]:
        """Of what it needs, the statistics on disk."""
        return tuple(kind for kind in self.needs if isinstance(kind, StoredStatistic))

    @property
    def reads_text(self) -> bool:
        """Whether the weights are not all it looks at."""
        return bool(self.needs)


@dataclass(frozen=True)
class ChosenMethod:
    """A method with its options."""

    method: Method
    options: Section

    def metric(self, statistics: SiteStatistics) -> InputMetric:
        """The metric of an input, from its statistics."""
        return self.method.metric(statistics, self.options)

    def prepare(self, weight: Tensor, metric: InputMetric, statistics: SiteStatistics, max_rank: int) -> Factors:
        """Factors of ``weight`` ``[out, in]`` of every rank up to ``max_rank``."""
        return self.method.prepare(weight, metric, statistics, max_rank, self.options)


METHODS = Registry(
    "method", "method.name", Method, in_folder("bolaco.factorize.methods", "METHOD"), group="bolaco.methods"
)
