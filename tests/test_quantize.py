"""Codes in bytes, levels, rounding to nearest and GPTQ: exact where they must be, against float64 references."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from bolaco.errors import CheckpointError, NonFiniteError
from bolaco.quantize.gptq import Feedback, gptq
from bolaco.quantize.grid import GridSpec, Levels, fit_grid
from bolaco.quantize.matrix import QuantizedMatrix, from_tensors, round_to_nearest
from bolaco.quantize.packing import pack, packed_bytes, unpack

BITS = st.integers(1, 8)


@st.composite
def specs(draw: st.DrawFn) -> GridSpec:
    bits = draw(BITS)
    levels = draw(st.sampled_from([kind for kind in Levels if bits > 1 or kind is not Levels.SYMMETRIC]))
    group = draw(st.sampled_from([None, 1, 3, 4, 7, 128]))
    return GridSpec(bits=bits, group=group, levels=levels, fitted=draw(st.booleans()), by_column=draw(st.booleans()))


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 20))


def drawn(rows: int, columns: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hessian_of(columns: int, seed: int, samples: int | None = None) -> Tensor:
    """A second moment of inputs that are correlated and of different sizes."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    inputs = torch.randn(samples or 4 * columns, columns, generator=draw, dtype=torch.float64) @ mixed
    return inputs.T @ inputs / len(inputs)


