"""Our own methods through the conformance tests that other packages use, and what those tests find."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bolaco.factorize import (
    METHODS,
    Factors,
    InputMetric,
    Method,
    OutputMetric,
    SiteStatistics,
    get_method,
    kfac,
    low_rank,
)
from bolaco.factorize.fwsvd import importance
from bolaco.factorize.method import Prepare
from bolaco.testing import MethodConformance


class TestAfm(MethodConformance):
    method = "afm"


class TestSvdLlm(MethodConformance):
    method = "svd-llm"


class TestSvd(MethodConformance):
    method = "svd"


class TestAsvd(MethodConformance):
    method = "asvd"


class TestFwsvd(MethodConformance):
    method = "fwsvd"

    def error(self, difference: Tensor, metric: InputMetric, statistics: SiteStatistics) -> float:
        assert statistics.fisher is not None
        return float((difference.square() * importance(statistics.fisher)).sum())


class TestLpaf(MethodConformance):
    method = "lpaf"

    def error(self, difference: Tensor, metric: InputMetric, statistics: SiteStatistics) -> float:
        assert statistics.outputs is not None
        assert statistics.inputs is not None
        return float((difference.square() * importance(statistics.inputs)).sum(dim=1) @ importance(statistics.outputs))


class TestKfac(MethodConformance):
    method = "kfac"

    def error(self, difference: Tensor, metric: InputMetric, statistics: SiteStatistics) -> float:
        curvature = OutputMetric(statistics.gradient, kfac.SHRINKAGE).matrix
        assert curvature is not None
        return float((metric.times(curvature @ difference) * difference).sum())


def test_every_method_of_ours_is_tested() -> None:
    classes = [value for value in globals().values() if isinstance(value, type) and value is not MethodConformance]
    assert {c.method for c in classes if issubclass(c, MethodConformance)} == set(METHODS)


def svd(weight: Tensor, metric: InputMetric, statistics: SiteStatistics, rank: int) -> Factors:
    return get_method("svd").prepare(weight, metric, statistics, rank)


def adds_noise_to_the_weight(weight: Tensor, *rest) -> Factors:
    weight += 1e-3
    return svd(weight, *rest)


def inverts_the_covariance(weight: Tensor, metric: InputMetric, statistics: SiteStatistics, rank: int) -> Factors:
    root = torch.linalg.cholesky(statistics.moments.covariance)
    factors = svd(weight.double() @ root, metric, statistics, rank)
    return replace(factors, reduce=factors.reduce @ root.inverse())


def reverses_the_order(*given) -> Factors:
    factors = svd(*given)
    return replace(factors, expand_t=factors.expand_t.flip(0), reduce=factors.reduce.flip(0))


def forgets_the_precision(weight: Tensor, *rest) -> Factors:
    return svd(weight.double(), *rest)


def forgets_the_square(*given) -> Factors:
    factors = svd(*given)
    return replace(factors, spectrum=factors.spectrum.sqrt())


def uses_what_it_did_not_ask_for(weight: Tensor, metric: InputMetric, statistics: SiteStatistics, rank: int) -> Factors:
    assert statistics.fisher is not None
    return svd(weight, metric, statistics, rank)


def moves_the_mean_without_saying_so(
    weight: Tensor, metric: InputMetric, statistics: SiteStatistics, rank: int
) -> Factors:
    return low_rank(weight, metric, rank, mean=statistics.moments.mean)


def loses_half_the_rank(*given) -> Factors:
    factors = svd(*given)
    half = factors.max_rank // 2
    return replace(factors, expand_t=factors.expand_t[:half], reduce=factors.reduce[:half])


CHECKS = {name.removeprefix("test_"): name for name in dir(MethodConformance) if name.startswith("test_")}


def run(check: str, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the conformance tests on a method made of ``prepare``."""
    method = Method(name="made", paper="nowhere", summary="for this test", prepare=prepare)
    monkeypatch.setattr("bolaco.testing.get_method", lambda _: method)
    tests = MethodConformance()
    tests.method = "made"
    getattr(tests, CHECKS[check])()


@pytest.mark.parametrize(
    ("prepare", "check"),
    [
        (adds_noise_to_the_weight, "changes_nothing_it_is_given_and_repeats_itself"),
        (inverts_the_covariance, "full_rank_reproduces_the_weight"),
        (inverts_the_covariance, "singular_statistics_do_no_harm"),
        (reverses_the_order, "a_slice_equals_factorizing_at_that_rank"),
        (forgets_the_precision, "shapes_and_precisions"),
        (forgets_the_square, "the_spectrum_predicts_the_error"),
        (uses_what_it_did_not_ask_for, "full_rank_reproduces_the_weight"),
        (loses_half_the_rank, "shapes_and_precisions"),
        (moves_the_mean_without_saying_so, "the_mean_output_is_restored_where_the_method_says_so"),
    ],
)
def test_a_method_that_does_not_conform_is_found_out(prepare: Prepare, check: str, monkeypatch) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        run(check, prepare, monkeypatch)


@pytest.mark.parametrize("check", CHECKS)
def test_a_method_that_conforms_passes(check: str, monkeypatch) -> None:
    run(check, svd, monkeypatch)


def test_a_spectrum_may_claim_nothing(monkeypatch) -> None:
    class Modest(MethodConformance):
        method = "modest"

        def error(self, *_) -> None:
            return None

    modest = Method(name="modest", paper="nowhere", summary="claims nothing", prepare=forgets_the_square)
    monkeypatch.setattr("bolaco.testing.get_method", lambda _: modest)
    Modest().test_the_spectrum_predicts_the_error()
