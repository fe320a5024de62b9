"""What every factorization method must hold to, as a class of tests for the methods of other packages and for ours.

    from bolaco.testing import MethodConformance

    class TestMine(MethodConformance):
        method = "mine"

pytest finds it by its name; nothing of pytest is imported here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bolaco.factorize import METHODS, MOMENTS, ChosenMethod, Factors, InputMetric, Method, SiteStatistics
from bolaco.models.structure import Site
from bolaco.statistics.statistic import FoundStatistic, GradientStatistic, InputStatistic, Statistic

# Outputs and inputs of a wide, a square and a tall matrix.
SHAPES = ((9, 14), (12, 12), (17, 8))


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_statistics(method: Method, shape: tuple[int, int], kind: str = "regular") -> SiteStatistics:
    """Statistics of a matrix ``[out, in]``: those that ``method`` needs, and no others.

    ``kind``: ``regular``; ``singular``, of inputs and gradients that visit three directions only; ``nothing``, of
    inputs and gradients that are all zero.
    """
    out, inside = shape
    site = Site("matrix", "matrix", 0, "o", None, (0, out), out, inside, False)
    directions = {"regular": (inside, out), "singular": (3, 3), "nothing": (0, 0)}[kind]
    decay = torch.linspace(0, -2, directions[0], dtype=torch.float64).exp()
    x = (_noise(200, directions[0], seed=1) * decay) @ _noise(directions[0], inside, seed=2)
    x = x + 2 * _noise(inside, seed=3) * (kind != "nothing")
    # As small as loss gradients are.
    g = 1e-4 * _noise(200, directions[1], seed=4) @ _noise(directions[1], out, seed=5)
    found: dict[Statistic[Any], Any] = {}
    for number, needed in enumerate(method.needs):
        if isinstance(needed, InputStatistic):
            of_input = needed.accumulator(inside, 2, torch.device("cpu"))
            for group, part in enumerate(x.split(100)):
                of_input.update(part, group)
            found[needed] = of_input.finalize()
        elif isinstance(needed, GradientStatistic):
            of_gradient = needed.accumulator(site, torch.device("cpu"))
            of_gradient.update(x.view(4, 50, inside), g.view(4, 50, out))
            found[needed] = of_gradient.result().float()
        elif isinstance(needed, FoundStatistic):
            size = 1e-6 * _noise(needed.numbers(site), seed=6 + number).abs()
            size[len(size) if kind == "regular" else 3 * (kind == "singular") :] = 0.0
            found[needed] = needed.decode(size.float())
    return SiteStatistics(found)


def _tensors(statistics: SiteStatistics) -> list[Tensor]:
    """All tensors that a method is given."""
    found: list[Tensor] = []
    for value in statistics.values.values():
        parts = vars(value).values() if dataclasses.is_dataclass(value) else [value]
        found += [part for part in parts if isinstance(part, Tensor)]
    return found


class MethodConformance:
    """Subclass with ``method = "name"``, in a test file, under a name that begins with ``Test``.

    Attributes:
        method: the name ``--method`` takes.
        tolerance: relative error allowed where two results should be equal, in float64.
    """

    method: str = ""
    tolerance: float = 1e-6

    def error(self, difference: Tensor, metric: InputMetric, statistics: SiteStatistics) -> float | None:
        """Squared error of ``difference`` = W - W' ``[out, in]`` in the method's metric, which the spectrum predicts.

        Here it is the one under ``Method.metric``. Override it where the metric is another one; None says that the
        spectrum predicts nothing (then it still decides the ranks of ``--search spectral``).
        """
        return float((metric.times(difference) * difference).sum())

    def _found(self) -> Method:
        return METHODS.get(self.method)

    def _chosen(self) -> ChosenMethod:
        return ChosenMethod(self._found(), self._found().options())

    def _metric(self, statistics: SiteStatistics) -> InputMetric:
        return self._chosen().metric(statistics)

    def _factors(self, weight: Tensor, statistics: SiteStatistics, rank: int) -> Factors:
        return self._chosen().prepare(weight, self._metric(statistics), statistics, rank)

    def _cases(self, kind: str = "regular") -> Iterator[tuple[str, Tensor, SiteStatistics]]:
        for seed, shape in enumerate(SHAPES):
            yield (
                f"{shape}, {kind} statistics",
                _noise(*shape, seed=10 + seed),
                make_statistics(self._found(), shape, kind),
            )

    def _close(self, left: Tensor, right: Tensor, what: str) -> None:
        apart, scale = float((left - right).norm()), float(right.norm())
        assert apart <= self.tolerance * scale, f"{what}: apart by {apart:.3g} of {scale:.3g}"

    def test_describes_itself(self) -> None:
        """It is found by its name, with a source and one line."""
        method = self._found()
        assert method.name == self.method
        assert method.paper
        assert method.summary
        assert "\n" not in method.paper + method.summary

    def test_full_rank_reproduces_the_weight(self) -> None:
        """Whatever the statistics: nothing is lost where no rank is."""
        for kind in ("regular", "singular", "nothing"):
            for case, weight, statistics in self._cases(kind):
                full = min(weight.shape)
                factors = self._factors(weight, statistics, full)
                self._close(factors.product(full), weight, case)
                total = float(factors.spectrum.sum())
                assert factors.error(full) <= self.tolerance * total + 1e-30, f"{case}: error at full rank"

    def test_singular_statistics_do_no_harm(self) -> None:
        """Factors stay finite where inputs or gradients do not visit every direction, or are all zero."""
        for kind in ("singular", "nothing"):
            for case, weight, statistics in self._cases(kind):
                factors = self._factors(weight, statistics, 4)
                for name in ("expand_t", "reduce", "spectrum"):
                    assert torch.isfinite(getattr(factors, name)).all(), f"{case}: {name} is not finite"

    def test_a_slice_equals_factorizing_at_that_rank(self) -> None:
        """Rank r is the first r rows of both factors, so that a search changes ranks by slicing."""
        for case, weight, statistics in self._cases():
            full = self._factors(weight, statistics, min(weight.shape))
            for rank in (1, 4, min(weight.shape) - 1):
                small = self._factors(weight, statistics, rank)
                assert small.max_rank == rank, f"{case}: {small.max_rank} rows at max_rank {rank}"
                self._close(full.product(rank), small.product(rank), f"{case}, rank {rank}")
                gap = abs(small.error(rank) - full.error(rank))
                assert gap <= self.tolerance * float(full.spectrum.sum()), f"{case}, rank {rank}: error"

    def test_the_spectrum_predicts_the_error(self) -> None:
        """It descends, is not negative, and its tail is :meth:`error` of the approximation."""
        for case, weight, statistics in self._cases():
            metric = self._metric(statistics)
            factors = self._factors(weight, statistics, min(weight.shape))
            total = float(factors.spectrum.sum())
            assert (factors.spectrum >= 0).all(), f"{case}: a negative squared error"
            assert (factors.spectrum.diff() <= self.tolerance * total).all(), f"{case}: the spectrum does not descend"
            for rank in range(1, min(weight.shape)):
                measured = self.error(weight - factors.product(rank), metric, statistics)
                if measured is not None:
                    message = f"{case}, rank {rank}: predicted {factors.error(rank):.6g}, measured {measured:.6g}"
                    assert abs(factors.error(rank) - measured) <= self.tolerance * total, message

    def test_shapes_and_precisions(self) -> None:
        """``[r, out]`` and ``[r, in]`` in the weight's precision, a spectrum in float64."""
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for case, weight, statistics in self._cases():
                factors = self._factors(weight.to(dtype), statistics, 4)
                assert factors.expand_t.shape == (4, len(weight)), f"{case}: expand_t"
                assert factors.reduce.shape == (4, weight.shape[1]), f"{case}: reduce"
                assert factors.spectrum.dtype == torch.float64, f"{case}: spectrum"
                for name in ("expand_t", "reduce"):
                    value = getattr(factors, name)
                    assert value.dtype == dtype, f"{case}: {name} is {value.dtype}, the weight {dtype}"
                    assert torch.isfinite(value).all(), f"{case}: {name} is not finite in {dtype}"

    def test_the_mean_output_is_restored_where_the_method_says_so(self) -> None:
        """``centred`` methods have a bias that makes up for the mean input; the others leave the bias as it is."""
        for case, weight, statistics in self._cases():
            original = _noise(len(weight), seed=20)
            factors = self._factors(weight, statistics, 4)
            for rank in (1, 4):
                bias = factors.bias(rank, original)
                assert bias is not None, case
                if self._found().centred:
                    assert MOMENTS in self._found().needs, f"{case}: centred without asking for the inputs"
                    mean = statistics[MOMENTS].mean
                    self._close(factors.product(rank) @ mean + bias, weight @ mean + original, f"{case}: mean output")
                else:
                    assert torch.equal(bias, original), f"{case}: a bias from a method that is not centred"

    def test_changes_nothing_it_is_given_and_repeats_itself(self) -> None:
        """Statistics are shared between matrices, and weights belong to the model."""
        for case, weight, statistics in self._cases():
            before = weight.clone()
            given = _tensors(statistics)
            kept = [value.clone() for value in given]
            first, second = (self._factors(weight, statistics, 4) for _ in range(2))
            assert torch.equal(weight, before), f"{case}: the weight was changed"
            for value, copy in zip(given, kept, strict=True):
                assert torch.equal(value, copy), f"{case}: statistics changed"
            assert torch.equal(first.product(4), second.product(4)), f"{case}: two calls, two results"
