"""Fused models: the same function, the same state dict, the same bytes when saved, and undone without a trace."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bolaco
from bolaco.errors import UnsupportedModelError
from bolaco.layers import LowRankLinear, PivotedLinear, put_module
from bolaco.models.load import load_model
from bolaco.runtime import fuse as fusing
from bolaco.runtime import product
from bolaco.runtime.fused import FusedLinear, Joint
from bolaco.runtime.pieces import (
    ColumnsPiece,
    DensePiece,
    MultipliedPiece,
    Piece,
    pieces_of,
    with_outputs,
)
from bolaco.runtime.product import ColumnProduct, Layouts, MixedProduct, PackedProduct, Product, RowProduct
from tests.command import digest
from tests.models import FAMILIES, compressed_once, mostly_slow, tiny_llama, token_blocks

PRODUCTS = [RowProduct, ColumnProduct, MixedProduct, PackedProduct]
PIVOTED = {"preset": "default", "search": "spectral", "options": {"refinement.steps": 0, "search.rank_multiple": 4}}
MODEST = settings(deadline=None, max_examples=30, derandomize=True)
needs_onednn = pytest.mark.skipif(not product.packable(torch.ones(4, 4)), reason="this torch has no oneDNN")


@pytest.fixture
def first_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured makes no difference: layers are computed as they are stored."""
    monkeypatch.setattr(fusing, "cheapest", lambda costs: 0)
    monkeypatch.setattr(fusing, "cost_of", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(Layouts, "_fastest", staticmethod(lambda weight: RowProduct))


@pytest.fixture
def last_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are written out."""
    monkeypatch.setattr(fusing, "cheapest", lambda costs: len(costs) - 1)
    monkeypatch.setattr(fusing, "cost_of", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(Layouts, "_fastest", staticmethod(lambda weight: ColumnProduct))


@needs_onednn
@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_product_is_what_it_is_of(kind: type[Product], dtype: torch.dtype, rows: int) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(19, 37, generator=draw).to(dtype), torch.randn(19, generator=draw).to(dtype)
    x = torch.randn(2, rows, 37, generator=draw).to(dtype)
    made = kind(weight, bias)
    exact = x.double() @ weight.double().T + bias.double()
    assert torch.allclose(made(x).double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-1)
    for again in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301 - our own
        assert torch.equal(again.weight, weight)
        assert torch.equal(again(x), made(x))
    # Converted, it is the product with the converted weight.
    assert torch.equal(made.to(torch.float32).weight, weight.float())
    assert not made.state_dict()


@needs_onednn
@pytest.mark.parametrize("kind", PRODUCTS)
def test_gradients_flow_through_a_product(kind: type[Product]) -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    x = torch.ones(2, 5, requires_grad=True)
    kind(weight, None)(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.sum(dim=0).expand(2, 5))


def test_the_fastest_for_a_token_that_does_not_slow_prompts() -> None:
    assert product.cheapest([(2.0, 1.0), (1.0, 1.05), (0.5, 1.2)]) == 1
    assert product.cheapest([(2.0, 1.0)]) == 0


def test_a_layout_is_measured_once_for_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def cost(action: Any, width: int, like: Tensor) -> tuple[float, float]:
        seen.append(tuple(like.shape))
        return (1.0, 1.0) if isinstance(action, ColumnProduct) else (2.0, 1.0)

    monkeypatch.setattr(product, "cost_of", cost)
    layouts = Layouts()
    for shape in ((20, 40), (31, 33), (70, 40)):
        assert isinstance(layouts.product(torch.ones(shape), None), ColumnProduct)
    assert set(seen) == {(20, 40), (70, 40)}
    assert type(layouts.product(torch.ones(0, 40), None)) is RowProduct


def _layer(kind: str, inside: int, out: int, rank: int, bias: bool) -> nn.Module:
    layer: nn.Module
    if kind == "dense":
        layer = nn.Linear(inside, out, bias)
    elif kind == "two-factor":
        layer = LowRankLinear(inside, out, rank, bias)
    else:
        layer = PivotedLinear(inside, out, rank, bias, kind)
    draw = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in layer.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        if isinstance(layer, PivotedLinear):
            layer.order.copy_(torch.randperm(len(layer.order), generator=draw))
    return layer


KINDS = ("dense", "two-factor", "rows", "columns")


@MODEST
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(2, 9), st.integers(1, 2), st.booleans()), min_size=1, max_size=3
    ),
    st.integers(0, 2),
)
def test_a_group_computes_its_layers_in_every_form(rows: list[tuple[str, int, int, bool]], form: int) -> None:
    layers = [_layer(kind, 6, out, rank, bias) for kind, out, rank, bias in rows]
    states = [{name: tensor.detach() for name, tensor in layer.state_dict().items()} for layer in layers]
    known = [(*pieces_of(layer), MultipliedPiece) for layer in layers]
    joint = Joint([forms[min(form, len(forms) - 1)] for forms in known], layers, states, RowProduct)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        # In order, again, and backwards: what is kept for the others is right for its input only.
        for inputs in (x, x + 1, x):
            for index in (*range(len(layers)), *reversed(range(len(layers)))):
                torch.testing.assert_close(joint.output(index, inputs), layers[index](inputs), rtol=1e-9, atol=1e-9)
    for found, state in zip(joint.states(), states, strict=True):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)


def test_every_form_is_tried_above() -> None:
    def leaves(kind: type[Piece]) -> set[type[Piece]]:
        inner = kind.__subclasses__()
        return {leaf for sub in inner for leaf in leaves(sub)} if inner else {kind}

    tried = {form for kind in KINDS for form in pieces_of(_layer(kind, 6, 5, 2, True))} | {MultipliedPiece}
    assert tried == leaves(Piece)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_in_another_order(kind: str) -> None:
    layer = _layer(kind, 6, 5, 2, True)
    x, order = torch.randn(3, 6, dtype=torch.float64), torch.tensor([3, 1, 4, 0, 2])
    before = layer(x)
    layer.load_state_dict(with_outputs(layer, layer.state_dict(), order))
    torch.testing.assert_close(layer(x), before[:, order])


def test_what_is_kept_is_not_taken_for_a_changed_input() -> None:
    layers = [_layer("dense", 6, 3, 1, False) for _ in range(2)]
    joint = Joint([DensePiece] * 2, layers, [layer.state_dict() for layer in layers], RowProduct)
    x = torch.ones(1, 6, dtype=torch.float64)
    with torch.no_grad():
        joint.output(0, x)
        x.mul_(2)
        torch.testing.assert_close(joint.output(1, x), layers[1](x))


def _forms(model: nn.Module) -> list[list[str]]:
    return [[type(p).__name__ for p in m.pieces] for m in model.modules() if isinstance(m, Joint)]


def _checked(path: Path, model: Any, tmp_path: Path) -> None:
    """A fused model computes and saves what it did before, and is what it was when that is undone."""
    tokens = token_blocks(2, 12)
    plain = load_model(str(path))
    with torch.no_grad():
        exact = plain(input_ids=tokens).logits
        torch.testing.assert_close(model(input_ids=tokens).logits, exact, rtol=1e-4, atol=1e-4)
    words = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    assert torch.equal(model.generate(tokens[:, :5], **words), plain.generate(tokens[:, :5], **words))
    state, expected = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    model.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    saved = [{path.name: digest(path) for path in (tmp_path / name).iterdir()} for name in ("fused", "plain")]
    assert saved[0] == saved[1]
    bolaco.unfuse(model)
    assert {name: type(m) for name, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, exact)


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "llama", "phi3", "gpt2"))
@pytest.mark.parametrize("words", [{}, PIVOTED], ids=["two-factor", "pivoted"])
@pytest.mark.usefixtures("last_choice")
def test_a_fused_family(family: str, words: dict[str, Any], tmp_path: Path) -> None:
    path = compressed_once(family, **words).path
    model = bolaco.load(str(path), fuse=True)
    assert any(isinstance(module, FusedLinear) for module in model.modules())
    assert any(len(group) > 1 for group in _forms(model))
    _checked(path, model, tmp_path)


@pytest.mark.parametrize("multiply", [False, True])
def test_fused_as_it_is_measured(multiply: bool, tmp_path: Path) -> None:
    path = compressed_once("llama", **PIVOTED).path
    model = bolaco.fuse(bolaco.load(str(path)), multiply=multiply)
    assert [len(group) for group in _forms(model)].count(3) == 2
    assert bolaco.fuse(model) is model
    _checked(path, model, tmp_path)


@pytest.mark.usefixtures("last_choice")
def test_a_dense_model_is_fused_too() -> None:
    model, tokens = tiny_llama(), token_blocks(2, 12)
    with torch.no_grad():
        exact = model(input_ids=tokens).logits
        fused = bolaco.fuse(model)(input_ids=tokens).logits
    torch.testing.assert_close(fused, exact, rtol=1e-4, atol=1e-4)
    # q, k and v; o; gate and up; down; and the head, which is not tied.
    assert sorted(len(group) for group in _forms(model)) == [1, 1, 1, 1, 1, 2, 2, 3, 3]


def _with_columns_in_down(activation: nn.Module | None = None) -> Any:
    """A Llama with pivoted matrices, whose ``down`` has columns for pivots."""
    model = tiny_llama()
    for layer in model.model.layers:
        for name, side in (("gate_proj", "rows"), ("up_proj", "columns"), ("down_proj", "columns")):
            old = layer.mlp.get_submodule(name)
            made = _layer(side, old.in_features, old.out_features, 6, False).float()
            put_module(layer.mlp, name, made)
        if activation is not None:
            layer.mlp.act_fn = activation
    return model.eval()


class _Neighbours(nn.Module):
    """No function of each element."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, dims=-1)


@pytest.mark.usefixtures("first_choice")
@pytest.mark.parametrize("activation", [None, _Neighbours()])
def test_gate_and_up_write_in_the_order_of_down(activation: nn.Module | None) -> None:
    model, tokens = _with_columns_in_down(activation), token_blocks(2, 12)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        exact = model(input_ids=tokens).logits
        fused = bolaco.fuse(model)(input_ids=tokens).logits
    torch.testing.assert_close(fused, exact, rtol=1e-4, atol=1e-4)
    downs = [p for m in model.modules() if isinstance(m, Joint) and len(m.pieces) == 1 for p in m.pieces]
    moved = [piece.moved for piece in downs if isinstance(piece, ColumnsPiece)]
    # Where it would be wrong it is not done.
    assert moved == [activation is None] * 2
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(bolaco.unfuse(model)(input_ids=tokens).logits, exact)


@pytest.mark.usefixtures("last_choice")
def test_a_fused_model_is_converted_and_copied() -> None:
    model = bolaco.load(str(compressed_once("llama", **PIVOTED).path), fuse=True)
    tokens = token_blocks(1, 8)
    with torch.no_grad():
        exact = model(input_ids=tokens).logits
        assert torch.equal(copy.deepcopy(model)(input_ids=tokens).logits, exact)
        wide = model.double()
        torch.testing.assert_close(wide(input_ids=tokens).logits, exact.double(), rtol=1e-4, atol=1e-4)
    plain = load_model(str(compressed_once("llama", **PIVOTED).path)).double()
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in bolaco.unfuse(wide).state_dict().items())


@pytest.mark.usefixtures("last_choice")
def test_tensors_are_not_loaded_into_a_fused_model() -> None:
    model = bolaco.fuse(tiny_llama())
    with pytest.raises(RuntimeError, match=r"bolaco\.unfuse"):
        model.load_state_dict(tiny_llama().state_dict())


@pytest.mark.usefixtures("last_choice")
def test_what_cannot_be_fused_stays() -> None:
    """Matrices with hooks, and those whose weight is used elsewhere too."""
    model = tiny_llama(tie_word_embeddings=True)
    first, second = (layer.self_attn for layer in model.model.layers)
    first.q_proj.register_forward_hook(lambda *_: None)
    second.k_proj.weight = second.v_proj.weight
    bolaco.fuse(model)
    stays = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    inner = ["0.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"]
    assert stays == [*(f"model.layers.{name}" for name in inner), "lm_head"]


def test_a_model_that_cannot_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise TypeError("pixels are missing")

    model = tiny_llama()
    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(UnsupportedModelError, match="llama: cannot be run on token ids alone: pixels are missing"):
        bolaco.fuse(model)
