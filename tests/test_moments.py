"""Pooled moments against numpy in float64 (arXiv 2405.10616, section 3.1)."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bolaco.errors import NonFiniteError
from bolaco.statistics import moments as module
from bolaco.statistics.magnitude import Magnitudes
from bolaco.statistics.moments import Moments, PooledMoments

MODEST = settings(max_examples=40, deadline=None, derandomize=True)


def draw(rows: int, dim: int, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    """Correlated rows in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return torch.randn(rows, dim, generator=generator, dtype=torch.float64) @ mix + mean


def of(*groups: torch.Tensor) -> PooledMoments:
    """All of each group in one update."""
    pooled = PooledMoments(groups[0].shape[-1], len(groups))
    for i, group in enumerate(groups):
        pooled.update(group, i)
    return pooled


def covariance(x: torch.Tensor) -> np.ndarray:
    """Unbiased sample covariance in float64, by numpy."""
    return np.cov(x.double().numpy(), rowvar=False)


def assert_same(a: Moments, b: Moments, rtol: float = 1e-9) -> None:
    assert a.count == b.count
    for name in ("mean", "covariance", "second_moment"):
        left, right = getattr(a, name), getattr(b, name)
        scale = float(right.abs().max())
        torch.testing.assert_close(left, right, rtol=0, atol=rtol * scale)


def test_equal_groups_give_the_plain_mean_of_their_covariances() -> None:
    groups = [draw(40, 7, seed=i, mean=5.0 * i) for i in range(6)]
    result = of(*groups).finalize()
    expected = np.mean([covariance(g) for g in groups], axis=0)
    np.testing.assert_allclose(result.covariance.numpy(), expected, rtol=0, atol=1e-10)
    # The groups' means differ, so the covariance of everything together is another matrix.
    assert np.abs(covariance(torch.cat(groups)) - expected).max() > 10
    np.testing.assert_allclose(result.mean.numpy(), torch.stack([g.mean(0) for g in groups]).mean(0).numpy())
    assert result.count == 240
    assert result.covariance.dtype == torch.float64


