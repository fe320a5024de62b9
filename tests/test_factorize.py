"""Factorizations against their definitions (arXiv 2405.10616, section 3.1; SVD-LLM, arXiv 2403.07378)."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from bolaco.errors import BolacoError, RecipeError, ResumeError
from bolaco.factorize import (
    FISHER,
    METHODS,
    MOMENTS,
    ChosenMethod,
    Factors,
    InputMetric,
    Moments,
    SiteStatistics,
    low_rank,
    solver,
)
from bolaco.factorize.methods.fwsvd import LEAST, importance
from bolaco.factorize.store import FactorStore
from bolaco.statistics.statistic import InputStatistic
from bolaco.statistics.symmetric import lower_root

MODEST = settings(max_examples=40, deadline=None, derandomize=True)
SHAPES = {"wide": (9, 14), "square": (12, 12), "tall": (17, 8)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
# Those with a metric on the input only.
methods = pytest.mark.parametrize("method", ["afm", "svd-llm", "asvd", "svd"])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(dim: int, rows: int = 200, seed: int = 0, rank: int | None = None, mean: float = 2.0) -> Tensor:
    """Rows with a decaying spectrum and a mean; ``rank`` below ``dim`` makes their covariance singular."""
    rank = rank or dim
    scale = torch.linspace(0, -3, rank, dtype=torch.float64).exp()
    return (noise(rows, rank, seed=seed) * scale) @ noise(rank, dim, seed=seed + 1) + mean * noise(dim, seed=seed + 2)


def statistic(kind: InputStatistic[Any], x: Tensor) -> Any:
    """A statistic of an input, from all its vectors."""
    accumulator = kind.accumulator(x.shape[-1], 1, x.device)
    accumulator.update(x)
    return accumulator.finalize()


def moments(x: Tensor) -> Moments:
    found: Moments = statistic(MOMENTS, x)
    return found


def factors(method: str, weight: Tensor, x: Tensor, rank: int, **options: Any) -> Factors:
    """By a method that needs statistics of the input only, from the input itself."""
    found = METHODS.get(method)
    chosen = ChosenMethod(found, found.options(**options))
    own = SiteStatistics({kind: statistic(kind, x) for kind in found.needs})
    return chosen.prepare(weight, chosen.metric(own), own, rank)


def outputs(item: Factors, rank: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
    result = x @ item.product(rank).T
    shift = item.bias(rank, bias)
    return result if shift is None else result + shift


def squared_error(y: Tensor, other: Tensor, freedom: int) -> float:
    return float((y - other).square().sum() / freedom)


@methods
@shapes
@pytest.mark.parametrize("singular", ["regular", "singular", "constant"])
def test_full_rank_reproduces_the_weight(method: str, shape: tuple[int, int], singular: str) -> None:
    weight = noise(*shape)
    dim = shape[1]
    x = {"regular": inputs(dim), "singular": inputs(dim, rank=3), "constant": inputs(dim) * 0}[singular]
    full = min(shape)
    item = factors(method, weight, x, full)
    assert item.max_rank == full
    torch.testing.assert_close(item.product(full), weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(item.expand_t @ item.expand_t.T, torch.eye(full, dtype=torch.float64))
    assert item.error(full) <= 1e-8 * max(float(item.spectrum.sum()), 1e-8)


@shapes
def test_error_on_the_calibration_data_is_the_tail_of_the_spectrum(shape: tuple[int, int]) -> None:
    weight, bias = noise(*shape), noise(shape[0], seed=3)
    x = inputs(shape[1])
    y = x @ weight.T + bias
    item = factors("afm", weight, x, min(shape))
    previous = float("inf")
    for rank in range(1, min(shape)):
        measured = squared_error(y, outputs(item, rank, x, bias), len(x) - 1)
        assert item.error(rank) == pytest.approx(measured, rel=1e-8)
        assert item.error(rank) == pytest.approx(float(item.spectrum[rank:].sum()), rel=1e-12)
        assert measured < previous
        previous = measured


@shapes
def test_the_uncentred_error_is_the_tail_of_svd_llm_s_spectrum(shape: tuple[int, int]) -> None:
    weight, x = noise(*shape), inputs(shape[1])
    item = factors("svd-llm", weight, x, min(shape))
    for rank in range(1, min(shape)):
        measured = squared_error(x @ weight.T, outputs(item, rank, x), len(x))
        assert item.error(rank) == pytest.approx(measured, rel=1e-8)


@shapes
def test_plain_svd_is_eckart_young(shape: tuple[int, int]) -> None:
    weight = noise(*shape)
    item = factors("svd", weight, inputs(shape[1]), min(shape))
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    for rank in range(1, min(shape)):
        torch.testing.assert_close(item.product(rank), left[:, :rank] * values[:rank] @ right[:rank])
        assert item.error(rank) == pytest.approx(float(values[rank:].square().sum()), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@shapes
def test_a_diagonal_metric_is_the_same_as_its_matrix(shape: tuple[int, int], seed: int) -> None:
    weight, diagonal = noise(*shape, seed=seed), noise(shape[1], seed=seed + 5).square()
    diagonal[seed] = 0.0
    one, two = (low_rank(weight, InputMetric(m), min(shape)) for m in (diagonal, diagonal.diag()))
    torch.testing.assert_close(one.spectrum, two.spectrum)
    for rank in range(1, min(shape)):
        torch.testing.assert_close(one.product(rank), two.product(rank))


@shapes
def test_asvd_by_scaling_and_inverse(shape: tuple[int, int]) -> None:
    weight, x = noise(*shape), inputs(shape[1])
    scale = x.abs().mean(dim=0).sqrt()
    left, values, right = torch.linalg.svd(weight * scale, full_matrices=False)
    item = factors("asvd", weight, x, min(shape))
    assert item.bias(1, None) is None
    for rank in (1, 3, min(shape) - 1):
        classical = (left[:, :rank] * values[:rank] @ right[:rank]) / scale
        torch.testing.assert_close(item.product(rank), classical)
        assert item.error(rank) == pytest.approx(float(values[rank:].square().sum()), rel=1e-9)


@shapes
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_the_exponent_of_asvd_s_scaling(alpha: float, shape: tuple[int, int]) -> None:
    """S = diag((E|x|)^alpha): nothing but the scaling changes, 0 is plain SVD, and 0.5 what nothing said means."""
    weight, x = noise(*shape), inputs(shape[1])
    scale = x.abs().mean(dim=0).pow(alpha)
    left, values, right = torch.linalg.svd(weight * scale, full_matrices=False)
    item = factors("asvd", weight, x, min(shape), alpha=alpha)
    for rank in (1, 3, min(shape) - 1):
        classical = (left[:, :rank] * values[:rank] @ right[:rank]) / scale
        torch.testing.assert_close(item.product(rank), classical)
        assert item.error(rank) == pytest.approx(float(values[rank:].square().sum()), rel=1e-9)
    other = factors("svd", weight, x, min(shape)) if alpha == 0 else factors("asvd", weight, x, min(shape))
    assert torch.allclose(item.product(3), other.product(3)) == (alpha in (0, 0.5))


def test_options_that_cannot_be() -> None:
    for values in ({"alpha": -0.5}, {"alpha": float("inf")}, {"alpha": True}, {"beta": 0.5}):
        with pytest.raises(ValidationError, match=next(iter(values))):
            METHODS.get("asvd").options(**values)
    with pytest.raises(ValidationError, match="alpha"):
        METHODS.get("svd").options(alpha=0.5)


@shapes
def test_fwsvd_by_scaling_and_inverse(shape: tuple[int, int]) -> None:
    """And no closer in its metric than plain SVD is (a theorem); a constant Fisher information is plain SVD."""
    weight, fisher = noise(*shape), noise(shape[1], seed=4).square() * 1e-9
    x, method = inputs(shape[1]), METHODS.get("fwsvd")
    chosen = ChosenMethod(method, method.options())

    def prepared(values: Tensor) -> Factors:
        own = SiteStatistics({FISHER: values})
        return chosen.prepare(weight, chosen.metric(SiteStatistics({})), own, min(shape))

    scale = (fisher / fisher.mean()).sqrt()
    left, values, right = torch.linalg.svd(weight * scale, full_matrices=False)
    item, plain = prepared(fisher), factors("svd", weight, x, min(shape))
    for rank in (1, 3, min(shape) - 1):
        classical = (left[:, :rank] * values[:rank] @ right[:rank]) / scale
        torch.testing.assert_close(item.product(rank), classical)
        error = ((weight - item.product(rank)) * scale).square().sum()
        assert item.error(rank) == pytest.approx(float(error), rel=1e-9)
        assert error < ((weight - plain.product(rank)) * scale).square().sum()
    for constant in (torch.full((shape[1],), 3e-7), torch.zeros(shape[1])):
        torch.testing.assert_close(prepared(constant).product(3), plain.product(3))


def test_fwsvd_weighs_no_input_below_the_least() -> None:
    found = importance(torch.tensor([0.0, 1e-30, 1.0, 3.0]))
    torch.testing.assert_close(found, torch.tensor([LEAST, LEAST, 1.0, 3.0], dtype=torch.float64))


@shapes
def test_output_covariance_follows_from_the_input_s(shape: tuple[int, int]) -> None:
    weight, x = noise(*shape), inputs(shape[1])
    source, target = moments(x), moments(x @ weight.T)
    torch.testing.assert_close(weight @ source.covariance @ weight.T, target.covariance)
    torch.testing.assert_close(weight @ source.mean, target.mean)
    # W V sqrt(e): its left singular vectors are U, its squared singular values the spectrum.
    values, vectors = torch.linalg.eigh(source.covariance)
    left, singular, _ = torch.linalg.svd(weight @ (vectors * values.clamp(min=0).sqrt()), full_matrices=False)
    item = factors("afm", weight, x, min(shape))
    torch.testing.assert_close(item.spectrum[: min(shape)], singular.square(), rtol=1e-7, atol=0)
    agreement = (item.expand_t * left.T).sum(dim=1).abs()
    torch.testing.assert_close(agreement, torch.ones_like(agreement))
    torch.testing.assert_close(item.reduce, item.expand_t @ weight)


@shapes
def test_equals_svd_llm_by_cholesky_and_inverse(shape: tuple[int, int]) -> None:
    weight, x = noise(*shape), inputs(shape[1])
    stats = moments(x)
    for method, matrix in (("svd-llm", stats.second_moment), ("afm", stats.covariance)):
        root = torch.linalg.cholesky(matrix)
        left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
        item = factors(method, weight, x, min(shape))
        for rank in (1, 3, min(shape) - 1):
            classical = (left[:, :rank] * values[:rank] @ right[:rank]) @ torch.linalg.inv(root)
            torch.testing.assert_close(item.product(rank), classical, rtol=0, atol=1e-7)


@MODEST
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(list(SHAPES.values())), rank=st.integers(1, 7))
def test_no_plain_svd_and_no_affine_map_of_the_rank_does_better(seed: int, shape: tuple[int, int], rank: int) -> None:
    weight = noise(*shape, seed=seed)
    x = inputs(shape[1], rows=60, seed=seed + 10)
    y = x @ weight.T
    item = factors("afm", weight, x, rank)
    best = squared_error(y, outputs(item, rank, x), 1)
    best -= 1e-9 * best + 1e-12  # rounding
    plain = factors("svd", weight, x, rank).product(rank)
    # Plain SVD, without a bias and with the best one.
    assert best <= squared_error(y, x @ plain.T, 1)
    assert best <= squared_error(y - y.mean(0), (x - x.mean(0)) @ plain.T, 1)
    shift = item.bias(rank, None)
    assert shift is not None
    for step in (1e-4, 1e-2, 1.0):
        expand = item.expand_t.T + step * noise(shape[0], rank, seed=seed + 20)
        reduce = item.reduce + step * noise(rank, shape[1], seed=seed + 21)
        other = x @ (expand @ reduce).T + shift + step * noise(shape[0], seed=seed + 22)
        assert best < squared_error(y, other, 1)
        # The best bias for that map.
        assert best <= squared_error(y - y.mean(0), other - other.mean(0), 1)


@methods
@shapes
def test_a_slice_equals_factorizing_at_that_rank(method: str, shape: tuple[int, int]) -> None:
    weight, x = noise(*shape), inputs(shape[1])
    full = factors(method, weight, x, min(shape))
    for rank in (1, 4, min(shape) - 1):
        small = factors(method, weight, x, rank)
        assert small.max_rank == rank
        signs = (small.expand_t * full.expand_t[:rank]).sum(dim=1, keepdim=True).sign()
        torch.testing.assert_close(small.expand_t, signs * full.expand_t[:rank], rtol=0, atol=1e-9)
        torch.testing.assert_close(small.reduce, signs * full.reduce[:rank], rtol=0, atol=1e-9)
        torch.testing.assert_close(small.product(rank), full.product(rank), rtol=0, atol=1e-9)
        assert small.error(rank) == pytest.approx(full.error(rank))
        if method == "afm":
            torch.testing.assert_close(small.bias(rank, None), full.bias(rank, None), rtol=0, atol=1e-9)


@pytest.mark.parametrize("original", [True, False])
@shapes
def test_the_bias_keeps_the_mean_output_and_carries_the_original(shape: tuple[int, int], original: bool) -> None:
    weight, x = noise(*shape), inputs(shape[1], mean=50.0)
    bias = noise(shape[0], seed=3) if original else None
    y = x @ weight.T + (0 if bias is None else bias)
    item = factors("afm", weight, x, min(shape))
    for rank in range(1, min(shape) + 1):
        torch.testing.assert_close(outputs(item, rank, x, bias).mean(0), y.mean(0), rtol=1e-10, atol=1e-10)
    for method in ("svd", "svd-llm"):
        assert factors(method, weight, x, 3).bias(3, bias) is bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bias_makes_up_for_the_rounding_of_the_stored_factors(dtype: torch.dtype) -> None:
    # The mean is far larger than what varies, so a rounded A would shift the output by more than the bias itself.
    weight, x = noise(24, 40).to(dtype), inputs(40, mean=300.0)
    stats = moments(x)
    item = factors("afm", weight, x, 12)
    assert item.expand_t.dtype == item.reduce.dtype == dtype
    for rank in (4, 12):
        shift = item.bias(rank, None)
        assert shift is not None
        assert shift.dtype == dtype
        stored = item.expand_t[:rank].double().T @ (item.reduce[:rank].double() @ stats.mean)
        wanted = weight.double() @ stats.mean - stored
        # One rounding of the bias itself, and float32 arithmetic on terms of the mean's size.
        torch.testing.assert_close(
            shift.double(), wanted, rtol=torch.finfo(dtype).eps, atol=3e-6 * float(stored.abs().max())
        )


def test_one_metric_serves_all_matrices_of_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = InputMetric(moments(inputs(8)).covariance)
    roots: list[Tensor] = []
    monkeypatch.setattr(solver, "lower_root", lambda m, floor: roots.append(m) or lower_root(m, floor))
    for seed in range(3):
        low_rank(noise(20, 8, seed=seed), metric, 4)
    assert [root is metric.matrix for root in roots] == [True]


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_lower_root_of_a_matrix_that_may_be_singular(rank: int, scale: float) -> None:
    half = noise(8, rank, seed=rank) * scale
    matrix = half @ half.T
    floor = 1e-10 * float(matrix.diagonal().mean())
    lower = lower_root(matrix, floor)
    assert torch.equal(lower, lower.tril())
    # A regular matrix is decomposed as it is, a singular one with the floor.
    allowed = 1e-14 * float(matrix.abs().max()) if rank == 8 else 1.001 * floor
    torch.testing.assert_close(lower @ lower.T, matrix, rtol=0, atol=allowed)
    assert float(lower.diagonal().square().min()) > 0.5 * floor


def test_the_lower_root_of_a_matrix_that_rounding_made_indefinite() -> None:
    """As Cholesky fails on the lifted matrix too, its eigenvalues are lifted."""
    basis = torch.linalg.qr(noise(6, 6)).Q
    values = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1, -1e-3], dtype=torch.float64)
    matrix = (basis * values) @ basis.T
    lower = lower_root(matrix, 1e-6)
    assert torch.equal(lower, lower.tril())
    assert (lower.diagonal() > 0).all()
    found = torch.linalg.eigvalsh(lower @ lower.T).flip(0)
    torch.testing.assert_close(found[:5], values[:5] + 1e-6)
    torch.testing.assert_close(float(found[5]), 1e-6, rtol=1e-6, atol=0)


@shapes
def test_the_root_of_a_metric_squares_to_it(shape: tuple[int, int]) -> None:
    matrix = moments(inputs(shape[1], rank=3)).covariance
    root = InputMetric(matrix).root
    assert root is not None
    torch.testing.assert_close(root @ root.T, matrix, rtol=0, atol=1e-9 * float(matrix.abs().max()))
    assert InputMetric(None).root is None


def assert_same_factors(a: Factors, b: Factors) -> None:
    for field in fields(Factors):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert (left is None) == (right is None), field.name
        if left is not None:
            assert left.dtype == right.dtype, field.name
            assert torch.equal(left, right), field.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_store_gives_back_what_it_got(tmp_path: Path, dtype: torch.dtype) -> None:
    x = inputs(8)
    kept = {
        "model.layers.3.self_attn.q_proj": factors("afm", noise(6, 8).to(dtype), x, 3),
        "model.layers.3.attn.c_attn.k": factors("svd", noise(11, 8).to(dtype), x, 4),
    }
    store = FactorStore(tmp_path / "factors")
    assert not store.has(3)
    store.save(3, kept)
    assert store.has(3)
    assert not store.has(2)
    loaded = FactorStore(tmp_path / "factors").load(3)
    assert loaded.keys() == kept.keys()
    for name in kept:
        assert_same_factors(loaded[name], kept[name])
        assert torch.equal(store.read(3, "/spectrum")[f"{name}/spectrum"], kept[name].spectrum)
    assert store.read(3, "/spectrum").keys() == {f"{name}/spectrum" for name in kept}
    assert sorted(p.name for p in store.folder.iterdir()) == [store.path(3).name]


def test_store_holds_blocks_without_factors(tmp_path: Path) -> None:
    store = FactorStore(tmp_path)
    store.save(0, {})
    assert store.has(0)
    assert store.load(0) == {}


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "header", "text", "other tensors", "folder"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    store = FactorStore(tmp_path)
    path = store.path(2)
    store.save(2, {"m.q": factors("afm", noise(6, 8), inputs(8), 3)})
    content = path.read_bytes()
    path.unlink()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(content[:-7])
        case "header":
            path.write_bytes(content[:8] + b"}" + content[9:])
        case "text":
            path.write_text("not a tensor file")
        case "other tensors":
            save_file({"m.q/reduce": noise(2, 2), "m.q/something": noise(2)}, path)
        case "folder":
            path.mkdir()
    with pytest.raises(ResumeError, match=r"block-00002\.safetensors.*(missing|damaged)") as caught:
        store.load(2)
    assert str(path) in str(caught.value)


def test_a_failed_save_leaves_no_finished_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FactorStore(tmp_path)
    item = factors("svd", noise(6, 8), inputs(8), 3)

    def interrupted(tensors: dict[str, Tensor], path: Path, metadata: object = None) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("bolaco.work.tensors.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save(0, {"m.q": item})
    assert not store.has(0)


@pytest.mark.parametrize(("typo", "meant"), [("svdllm", "svd-llm"), ("AFM", None), ("amf", "afm"), ("qr", None)])
def test_a_typo_in_the_method_gets_a_hint(typo: str, meant: str | None) -> None:
    hint = f"did you mean '{meant}'" if meant else f"known are {', '.join(METHODS.names())}"
    with pytest.raises(RecipeError, match=hint) as caught:
        METHODS.get(typo)
    assert f"'{typo}'" in str(caught.value)
    assert isinstance(caught.value, BolacoError)


@pytest.mark.parametrize("method", METHODS.names())
def test_methods_are_described(method: str) -> None:
    chosen = METHODS.get(method)
    assert chosen.name == method
    assert chosen.paper
    assert chosen.summary
