"""The layers of a compressed model: what they compute, and how an entry of the configuration describes them."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bolaco.layers
from bolaco.layers import (
    BUILDERS,
    FactoredLinear,
    FollowerLinear,
    LeadLinear,
    LowRankLinear,
    PivotedLinear,
    SketchLinear,
    SplitLinear,
    build_layer,
)

# At full rank nothing is left to be made from the pivots.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
MODEST = settings(deadline=None, max_examples=40, derandomize=True)


@dataclass(frozen=True)
class Shape:
    """Of a factored layer."""

    inside: int
    out: int
    rank: int
    bias: bool


def _two_factor(s: Shape) -> nn.ModuleDict:
    return nn.ModuleDict({"it": LowRankLinear(s.inside, s.out, s.rank, s.bias)})


def _lead(s: Shape) -> nn.ModuleDict:
    return nn.ModuleDict({"it": LeadLinear(s.inside, s.out, s.rank, s.bias)})


def _follower(s: Shape) -> nn.ModuleDict:
    lead = LeadLinear(s.inside, 3, s.rank, bias=False)
    model = nn.ModuleDict({"lead": lead, "it": FollowerLinear(s.inside, s.out, s.rank, s.bias, "lead")})
    model["it"].connect(model)
    return model


def _pivoted(side: str, s: Shape) -> nn.ModuleDict:
    layer = PivotedLinear(s.inside, s.out, s.rank, s.bias, side)
    layer.order.copy_(torch.randperm(len(layer.order), generator=torch.Generator().manual_seed(s.rank)))
    return nn.ModuleDict({"it": layer})


# Kind, and side where there are two -> a model whose module "it" is of that kind, and has all that it refers to.
MAKE = {
    "two-factor": _two_factor,
    "lead": _lead,
    "follower": _follower,
    "pivoted rows": lambda s: _pivoted("rows", s),
    "pivoted columns": lambda s: _pivoted("columns", s),
}
kinds = st.sampled_from(sorted(MAKE))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    inside, out = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    return Shape(inside, out, draw(st.integers(1, min(inside, out))), draw(st.booleans()))


def factored(kind: str, shape: Shape) -> tuple[nn.ModuleDict, FactoredLinear]:
    """A model in float64 with random weights, and the layer in it."""
    model = MAKE[kind](shape).double()
    draw = torch.Generator().manual_seed(shape.inside * 31 + shape.out)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model, model["it"]


def inputs(shape: Shape) -> Tensor:
    return torch.randn(2, 3, shape.inside, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_every_factored_kind_is_tried() -> None:
    classes = [value for _, value in inspect.getmembers(bolaco.layers, inspect.isclass)]
    ours = {c.kind for c in classes if issubclass(c, FactoredLinear) and c is not FactoredLinear}
    assert ours == {name.split()[0] for name in MAKE}
    assert {factored(name, Shape(5, 4, 2, True))[1].kind for name in MAKE} == ours
    assert set(BUILDERS) >= ours


@MODEST
@given(kinds, shapes())
def test_factors_multiply_to_the_matrix(kind: str, shape: Shape) -> None:
    _, layer = factored(kind, shape)
    expand, reduce = layer.factors()
    assert expand.shape == (shape.out, shape.rank)
    assert reduce.shape == (shape.rank, shape.inside)
    assert layer.dense().shape == (shape.out, shape.inside)
    close(layer.dense(), expand @ reduce)


@MODEST
@given(kinds, shapes())
def test_it_computes_with_the_matrix_and_the_bias(kind: str, shape: Shape) -> None:
    _, layer = factored(kind, shape)
    x, bias = inputs(shape), layer.dense_bias()
    assert (bias is not None) == shape.bias
    expected = x @ layer.dense().T + (0 if bias is None else bias)
    close(layer(x), expected)
    close(layer(x[0, 0]), expected[0, 0])


@MODEST
@given(kinds, shapes())
def test_its_entry_makes_it_again(kind: str, shape: Shape) -> None:
    model, layer = factored(kind, shape)
    entry = layer.entry()
    assert json.loads(json.dumps(entry)) == entry
    assert entry["kind"] == layer.kind
    again = build_layer(shape.inside, entry)
    assert type(again) is type(layer)
    assert isinstance(again, FactoredLinear)
    assert (again.in_features, again.out_features, again.rank) == (shape.inside, shape.out, shape.rank)
    again.double().load_state_dict(layer.state_dict())
    again.connect(model)
    close(again(inputs(shape)), layer(inputs(shape)))
    assert again.entry() == entry
    # What a model is printed as says what it is.
    assert f"in_features={shape.inside}, out_features={shape.out}, rank={shape.rank}" in repr(again)


@MODEST
@given(kinds, shapes())
def test_it_consists_of_linears(kind: str, shape: Shape) -> None:
    _, layer = factored(kind, shape)
    linears = layer.linears()
    assert linears == dict(layer.named_children())
    assert all(type(linear) is nn.Linear for linear in linears.values())
    # They hold all of its parameters, those of a lead only in the lead.
    assert sum(p.numel() for linear in linears.values() for p in linear.parameters()) == sum(
        p.numel() for p in layer.parameters()
    )
    # One that became something else is no Linear of its any more.
    name = next(iter(linears))
    changed = copy.deepcopy(layer)
    setattr(changed, name, nn.Identity())
    assert changed.linears().keys() == linears.keys() - {name}


@MODEST
@given(kinds, shapes())
def test_only_what_is_made_of_pivots_grows(kind: str, shape: Shape) -> None:
    _, layer = factored(kind, shape)
    if isinstance(layer, PivotedLinear):
        coefficients = layer.rest.weight.detach().abs()
        assert layer.growth() == (float(coefficients.max()) if coefficients.numel() else 0.0)
    else:
        assert layer.growth() is None


def test_layers_inside_layers() -> None:
    """A split projection whose parts are of different kinds, and one of its parts coded."""
    parts = [
        {"name": "up", "kind": "two-factor", "out": 6, "rank": 2, "bias": True},
        {"name": "gate", "kind": "dense", "out": 4, "bias": False},
        {"name": "q", "kind": "sketch", "bits": 2, "groups": 3, "layer": {"kind": "dense", "out": 5, "bias": True}},
        {
            "name": "v",
            "kind": "sketch",
            "bits": 2,
            "groups": 1,
            "layer": {"kind": "lead", "out": 3, "rank": 2, "bias": False},
        },
    ]
    layer = build_layer(8, {"kind": "split", "parts": parts})
    assert isinstance(layer, SplitLinear)
    assert [type(part) for part in layer.parts.values()] == [LowRankLinear, nn.Linear, SketchLinear, LeadLinear]
    assert list(layer.parts) == ["up", "gate", "q", "v"]
    coded = layer.parts["v"]
    assert isinstance(coded, FactoredLinear)
    assert {type(child) for child in coded.children()} == {SketchLinear}
    assert coded.linears() == {}
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), torch.cat([part(x) for part in layer.parts.values()], dim=-1))


def test_an_unknown_kind_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^unknown kind of layer 'cubic'; known are dense, .*two-factor[^\n]*$"):
        build_layer(4, {"kind": "cubic", "out": 4, "bias": False})
    with pytest.raises(ValueError, match="unknown kind of layer None"):
        build_layer(4, {"out": 4, "bias": False})
