"""The two-sided metric: its optimum, its error, and its special cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bolaco.factorize import GRADIENT, METHODS, MOMENTS, ChosenMethod, SiteStatistics
from bolaco.factorize.methods.kfac import KfacOptions
from bolaco.factorize.solver import InputMetric, OutputMetric, low_rank
from bolaco.statistics.moments import PooledMoments


def _psd(size, seed, rank=None):
    half = torch.randn(size, rank or 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return half @ half.T / half.shape[1]


def _weight(out, inside, seed=0):
    return torch.randn(out, inside, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _loss(g, c, difference):
    return float(torch.trace(g @ difference @ c @ difference.T))


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(3, 14), st.integers(3, 14), st.integers(0, 10**6), st.data())
def test_no_other_matrix_of_the_rank_is_closer(out, inside, seed, data):
    rank = data.draw(st.integers(1, min(out, inside) - 1))
    weight, g, c = _weight(out, inside, seed), _psd(out, seed + 1), _psd(inside, seed + 2)
    factors = low_rank(weight, InputMetric(c), min(out, inside), output=OutputMetric(g))
    error = _loss(g, c, weight - factors.product(rank))
    assert error == pytest.approx(factors.error(rank), rel=1e-6, abs=1e-9 * float(factors.spectrum.sum()))
    # Plain SVD, the one-sided solution, random matrices, and small changes of the solution itself.
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    rivals = [(u[:, :rank] * s[:rank]) @ v[:rank], low_rank(weight, InputMetric(c), rank).product(rank)]
    generator = torch.Generator().manual_seed(seed)
    for scale in (1e-3, 1e-1, 1.0):
        left = factors.expand_t[:rank].T + scale * torch.randn(out, rank, generator=generator, dtype=torch.float64)
        right = factors.reduce[:rank] + scale * torch.randn(rank, inside, generator=generator, dtype=torch.float64)
        rivals.append(left @ right)
    assert all(_loss(g, c, weight - rival) >= error * (1 - 1e-9) - 1e-12 for rival in rivals)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (10, 10)])
def test_full_rank_gives_the_matrix_back(shape):
    weight = _weight(*shape)
    gradient = _psd(shape[0], 1, rank=3)  # singular: the loss sees three directions only
    factors = low_rank(weight, InputMetric(_psd(shape[1], 2)), min(shape), output=OutputMetric(gradient, 0.1))
    assert torch.allclose(factors.product(min(shape)), weight, atol=1e-9)


def test_identity_output_metric_is_the_one_sided_solution():
    weight, c = _weight(9, 14), _psd(14, 2)
    one = low_rank(weight, InputMetric(c), 5)
    for output in (None, OutputMetric(None), OutputMetric(3.0 * torch.eye(9)), OutputMetric(_psd(9, 4), 1.0)):
        two = low_rank(weight, InputMetric(c), 5, output=output)
        assert torch.allclose(one.product(5), two.product(5), atol=1e-9)


def test_bias_keeps_the_mean_output():
    weight, mean = _weight(9, 14), torch.randn(14, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    factors = low_rank(weight, InputMetric(_psd(14, 2)), 5, mean=mean, output=OutputMetric(_psd(9, 4), 0.1))
    for rank in (1, 3, 5):
        assert torch.allclose(factors.product(rank) @ mean + factors.bias(rank, None), weight @ mean, atol=1e-9)


def test_a_matrix_the_loss_never_reaches():
    output = OutputMetric(torch.zeros(4, 4), KfacOptions().shrinkage)
    assert torch.allclose(output.over_root(output.times_root(torch.eye(4, dtype=torch.float64))), torch.eye(4).double())


def _root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.7, 1.0])
def test_shrinkage_mixes_the_mean_eigenvalue_into_the_output_metric(shape, shrinkage):
    """Against the SVD of ``G^(1/2) W A^(1/2)`` and inverse roots; G is as small as those of losses are."""
    weight, generator = _weight(*shape), torch.Generator().manual_seed(1)
    x = torch.randn(300, shape[1], generator=generator, dtype=torch.float64) @ _weight(shape[1], shape[1], 2) + 3
    g = 1e-4 * torch.randn(300, shape[0], generator=generator, dtype=torch.float64) @ _weight(shape[0], shape[0], 3)
    moments = PooledMoments(shape[1])
    moments.update(x)
    own = SiteStatistics({MOMENTS: moments.finalize(), GRADIENT: g.T @ g / len(g)})
    method = METHODS.get("kfac")
    chosen = ChosenMethod(method, method.options(shrinkage=shrinkage))
    found = chosen.prepare(weight, chosen.metric(own), own, min(shape))

    second = g.T @ g / len(g)
    g_root = _root((1 - shrinkage) * second + shrinkage * second.diagonal().mean() * torch.eye(shape[0]))
    a_root = _root(torch.cov(x.T))
    u, s, v = torch.linalg.svd(g_root @ weight @ a_root, full_matrices=False)
    for rank in (1, 4, min(shape) - 1):
        expected = torch.linalg.inv(g_root) @ (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(a_root)
        torch.testing.assert_close(found.product(rank), expected, rtol=1e-6, atol=1e-7)
        assert found.error(rank) == pytest.approx(float(s[rank:].square().sum()), rel=1e-6)
        shift = found.bias(rank, None)
        torch.testing.assert_close(found.product(rank) @ x.mean(0) + shift, weight @ x.mean(0), rtol=1e-9, atol=1e-9)


def test_what_shrinkage_is_when_nothing_is_said_and_what_it_cannot_be():
    assert METHODS.get("kfac").options() == KfacOptions(shrinkage=0.1)
    for value in (-0.1, 1.1, float("nan"), True):
        with pytest.raises(ValidationError, match="shrinkage"):
            KfacOptions(shrinkage=value)
