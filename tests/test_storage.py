"""What a storage says of itself, against what it makes: every registered one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bolaco.layers import FactoredLinear, FollowerLinear, LeadLinear, LowRankLinear, PivotedLinear
from bolaco.models.structure import Site, Stack
from bolaco.storage.storage import STORAGES, Storage
from tests.test_allocate import decoder

MODEST = settings(deadline=None, max_examples=60, derandomize=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
storages = st.sampled_from(STORAGES.names())


@dataclass(frozen=True)
class Unit:
    """What is factored as one in a storage."""

    storage: Storage
    site: Site

    def trained(self, rank: int, dtype: torch.dtype = torch.float64) -> list[FactoredLinear]:
        """Layers as they are before they are packed, one for each matrix, with random weights."""
        first, *others = self.site.members
        kind = LeadLinear if others else LowRankLinear
        lead = kind(first.in_features, first.out_features, rank, bias=True)
        layers: list[FactoredLinear] = [lead]
        for other in others:
            follower = FollowerLinear(other.in_features, other.out_features, rank, bias=True)
            follower.follow(lead)
            layers.append(follower)
        draw = torch.Generator().manual_seed(rank)
        for layer in layers:
            for parameter in layer.requires_grad_(False).parameters():
                parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(dtype)
        return layers


@st.composite
def units(draw: st.DrawFn) -> Unit:
    """A matrix or a stack of a decoder, in a storage."""
    storage = STORAGES.get(draw(storages))
    structure = decoder(1, draw(st.integers(2, 24)), draw(st.integers(1, 24)), draw(st.integers(2, 40)))
    sites = storage.units(structure, draw(st.sampled_from([(), storage.dense_types or ()]))).sites
    return Unit(storage, draw(st.sampled_from(sites)))


def weights(layer: nn.Module) -> int:
    """Parameters, biases not counted."""
    return sum(p.numel() for name, p in layer.named_parameters() if name.endswith("weight"))


def test_the_storages_there_are() -> None:
    assert set(STORAGES.names()) == {"two-factor", "pivoted", "shared"}
    for name in STORAGES.names():
        storage = STORAGES.get(name)
        assert storage.name == name
        assert storage.summary
    stacked = STORAGES.get("shared").units(decoder(1, 8, 8, 8), ()).sites
    assert [isinstance(site, Stack) for site in stacked] == [True, False, False, True, False]


@MODEST
@given(units(), st.data())
def test_cost_is_what_the_packed_layers_have(unit: Unit, data: st.DataObject) -> None:
    storage, site = unit.storage, unit.site
    top = storage.max_rank(site, 1)
    if top == 0:
        return
    rank = data.draw(st.integers(1, top))
    trained = unit.trained(rank)
    packed = [storage.pack(layer) for layer in trained]
    assert sum(weights(layer) for layer in packed) == storage.cost(site, rank) == storage.parameters(site, rank)
    for before, after in zip(trained, packed, strict=True):
        assert (after.in_features, after.out_features, after.rank) == (
            before.in_features,
            before.out_features,
            before.rank,
        )
        torch.testing.assert_close(after.dense(), before.dense(), rtol=1e-6, atol=1e-6 * float(before.dense().norm()))
        torch.testing.assert_close(after.dense_bias(), before.dense_bias(), rtol=1e-6, atol=1e-6)
    # What is stored is that and the biases, and perhaps an index, which is no parameter.
    for layer in packed:
        buffers = dict(layer.named_buffers())
        assert buffers.keys() == ({"order"} if isinstance(layer, PivotedLinear) else set())
        assert all(buffer.dtype == torch.int32 for buffer in buffers.values())


@MODEST
@given(units(), st.sampled_from(DTYPES), st.data())
def test_bits_are_what_is_on_disk(unit: Unit, dtype: torch.dtype, data: st.DataObject) -> None:
    storage, site = unit.storage, unit.site
    assert storage.bits(site, None, dtype) == 8 * dtype.itemsize * site.size
    top = storage.max_rank(site, 1)
    if top == 0:
        return
    rank = data.draw(st.integers(1, top))
    bits = storage.bits(site, rank, dtype)
    assert bits >= 8 * dtype.itemsize * storage.parameters(site, rank)
    stored = 0
    for layer in unit.trained(rank, dtype):
        packed = storage.pack(layer)
        assert {p.dtype for p in packed.parameters()} == {dtype}
        stored += 8 * sum(t.numel() * t.itemsize for name, t in packed.state_dict().items() if "bias" not in name)
        if isinstance(packed, PivotedLinear) and len(packed.order) > min(site.out_features, site.in_features):
            return  # on the larger side, where the coefficients of the smaller one would have been too large
    assert bits == stored


@MODEST
@given(units(), st.integers(1, 9))
def test_ranks_up_to_the_highest_save_parameters_and_no_higher_one_does(unit: Unit, multiple: int) -> None:
    storage, site = unit.storage, unit.site
    top = storage.max_rank(site, multiple)
    costs = [storage.cost(site, rank) for rank in range(1, top + 1)]
    assert top % multiple == 0
    assert costs == sorted(set(costs))
    assert all(0 < cost < site.size for cost in costs)
    beyond = top + multiple
    assert beyond >= min(site.out_features, site.in_features) or storage.cost(site, beyond) >= site.size
    assert storage.parameters(site, None) == site.size


@MODEST
@given(units(), st.integers(1, 9), st.lists(st.floats(1e-4, 1.2), min_size=2, max_size=6))
def test_rank_for_spends_the_share_and_no_more(unit: Unit, multiple: int, keeps: list[float]) -> None:
    storage, site = unit.storage, unit.site
    top = storage.max_rank(site, multiple)
    found = [storage.rank_for(site, keep, multiple) for keep in sorted(keeps)]
    # More is never worse, and dense is most.
    sizes = [site.size if rank is None else rank for rank in found]
    assert sizes == sorted(sizes)
    for keep, rank in zip(sorted(keeps), found, strict=True):
        if keep >= 1 or top == 0:
            assert rank is None
            continue
        assert rank is not None
        assert rank % multiple == 0
        assert multiple <= rank <= top
        allowed = keep * site.size + 1e-5
        assert storage.cost(site, rank) <= allowed or rank == multiple
        assert rank == top or storage.cost(site, rank + multiple) > allowed


def test_two_factors_are_left_as_they_are_and_others_are_left_alone() -> None:
    """Packing makes a new layer or none; what it is given stays what it was."""
    layer = LowRankLinear(9, 7, 3, bias=True)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for name in STORAGES.names():
        packed = STORAGES.get(name).pack(layer)
        assert (packed is layer) == (name != "pivoted")
        assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())
    with torch.no_grad():
        x = torch.randn(5, 9)
        torch.testing.assert_close(STORAGES.get("pivoted").pack(layer)(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["two-factor", "pivoted"])
def test_units_are_the_matrices_where_nothing_is_stacked(name: str) -> None:
    structure = decoder(2, 8, 4, 12)
    assert STORAGES.get(name).units(structure, ("v",)) is structure
