"""Pivoted storage: the same product, fewer numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bolaco.allocate.search.elastic import ElasticModel
from bolaco.checkpoint.export import export_dense
from bolaco.layers import PivotedLinear
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model
from bolaco.models.subject import Subject
from bolaco.storage.pivot import pivot
from tests.models import FAMILIES, compress_tiny, slow, token_blocks


def _product(out, inside, rank, seed=0, decay=0.0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -decay, rank)
    return torch.randn(out, rank, generator=generator) * scales, torch.randn(rank, inside, generator=generator)


def _layer(expand, reduce, bias):
    form = pivot(expand, reduce)
    layer = PivotedLinear(reduce.shape[1], expand.shape[0], reduce.shape[0], bias is not None, form.side)
    layer.load_state_dict(form.state(bias))
    return layer.requires_grad_(False), form


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(2, 60), st.integers(2, 60), st.data(), st.booleans(), st.floats(0, 4))
def test_equals_the_two_factors(out, inside, data, biased, decay):
    rank = data.draw(st.integers(1, min(out, inside) - 1))
    expand, reduce = _product(out, inside, rank, seed=out * 61 + inside, decay=decay)
    bias = torch.randn(out, generator=torch.Generator().manual_seed(3)) if biased else None
    layer, _ = _layer(expand, reduce, bias)
    x = torch.randn(7, inside, generator=torch.Generator().manual_seed(4))
    exact = x.double() @ (expand.double() @ reduce.double()).T + (0 if bias is None else bias.double())
    assert float((layer(x).double() - exact).norm()) <= 1e-5 * float(exact.norm())
    weights = sum(p.numel() for name, p in layer.named_parameters() if name.endswith("weight"))
    assert weights == rank * (out + inside - rank) < out * inside
    folded = x @ layer.dense().T + (0 if bias is None else layer.dense_bias())
    assert float((folded.double() - exact).norm()) <= 1e-5 * float(exact.norm())


def test_index_on_the_smaller_side():
    assert _layer(*_product(20, 50, 8), None)[1].side == "rows"
    assert _layer(*_product(50, 20, 8), None)[1].side == "columns"


def test_coefficients_stay_small_where_rows_are_nearly_dependent():
    expand, reduce = _product(80, 200, 30, decay=6)
    expand[1:40] = expand[:1] + 1e-3 * expand[1:40]
    layer, form = _layer(expand, reduce, None)
    assert form.growth < 10
    x = torch.randn(50, 200, generator=torch.Generator().manual_seed(4))
    exact = x.double() @ (expand.double() @ reduce.double()).T
    assert float((layer(x).double() - exact).norm()) <= 1e-5 * float(exact.norm())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_half_precision_is_that_of_the_factors(shape):
    expand, reduce = _product(*shape, 12)
    layer, _ = _layer(expand.bfloat16(), reduce.bfloat16(), None)
    layer = layer.bfloat16()
    x = torch.randn(50, shape[1], generator=torch.Generator().manual_seed(4)).bfloat16()
    exact = x.double() @ (expand.bfloat16().double() @ reduce.bfloat16().double()).T
    assert float((layer(x).double() - exact).norm()) <= 0.02 * float(exact.norm())


@pytest.mark.parametrize("family", [slow("llama"), "phi3", "gpt2", slow("opt"), slow("gemma2")])
def test_checkpoint(family, tmp_path):
    """Two-sided factors, closed-form ranks, pivoted storage, through the whole pipeline and back."""
    values = {"keep": 0.7, "search": "spectral", "method": "kfac", "storage": "pivoted"}
    run = compress_tiny(FAMILIES[family](), tmp_path / "out", **values)
    model = load_model(str(run.path))
    layers = [m for m in model.modules() if isinstance(m, PivotedLinear)]
    assert layers
    assert run.info.parameters == sum(p.numel() for p in model.parameters())
    assert run.info.keep_linears <= 0.7
    blocks = model.base_model.get_submodule(inspect_structure(run.original).stack)
    assert run.info.parameters_linears == sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    # What was searched, two factors sliced, and what was written compute the same.
    structure = inspect_structure(run.original)
    tokens = token_blocks(2, 24)
    with ElasticModel(Subject(run.original, structure), run.factors) as elastic, torch.no_grad():
        elastic.set_ranks(run.info.ranks)
        expected = run.original(tokens, use_cache=False).logits
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    assert float((logits - expected).norm()) <= 1e-4 * float(expected.norm())
    with_cache = model.generate(tokens[:1], max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(with_cache, model.generate(tokens[:1], max_new_tokens=8, do_sample=False, use_cache=False))
    if family != "gemma2":  # has no place for the biases
        export_dense(str(run.path), tmp_path / "dense", drop_bias=family == "phi3")
        stock = load_model(str(tmp_path / "dense"))
        assert not any(isinstance(m, PivotedLinear) for m in stock.modules())
        if family != "phi3":
            with torch.no_grad():
                again = stock(tokens, use_cache=False).logits
            assert float((again - logits).norm()) <= 1e-4 * float(logits.norm())