@given(bits=BITS, codes=st.lists(st.integers(0, 255), max_size=50))
@settings(max_examples=200, deadline=None)
def test_codes_are_packed_exactly(bits: int, codes: list[int]) -> None:
    given_codes = torch.tensor([code % 2**bits for code in codes], dtype=torch.uint8)
    packed = pack(given_codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(len(codes), bits)
    assert torch.equal(unpack(packed, bits, len(codes)), given_codes)
    # The layout that is written down: the first code in the lowest bits.
    word = sum(int(code) << bits * place for place, code in enumerate(given_codes.tolist()))
    assert bytes(packed.tolist()) == word.to_bytes(len(packed), "little")


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_of_every_width(bits: int) -> None:
    codes = torch.arange(2**bits).repeat(5).to(torch.uint8)[: 5 * 2**bits - 3]
    assert torch.equal(unpack(pack(codes, bits), bits, len(codes)), codes)


def test_bytes_of_another_number_of_codes_are_refused() -> None:
    packed = pack(torch.zeros(9, dtype=torch.uint8), 3)
    with pytest.raises(CheckpointError, match="17 codes of 3 bits are 7 bytes"):
        unpack(packed, 3, 17)


@given(spec=specs(), size=SIZES, seed=st.integers(0, 99), scale=st.sampled_from([1e-30, 1e-4, 1.0, 1e30]))
@settings(max_examples=150, deadline=None)
def test_counted_bits_are_the_bytes_that_are_stored(
    spec: GridSpec, size: tuple[int, int], seed: int, scale: float
) -> None:
    found = round_to_nearest(drawn(*size, seed, scale), spec)
    stored = found.tensors()
    assert found.stored_bits == 8 * sum(t.numel() * t.element_size() for t in stored.values())
    assert found.stored_bits == spec.stored_bits(*size)
    again = from_tensors(stored, spec, *size)
    assert torch.equal(again.dense(), found.dense())


@given(spec=specs(), size=SIZES, seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_no_level_is_nearer_than_the_one_taken(spec: GridSpec, size: tuple[int, int], seed: int) -> None:
    weight = drawn(*size, seed)
    found = round_to_nearest(weight, spec)
    scale, zero = found.grid.each(*size)
    error = (found.dense().double() - weight.double()).abs()
    for code in range(spec.top + 1):
        other = (((code - zero) * scale).double() - weight.double()).abs()
        assert (error <= other * (1 + 1e-9)).all()


@given(spec=specs(), size=SIZES, seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_levels_that_are_not_fitted_span_all_numbers(spec: GridSpec, size: tuple[int, int], seed: int) -> None:
    spec = spec.model_copy(update={"fitted": False})
    weight = drawn(*size, seed)
    found = round_to_nearest(weight, spec)
    scale, _ = found.grid.each(*size)
    # Half a step, and another half where the range does not begin on a level.
    assert ((found.dense() - weight).abs() <= scale * (1.0 if spec.levels is Levels.ASYMMETRIC else 0.5) * 1.01).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_zero_stays_zero(bits: int) -> None:
    for levels in Levels:
        if bits > 1 or levels is not Levels.SYMMETRIC:
            assert not round_to_nearest(torch.zeros(3, 5), GridSpec(bits=bits, levels=levels)).dense().any()
    # A number that is 0 beside others, where zero is a level.
    weight = drawn(4, 16, bits)
    weight[:, 3] = 0
    for levels in (Levels.ASYMMETRIC, *([Levels.SYMMETRIC] if bits > 1 else [])):
        assert not round_to_nearest(weight, GridSpec(bits=bits, levels=levels)).dense()[:, 3].any()


@pytest.mark.parametrize(
    ("bits", "most"), [(1, 0.37), (2, 0.125), (3, 0.041), (4, 0.0125)], ids=["1 bit", "2 bits", "3 bits", "4 bits"]
)
def test_fitted_levels_are_near_the_best_uniform_ones(bits: int, most: float) -> None:
    """Of normal numbers the least squared errors of midrise levels are 0.3634, 0.1188, 0.0374 and 0.0115 (Max 1960)."""
    weight = drawn(8, 4096, 0)
    spec = GridSpec(bits=bits, group=None, levels=Levels.MIDRISE, fitted=True)
    error = float((round_to_nearest(weight, spec).dense() - weight).square().mean() / weight.square().mean())
    assert error < most
    spanning = round_to_nearest(weight, spec.model_copy(update={"fitted": False})).dense()
    assert error < float((spanning - weight).square().mean())


@given(spec=specs(), size=SIZES, seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_a_transpose_has_the_same_numbers(spec: GridSpec, size: tuple[int, int], seed: int) -> None:
    found = round_to_nearest(drawn(*size, seed), spec)
    turned = found.transposed()
    assert torch.equal(turned.dense(), found.dense().T)
    assert turned.stored_bits == turned.grid.spec.stored_bits(*turned.shape) == found.stored_bits


def test_groups_along_a_column_are_those_of_the_transpose() -> None:
    weight = drawn(9, 5, 1)
    spec = GridSpec(bits=3, group=4)
    along = round_to_nearest(weight, spec.model_copy(update={"by_column": True}))
    assert torch.equal(along.dense(), round_to_nearest(weight.T, spec).dense().T)
    assert tuple(along.grid.scales.shape) == (5, 3)


def one_by_one(weight: Tensor, hessian: Tensor, order: list[int], grid: tuple[Tensor, Tensor], top: int) -> Tensor:
    """Optimal brain quantization in its own words: the inverse of what is left is computed anew for every column."""
    left, found = weight.clone(), torch.empty_like(weight)
    scale, zero = grid
    for at, column in enumerate(order):
        found[:, column] = ((left[:, column] / scale[:, column] + zero[:, column]).round()).clamp(0, top)
        value = (found[:, column] - zero[:, column]) * scale[:, column]
        rest = order[at:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        error = (left[:, column] - value) / inverse[0, 0]
        for place, other in enumerate(rest[1:], 1):
            left[:, other] -= error * inverse[0, place]
    return (found - zero) * scale


@pytest.mark.parametrize(
    ("act_order", "columns", "by_column"), [(True, 24, False), (False, 24, False), (True, 160, True)]
)
def test_gptq_is_optimal_brain_quantization(act_order: bool, columns: int, by_column: bool) -> None:
    """Also across blocks of columns, and of the scales of groups that the order takes apart."""
    spec = GridSpec(bits=3, group=8, by_column=by_column)
    weight, hessian = drawn(4, columns, 0).double(), hessian_of(columns, 1)
    feedback = Feedback(hessian, damping=0.02, act_order=act_order)
    found = gptq(weight, feedback, spec).dense().double()
    order = sorted(range(columns), key=lambda i: -float(hessian[i, i])) if act_order else list(range(columns))
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    scale, zero = fit_grid(weight, spec).each(*weight.shape)
    assert isinstance(zero, Tensor)
    expected = one_by_one(weight, damped, order, (scale.double(), zero.double()), spec.top)
    assert torch.equal(found, expected)


@given(spec=specs(), size=SIZES, seed=st.integers(0, 999), act_order=st.booleans())
@settings(max_examples=150, deadline=None)
def test_gptq_is_never_worse_than_the_nearest_levels(
    spec: GridSpec, size: tuple[int, int], seed: int, act_order: bool
) -> None:
    weight = drawn(*size, seed)
    feedback = Feedback(hessian_of(size[1], seed + 1, samples=1 + seed % 40), act_order=act_order)
    errors = [
        feedback.error(found.dense().double() - weight.double())
        for found in (gptq(weight, feedback, spec), round_to_nearest(weight, spec))
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-9) + 1e-12).all()


def test_gptq_gains_much_where_inputs_are_correlated() -> None:
    weight, feedback, spec = drawn(16, 64, 0), Feedback(hessian_of(64, 1)), GridSpec(bits=3, group=32)
    errors = [
        float(feedback.error(found.dense().double() - weight.double()).sum())
        for found in (gptq(weight, feedback, spec), round_to_nearest(weight, spec))
    ]
    assert errors[0] < 0.5 * errors[1]


def test_what_is_decoded_is_what_gptq_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: levels are float32 numbers, so no error that was fed back is another one than that of the file."""
    from bolaco.quantize import gptq as module

    computed: list[tuple[Tensor, Tensor]] = []
    nearest = module.nearest_codes

    def recorded(number: Tensor, step: Tensor, origin: Tensor, top: int) -> Tensor:
        code = nearest(number, step, origin, top)
        if number.ndim == 1:
            computed.append((code, (code - origin) * step))
        return code

    monkeypatch.setattr(module, "nearest_codes", recorded)
    for bits, levels in itertools.product(range(1, 9), Levels):
        if bits == 1 and levels is Levels.SYMMETRIC:
            continue
        computed.clear()
        weight, feedback = drawn(6, 40, bits, 1e-3), Feedback(hessian_of(40, bits))
        found = gptq(weight, feedback, GridSpec(bits=bits, group=16, levels=levels)).dense()
        values = torch.empty(6, 40, dtype=torch.float64)
        values[:, feedback.order] = torch.stack([value for _, value in computed], dim=1)
        rows = [torch.equal(found[i].double(), values[i]) for i in range(6)]
        kept = feedback.error(values - weight.double()) <= feedback.error(
            round_to_nearest(weight, GridSpec(bits=bits, group=16, levels=levels)).dense().double() - weight.double()
        )
        assert rows == kept.tolist()
        assert any(rows)


def test_inputs_that_are_zero_round_to_nearest() -> None:
    weight, spec = drawn(4, 8, 0), GridSpec(bits=4)
    found = gptq(weight, Feedback(torch.zeros(8, 8)), spec)
    assert torch.equal(found.dense(), round_to_nearest(weight, spec).dense())


def test_what_cannot_be_quantized() -> None:
    weight = drawn(4, 8, 0)
    weight[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="the matrix to quantize holds NaN"):
        round_to_nearest(weight, GridSpec(bits=4))
    with pytest.raises(NonFiniteError, match="the Hessian of a matrix to quantize holds NaN"):
        Feedback(torch.full((2, 2), torch.nan))
    with pytest.raises(NonFiniteError, match="not positive semi-definite"):
        Feedback(torch.tensor([[1.0, 5.0], [5.0, 1.0]]))
    with pytest.raises(NonFiniteError, match="too large"):
        round_to_nearest(torch.tensor([[-3e38, 3e38]]), GridSpec(bits=1))
    with pytest.raises(ValidationError, match="take midrise"):
        GridSpec(bits=1, levels=Levels.SYMMETRIC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(3, dtype=torch.uint8)}, "40 codes of 3 bits are 15 bytes"),
        ({"scales": torch.ones(5, 1)}, r"scales are torch.float32 \(5, 1\), not torch.bfloat16 \(5, 2\)"),
        ({"zeros": None}, "has codes, scales, not codes, scales, zeros"),
        ({"scales": torch.full((5, 2), torch.inf, dtype=torch.bfloat16)}, "scales hold NaN or infinity"),
    ],
)
def test_tensors_of_another_matrix_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    spec = GridSpec(bits=3, group=4)
    stored: dict[str, Tensor | None] = dict(round_to_nearest(drawn(5, 8, 0), spec).tensors())
    tensors = {name: tensor for name, tensor in (stored | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        from_tensors(tensors, spec, 5, 8)


def test_a_matrix_on_another_device_is_the_same() -> None:
    found = round_to_nearest(drawn(5, 8, 0), GridSpec(bits=3))
    moved = found.to(torch.device("cpu"))
    assert isinstance(moved, QuantizedMatrix)
    assert torch.equal(moved.dense(), found.dense())
    assert found.dense(torch.bfloat16).dtype == torch.bfloat16
