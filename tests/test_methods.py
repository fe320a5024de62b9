"""Our own methods through the conformance tests that other packages use, and what those tests find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bolaco.factorize import (
    FISHER,
    GRADIENT,
    INPUT_IMPORTANCE,
    METHODS,
    MOMENTS,
    OUTPUT_IMPORTANCE,
    ChosenMethod,
    Factors,
    InputMetric,
    Method,
    OutputMetric,
    SiteStatistics,
    low_rank,
)
from bolaco.factorize.method import NoOptions
from bolaco.factorize.methods.fwsvd import importance
from bolaco.testing import MethodConformance, make_statistics


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
        return float((difference.square() * importance(statistics[FISHER])).sum())


class TestLpaf(MethodConformance):
    method = "lpaf"

    def error(self, difference: Tensor, metric: InputMetric, statistics: SiteStatistics) -> float:
        outputs, inputs = (importance(statistics[kind]) for kind in (OUTPUT_IMPORTANCE, INPUT_IMPORTANCE))
        return float((difference.square() * inputs).sum(dim=1) @ outputs)


class TestKfac(MethodConformance):
    method = "kfac"

    def error(self, difference: Tensor, metric: InputMetric, statistics: SiteStatistics) -> float:
        curvature = OutputMetric(statistics[GRADIENT], METHODS.get("kfac").options().shrinkage).matrix
        assert curvature is not None
        return float((metric.times(curvature @ difference) * difference).sum())


def test_every_method_of_ours_is_tested() -> None:
    classes = [value for name, value in globals().items() if name.startswith("Test")]
    assert {c.method for c in classes if issubclass(c, MethodConformance)} == set(METHODS.built_in)


def svd(weight: Tensor, metric: InputMetric, statistics: SiteStatistics, rank: int) -> Factors:
    return low_rank(weight, metric, rank)


def adds_noise_to_the_weight(weight: Tensor, *rest) -> Factors:
    weight += 1e-3
    return svd(weight, *rest)


def inverts_the_covariance(weight: Tensor, metric: InputMetric, statistics: SiteStatistics, rank: int) -> Factors:
    root = torch.linalg.cholesky(statistics[MOMENTS].covariance)
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
    assert statistics[FISHER] is not None
    return svd(weight, metric, statistics, rank)


def moves_the_mean_without_saying_so(
    weight: Tensor, metric: InputMetric, statistics: SiteStatistics, rank: int
) -> Factors:
    return low_rank(weight, metric, rank, mean=statistics[MOMENTS].mean)


def loses_half_the_rank(*given) -> Factors:
    factors = svd(*given)
    half = factors.max_rank // 2
    return replace(factors, expand_t=factors.expand_t[:half], reduce=factors.reduce[:half])


CHECKS = {name.removeprefix("test_"): name for name in dir(MethodConformance) if name.startswith("test_")}


class Made(MethodConformance):
    """Tests of a method that no registry has; ``prepare`` takes no options."""

    method = "made"

    def __init__(self, prepare: Callable[..., Factors]) -> None:
        def without_options(*given) -> Factors:
            return prepare(*given[:-1])

        words = {"name": "made", "paper": "nowhere", "summary": "for this test"}
        self.made = Method(**words, prepare=without_options, needs=(MOMENTS,))

    def _found(self) -> Method:
        return self.made


def run(check: str, prepare: Callable[..., Factors]) -> None:
    """One of the conformance tests on a method made of ``prepare``."""
    getattr(Made(prepare), CHECKS[check])()


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
def test_a_method_that_does_not_conform_is_found_out(prepare: Callable[..., Factors], check: str) -> None:
    with pytest.raises((AssertionError, RuntimeError, LookupError)):
        run(check, prepare)


@pytest.mark.parametrize("check", CHECKS)
def test_a_method_that_conforms_passes(check: str) -> None:
    run(check, svd)


def test_a_spectrum_may_claim_nothing() -> None:
    class Modest(Made):
        def error(self, *_) -> None:
            return None

    Modest(forgets_the_square).test_the_spectrum_predicts_the_error()


# --- statistics and options


def test_a_statistic_that_was_not_asked_for_is_not_given() -> None:
    svd_llm = METHODS.get("svd-llm")
    statistics = make_statistics(svd_llm, (9, 14))
    assert statistics[MOMENTS].mean.shape == (14,)
    with pytest.raises(LookupError, match=r"statistic 'fisher' was not asked for; name it under Method\.needs"):
        statistics[FISHER]


def test_options_change_what_a_method_computes() -> None:
    kfac = METHODS.get("kfac")
    statistics = make_statistics(kfac, (9, 14))
    weight = torch.randn(9, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def product(options: object) -> Tensor:
        chosen = ChosenMethod(kfac, options)
        return chosen.prepare(weight, chosen.metric(statistics), statistics, 3).product(3)

    assert torch.equal(product(kfac.options()), product(kfac.options(shrinkage=0.1)))
    assert not torch.allclose(product(kfac.options()), product(kfac.options(shrinkage=0.9)))
    # All of G's shrinkage leaves the identity: feature PCA.
    chosen = ChosenMethod(METHODS.get("afm"), NoOptions())
    one_sided = chosen.prepare(weight, chosen.metric(statistics), statistics, 3).product(3)
    torch.testing.assert_close(product(kfac.options(shrinkage=1.0)), one_sided)


def test_a_method_that_needs_nothing_has_no_text_read_for_it() -> None:
    assert {name for name in METHODS.built_in if not METHODS.get(name).reads_text} == {"svd"}
    assert {name for name in METHODS.built_in if METHODS.get(name).gradients} == {"kfac", "fwsvd"}
    assert {name for name in METHODS.built_in if METHODS.get(name).subject} == {"lpaf"}