def test_one_group_is_the_sample_covariance() -> None:
    x = draw(50, 9, mean=3.0)
    result = of(x).finalize()
    np.testing.assert_allclose(result.covariance.numpy(), covariance(x), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(result.mean.numpy(), x.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(result.second_moment.numpy(), x.numpy().T @ x.numpy() / 50, rtol=1e-10, atol=1e-10)


def test_unequal_groups_weigh_by_their_degrees_of_freedom() -> None:
    groups = [draw(n, 5, seed=n, mean=float(n)) for n in (30, 30, 4)]
    result = of(*groups).finalize()
    weights = [29, 29, 3]
    np.testing.assert_allclose(
        result.covariance.numpy(), np.average([covariance(g) for g in groups], axis=0, weights=weights), atol=1e-10
    )
    np.testing.assert_allclose(result.mean.numpy(), torch.cat(groups).mean(0).numpy(), rtol=1e-12)


def test_a_group_of_one_vector_has_no_freedom_and_moves_only_the_mean() -> None:
    x, lone = draw(30, 4), draw(1, 4, seed=9, mean=100.0)
    result = of(x, lone).finalize()
    np.testing.assert_allclose(result.covariance.numpy(), covariance(x), atol=1e-10)
    np.testing.assert_allclose(result.mean.numpy(), torch.cat([x, lone]).mean(0).numpy(), rtol=1e-12)


def test_a_group_never_seen_counts_for_nothing() -> None:
    x, y = draw(20, 4), draw(20, 4, seed=1, mean=2.0)
    pooled = PooledMoments(4, groups=5)
    pooled.update(x, 1)
    pooled.update(y, 3)
    assert_same(pooled.finalize(), of(x, y).finalize())


@MODEST
@given(
    cuts=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    owners=st.integers(0, 2**12 - 1),
    order=st.randoms(use_true_random=False),
)
def test_batches_in_any_order_and_shards_in_any_split_equal_the_whole(
    cuts: list[int], owners: int, order: Random
) -> None:
    groups = [draw(60, 6, seed=i, mean=10.0 * i) for i in range(2)]
    whole = of(*groups).finalize()
    edges = [0, *sorted(set(cuts) - {0, 60}), 60]
    pieces = [(g, groups[g][a:b]) for g in range(2) for a, b in itertools.pairwise(edges)]
    order.shuffle(pieces)
    shards = [PooledMoments(6, 2), PooledMoments(6, 2)]
    single = PooledMoments(6, 2)
    for i, (group, piece) in enumerate(pieces):
        single.update(piece, group)
        shards[owners >> i & 1].update(piece, group)
    assert_same(single.finalize(), whole)
    shards[0].merge(shards[1])
    assert_same(shards[0].finalize(), whole)


def test_merging_leaves_the_other_shard_and_both_can_go_on() -> None:
    x = draw(90, 5, mean=7.0)
    left, right = of(x[:30]), of(x[30:60])
    before = right.finalize()
    left.merge(right)
    assert_same(right.finalize(), before)
    left.update(x[60:])
    right.update(x[:30])
    assert_same(left.finalize(), of(x).finalize())
    assert_same(right.finalize(), of(x[:60]).finalize())


def test_merging_with_an_empty_shard_changes_nothing() -> None:
    x = draw(30, 5)
    expected = of(x).finalize()
    full = of(x)
    full.merge(PooledMoments(5))
    assert_same(full.finalize(), expected)
    empty = PooledMoments(5)
    empty.merge(of(x))
    assert_same(empty.finalize(), expected)


@pytest.mark.parametrize(("dim", "groups"), [(5, 1), (4, 2)])
def test_merging_another_shape_is_refused(dim: int, groups: int) -> None:
    with pytest.raises(ValueError, match=f"cannot merge {groups} groups of {dim} into 2 of 5"):
        PooledMoments(5, 2).merge(PooledMoments(dim, groups))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_magnitudes_are_the_mean_absolute_values_over_batches_and_shards(dtype: torch.dtype) -> None:
    x = draw(90, 5, mean=-0.3).to(dtype)
    whole, left, right = (Magnitudes(5) for _ in range(3))
    for i, piece in enumerate(x.split(25)):
        whole.update(piece, i % 2)
        (left if i < 2 else right).update(piece, i % 2)
    before = right.finalize()
    left.merge(right)
    left.merge(Magnitudes(5))
    expected = x.double().abs().mean(dim=0)
    for magnitudes in (whole, left):
        torch.testing.assert_close(magnitudes.finalize(), expected, rtol=1e-6, atol=0)
    assert torch.equal(right.finalize(), before)


def test_a_mean_magnitude_needs_a_vector() -> None:
    magnitudes = Magnitudes(3)
    magnitudes.update(draw(4, 3)[:0])
    with pytest.raises(ValueError, match="at least one vector"):
        magnitudes.finalize()


def test_a_large_offset_in_float32_costs_no_accuracy() -> None:
    # Standard deviation 1 on a mean of 1e4: computed as E[xx] - E[x]E[x] in float32, nothing would be left of it.
    groups = [draw(500, 8, seed=i, mean=1e4).float() for i in range(4)]
    pooled = PooledMoments(8, 4)
    for i, group in enumerate(groups):
        for batch in group.split(100):
            pooled.update(batch, i)
    result = pooled.finalize()
    expected = np.mean([covariance(g) for g in groups], axis=0)
    np.testing.assert_allclose(result.covariance.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(result.mean.numpy(), torch.cat(groups).double().mean(0).numpy(), rtol=1e-10)
    x = torch.cat(groups).double().numpy()
    np.testing.assert_allclose(result.second_moment.numpy(), x.T @ x / len(x), rtol=1e-9)


def test_precisions_can_change_between_batches_at_a_large_offset() -> None:
    x = draw(400, 6, mean=1e4 + 1 / 3)
    mixed = PooledMoments(6)
    mixed.update(x[:200])
    mixed.update(x[200:].float())
    expected = of(torch.cat([x[:200], x[200:].float().double()])).finalize()
    assert_same(mixed.finalize(), expected, rtol=1e-5)
    torch.testing.assert_close(mixed.finalize().mean, expected.mean, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_accuracy_by_input_precision(dtype: torch.dtype, tolerance: float) -> None:
    # Against numpy on the very inputs: what bfloat16 rounded away is gone, but nothing more is lost.
    x = draw(3000, 20, mean=2.0).to(dtype)
    result = of(x).finalize()
    expected = covariance(x)
    np.testing.assert_allclose(result.covariance.numpy(), expected, rtol=0, atol=tolerance * expected.max())


def test_dimensions_beyond_one_panel_and_rows_beyond_one_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FLUSH_ROWS", 300)
    dim = 2 * module._PANEL + 37
    x = draw(1000, dim, mean=1.0)
    pooled = PooledMoments(dim)
    for batch in x.split(130):
        pooled.update(batch)
    result = pooled.finalize()
    np.testing.assert_allclose(result.covariance.numpy(), covariance(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(result.covariance, result.covariance.T, rtol=0, atol=1e-14)
    np.testing.assert_allclose(result.second_moment.numpy(), x.numpy().T @ x.numpy() / 1000, rtol=0, atol=1e-10)


def test_vectors_may_have_leading_dimensions() -> None:
    x = draw(24, 5)
    assert_same(of(x.view(2, 3, 4, 5)).finalize(), of(x).finalize())


def test_finalize_can_be_called_on_the_way() -> None:
    x = draw(60, 4, mean=3.0)
    pooled = of(x[:30])
    assert_same(pooled.finalize(), of(x[:30]).finalize())
    pooled.update(x[30:])
    assert_same(pooled.finalize(), of(x).finalize())


def test_an_empty_batch_is_no_batch() -> None:
    x = draw(20, 4)
    pooled = PooledMoments(4)
    pooled.update(x[:0])
    pooled.update(x)
    pooled.update(x[:0])
    assert_same(pooled.finalize(), of(x).finalize())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_nan_and_infinity_are_refused_by_position_and_leave_the_state_clean(bad: float, first: bool) -> None:
    x = draw(20, 4).float()
    broken = x.clone()
    broken[7, 2] = bad
    pooled = PooledMoments(4) if first else of(x)
    with pytest.raises(NonFiniteError, match="input 2 of 4"):
        pooled.update(broken)
    if first:
        pooled.update(x)
    assert_same(pooled.finalize(), of(x).finalize())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_magnitudes_refuse_nan_and_infinity_in_the_same_words(bad: float, first: bool) -> None:
    x = draw(20, 4).float()
    broken = x.clone()
    broken[7, 2] = bad
    magnitudes = Magnitudes(4)
    if not first:
        magnitudes.update(x)
    with pytest.raises(NonFiniteError, match="input 2 of 4"):
        magnitudes.update(broken)
    if first:
        magnitudes.update(x)
    torch.testing.assert_close(magnitudes.finalize(), x.double().abs().mean(dim=0))


def test_a_covariance_needs_two_vectors_of_one_group() -> None:
    with pytest.raises(ValueError, match="at least two vectors"):
        PooledMoments(3).finalize()
    with pytest.raises(ValueError, match=r"\[1, 1\]"):
        of(draw(1, 3), draw(1, 3, seed=1)).finalize()
