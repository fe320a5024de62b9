"""Budgets, search spaces, proposals and the ledger of the search (arXiv 2405.10616, sections 3.2, 4 and 5.4)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from bolaco.allocate.allocator import ALLOCATORS
from bolaco.allocate.allocators.hand import hand_keeps
from bolaco.allocate.space import SearchSpace, make_space
from bolaco.errors import BudgetError, RecipeError
from bolaco.models.find import inspect_structure, meta_model
from bolaco.models.structure import Site, Structure
from bolaco.runs.warm import warm_ranks
from bolaco.storage.budget import Budget, Ranks
from bolaco.storage.storage import STORAGES
from tests.models import compressed, compressed_once, tiny_llama, tiny_recipe

TWO_FACTOR = STORAGES.get("two-factor")

MODEST = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])


def decoder(layers: int, hidden: int, kv: int, ffn: int, gate: bool = True) -> Structure:
    """Sites of a decoder, without a model."""
    shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    shapes |= ({"gate": (ffn, hidden)} if gate else {}) | {"up": (ffn, hidden), "down": (hidden, ffn)}
    sites = [
        Site(f"model.layers.{i}.{kind}", f"layers.{i}.{kind}", i, kind, None, (0, rows), rows, columns, False)
        for i in range(layers)
        for kind, (rows, columns) in shapes.items()
    ]
    return Structure(tuple(f"layers.{i}" for i in range(layers)), tuple(sites))


SMOLLM2 = decoder(30, 576, 192, 1536)
LLAMA2 = decoder(32, 4096, 4096, 11008)
SMALL = decoder(4, 64, 32, 128)


def small_space(keep: float = 0.7, **options: object) -> SearchSpace:
    return make_space(SMALL, Budget(SMALL.sites, keep, TWO_FACTOR), **({"multiple": 4} | options))


def site(rows: int, columns: int) -> Site:
    return Site("m", "m", 0, "o", None, (0, rows), rows, columns, False)


# --- parameters and ranks


@MODEST
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 16))
def test_max_rank_is_the_last_multiple_that_saves_anything(rows: int, columns: int, multiple: int) -> None:
    one = site(rows, columns)
    top = TWO_FACTOR.max_rank(one, multiple)
    assert top % multiple == 0
    assert TWO_FACTOR.cost(one, top) < one.size <= TWO_FACTOR.cost(one, top + multiple)


@MODEST
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 16), st.floats(1e-3, 1.2))
def test_rank_for_is_the_paper_s_rounded_down(rows: int, columns: int, multiple: int, keep: float) -> None:
    one = site(rows, columns)
    rank, top = TWO_FACTOR.rank_for(one, keep, multiple), TWO_FACTOR.max_rank(one, multiple)
    if keep >= 1 or top == 0:
        assert rank is None
        return
    assert rank is not None
    assert rank % multiple == 0
    assert multiple <= rank <= top
    exact = Fraction(keep) * rows * columns / (rows + columns)
    assert rank <= exact + Fraction(1, 10**6) or rank == multiple
    assert rank + multiple > exact - Fraction(1, 10**6) or rank == top


@MODEST
@given(st.integers(2, 300), st.integers(2, 300), st.integers(1, 16), st.sampled_from(STORAGES.names()))
def test_the_ratio_of_a_rank_gives_the_rank_back(rows: int, columns: int, multiple: int, name: str) -> None:
    one, storage = site(rows, columns), STORAGES.get(name)
    for rank in range(multiple, storage.max_rank(one, multiple) + 1, multiple):
        assert storage.rank_for(one, storage.parameters(one, rank) / one.size, multiple) == rank


def test_parameters_of_the_dense_matrix_leave_the_bias_out() -> None:
    one = replace(site(6, 4), bias=True)
    assert TWO_FACTOR.parameters(one, None) == 24
    assert TWO_FACTOR.parameters(one, 2) == 20


def test_the_limit_is_exact_in_decimals() -> None:
    for keep, size, limit in [
        (0.8, 10, 8),
        (0.7, 10, 7),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (1, 10, 10),
        (1e-05, 10, 0),
    ]:
        assert Budget([site(size, 1)], keep, TWO_FACTOR).limit == limit
    assert math.floor(0.29 * 100) == 28  # what binary arithmetic would say
    assert Budget([site(10, 1)], 0.1 + 0.2, TWO_FACTOR).limit == 3


@pytest.mark.parametrize("keep", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_keep_outside_its_range_is_refused(keep: float) -> None:
    with pytest.raises(BudgetError, match=f"keep must be in .0, 1., got {keep}"):
        Budget(SMALL.sites, keep, TWO_FACTOR)


def test_cost_counts_matrices_not_named_as_dense() -> None:
    budget = Budget(SMALL.sites, 0.8, TWO_FACTOR)
    assert budget.cost({}) == budget.total == sum(s.size for s in SMALL.sites)
    first = SMALL.sites[0]
    assert budget.cost({first.name: 8}) == budget.total - first.size + 8 * (first.out_features + first.in_features)
    assert budget.ratio({}) == 1


# --- the published figures


def published(ranks: dict[str, Sequence[int | None]], structure: Structure) -> Ranks:
    """Ranks per type, in equal runs of layers."""
    kinds = {"q": "qk", "k": "qk"}
    return {
        s.name: values[s.layer * len(values) // structure.num_layers]
        for s in structure.sites
        for values in [ranks.get(kinds.get(s.type, s.type), [None])]
    }


def test_accounting_gives_the_published_sizes() -> None:
    budget = Budget(LLAMA2.sites, 0.8, TWO_FACTOR)
    assert budget.total == pytest.approx(6.476e9, rel=1e-4)
    assert 6.738e9 - 0.2 * budget.total == pytest.approx(5.44e9, rel=1e-3)
    five_by_one = {"qk": [744], "o": [1616], "gate": [2512], "up": [2408]}
    assert budget.ratio(published(five_by_one, LLAMA2)) == pytest.approx(0.7985, abs=5e-5)
    by_quarter = [
        (680, 1728, 2960, None, None),
        (968, 1888, 2536, 2640, 2632),
        (408, 1488, None, 2272, 2864),
        (656, 496, 2824, 2448, 2280),
    ]
    five_by_four = dict(zip(("qk", "o", "gate", "up", "down"), map(list, zip(*by_quarter)), strict=True))
    ratio = budget.ratio(published(five_by_four, LLAMA2))
    assert 0.7 <= ratio <= 0.8


def test_the_real_configuration_gives_the_same_sites() -> None:
    found = inspect_structure(meta_model(LlamaConfig()))
    assert [(s.type, s.layer, s.out_features, s.in_features) for s in found.sites] == [
        (s.type, s.layer, s.out_features, s.in_features) for s in LLAMA2.sites
    ]


@pytest.mark.parametrize(("keep", "attention"), [(0.8, 0.7), (0.7, 0.55)])
@pytest.mark.parametrize("parts", [1, 4])
def test_the_hand_allocation_is_the_paper_s(keep: float, attention: float, parts: int) -> None:
    space = make_space(LLAMA2, Budget(LLAMA2.sites, keep, TWO_FACTOR), parts)
    by_name = dict(zip(space.names, hand_keeps(space), strict=True))
    for name, value in by_name.items():
        assert value == pytest.approx(attention if name.startswith("qk") else keep)
    ranks = space.ranks(space.settle(hand_keeps(space), fill=False))
    for one in LLAMA2.sites:
        wanted = None if one.type == "v" else attention if one.type in "qk" else keep
        assert ranks[one.name] == (None if wanted is None else TWO_FACTOR.rank_for(one, wanted, 8))


def test_the_hand_allocation_of_smollm2_unfilled() -> None:
    space = make_space(SMOLLM2, Budget(SMOLLM2.sites, 0.8, TWO_FACTOR), fill=False)
    ranks = space.ranks(space.settle(hand_keeps(space)))
    assert space.budget.ratio(ranks) == pytest.approx(0.7773, abs=5e-5)
    assert all(ranks[s.name] is None for s in SMOLLM2.sites if s.type == "v")
    filled = make_space(SMOLLM2, Budget(SMOLLM2.sites, 0.8, TWO_FACTOR))
    assert 0.798 < filled.budget.ratio(filled.ranks(filled.settle(hand_keeps(filled)))) <= 0.8


def test_the_hand_allocation_stays_within_bounds() -> None:
    for keep in (0.3, 0.45, 0.95, 1.0):
        space = make_space(LLAMA2, Budget(LLAMA2.sites, keep, TWO_FACTOR), min_keep=0.15)
        assert all(0.15 <= value <= 1 for value in hand_keeps(space))


# --- spaces


def test_5x1_shares_by_type_and_5x4_by_type_and_quarter() -> None:
    budget = Budget(SMOLLM2.sites, 0.8, TWO_FACTOR)
    one = make_space(SMOLLM2, budget, parts=1)
    assert one.names == ["qk", "o", "gate", "up", "down"]
    assert {s.type for s in one.dimensions[0].sites} == {"q", "k"}
    assert len(one.dimensions[0].sites) == 60
    four = make_space(SMOLLM2, budget, parts=4)
    assert len(four.dimensions) == 20
    assert four.names[:6] == ["qk/1", "o/1", "gate/1", "up/1", "down/1", "qk/2"]
    runs = [sorted({s.layer for s in d.sites}) for d in four.dimensions if d.name.startswith("o/")]
    assert [layer for run in runs for layer in run] == list(range(30))
    assert {len(run) for run in runs} == {7, 8}
    even = make_space(LLAMA2, Budget(LLAMA2.sites, 0.8, TWO_FACTOR), parts=4)
    assert [{s.layer for s in d.sites} for d in even.dimensions[::5]] == [
        set(range(8 * part, 8 * part + 8)) for part in range(4)
    ]


def test_spaces_follow_the_types_there_are() -> None:
    gpt2 = decoder(12, 768, 768, 3072, gate=False)
    budget = Budget(gpt2.sites, 0.8, TWO_FACTOR)
    assert make_space(gpt2, budget).names == ["qk", "o", "up", "down"]
    assert len(make_space(gpt2, budget, parts=4).dimensions) == 16
    assert make_space(gpt2, budget, dense_types=()).names == ["qk", "v", "o", "up", "down"]
    assert make_space(gpt2, budget, dense_types=("q", "o", "v")).names == ["qk", "up", "down"]
    with pytest.raises(RecipeError, match=r"search\.dense_types: unknown type 'value'"):
        make_space(gpt2, budget, dense_types=("v", "value"))


def test_matrices_too_small_to_factor_stay_dense() -> None:
    structure = decoder(2, 64, 8, 128)  # k is 8 x 64: rank 8 would cost more than the matrix
    space = make_space(structure, Budget(structure.sites, 0.7, TWO_FACTOR))
    assert {s.type for d in space.dimensions for s in d.sites} == {"q", "o", "gate", "up", "down"}
    ranks = space.ranks(space.settle([0.5] * 5))
    assert all(ranks[s.name] is None for s in structure.sites if s.type in "kv")


def test_an_infeasible_budget_is_refused_with_both_numbers() -> None:
    budget = Budget(SMOLLM2.sites, 0.2, TWO_FACTOR)
    with pytest.raises(BudgetError) as caught:
        make_space(SMOLLM2, budget)
    lowest = sum(
        TWO_FACTOR.parameters(s, None if s.type == "v" else TWO_FACTOR.rank_for(s, 0.2, 8)) for s in SMOLLM2.sites
    )
    assert f"{budget.limit:,}" in str(caught.value)
    assert f"{lowest:,}" in str(caught.value)
    assert "min_keep" in str(caught.value)
    # One more parameter decides.
    exactly = replace_limit(make_space(SMOLLM2, Budget(SMOLLM2.sites, 0.5, TWO_FACTOR)), lowest)
    assert exactly.settle([1.0] * 5) == (0,) * 5
    with pytest.raises(BudgetError):
        replace_limit(exactly, lowest - 1)


def replace_limit(space: SearchSpace, limit: int) -> SearchSpace:
    """The space under a budget of exactly ``limit`` parameters."""
    budget = Budget(space.budget.sites.values(), limit / space.budget.total, space.budget.storage)
    budget.limit = limit
    return SearchSpace(space.dimensions, budget, space.fill, space.min_keep)


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    structure = decoder(
        draw(st.integers(1, 9)),
        draw(st.integers(3, 60)),
        draw(st.integers(2, 60)),
        draw(st.integers(3, 120)),
        draw(st.booleans()),
    )
    try:
        return make_space(
            structure,
            Budget(structure.sites, draw(st.floats(0.15, 1)), STORAGES.get(draw(st.sampled_from(STORAGES.names())))),
            draw(st.sampled_from([1, 4])),
            draw(st.sampled_from([("v",), (), ("v", "o"), ("q", "v")])),
            draw(st.integers(1, 8)),
            draw(st.floats(0.05, 0.5)),
            draw(st.booleans()),
        )
    except BudgetError:
        assume(False)
        raise


@st.composite
def proposals(draw: st.DrawFn) -> tuple[SearchSpace, list[float]]:
    space = draw(spaces())
    count = len(space.dimensions)
    return space, draw(st.lists(st.floats(0, 1.1), min_size=count, max_size=count))


@MODEST
@given(proposals())
def test_settling_spends_the_budget_and_never_more(case: tuple[SearchSpace, list[float]]) -> None:
    space, proposal = case
    budget = space.budget
    levels = space.settle(proposal)
    cost = budget.cost(space.ranks(levels))
    assert cost == space.fixed + sum(d.levels[i].cost for d, i in zip(space.dimensions, levels, strict=True))
    assert cost <= budget.limit
    if space.fill:
        for dimension, level in zip(space.dimensions, levels, strict=True):
            if level + 1 < len(dimension.levels):
                assert cost + dimension.levels[level + 1].cost - dimension.levels[level].cost > budget.limit
    lowered = space.settle(proposal, fill=False)
    assert budget.cost(space.ranks(lowered)) <= budget.limit
    rounded = tuple(d.at(keep) for d, keep in zip(space.dimensions, proposal, strict=True))
    assert all(a <= b for a, b in zip(lowered, rounded, strict=True))
    if budget.cost(space.ranks(rounded)) <= budget.limit:
        assert lowered == rounded
    for dimension, level, keep in zip(space.dimensions, rounded, proposal, strict=True):
        assert level == 0 or dimension.levels[level].keep <= keep + 1e-9


@MODEST
@given(proposals())
def test_an_allocation_s_ratios_lead_back_to_it(case: tuple[SearchSpace, list[float]]) -> None:
    # A warm start resumes where the other run ended, and the search knows what it has tried.
    space, proposal = case
    levels = space.settle(proposal)
    assert space.settle(space.keeps(levels)) == levels
    assert space.keeps_of(space.ranks(levels)) == pytest.approx(space.keeps(levels), abs=1e-12)
    assert space.settle(space.keeps_of(space.ranks(levels))) == levels


@MODEST
@given(spaces())
def test_levels_rise_from_the_lowest_ratio_to_dense(space: SearchSpace) -> None:
    for dimension in space.dimensions:
        assert all(rank is None for rank in dimension.levels[-1].ranks)
        assert dimension.levels[-1].keep == 1
        costs = [level.cost for level in dimension.levels]
        assert costs == sorted(set(costs))
        for level in dimension.levels:
            by_site = zip(dimension.sites, level.ranks, strict=True)
            assert level.cost == sum(space.budget.storage.parameters(s, rank) for s, rank in by_site)
            assert level.keep == level.cost / dimension.size
        shapes = {(s.out_features, s.in_features) for s in dimension.sites}
        if len(shapes) == 1:  # one level per multiple, from the lowest ratio on
            ranks = [level.ranks[0] for level in dimension.levels[:-1]]
            first = dimension.sites[0]
            step = ranks[0] if len(ranks) == 1 else ranks[1] - ranks[0]
            assert ranks == list(range(ranks[0], ranks[-1] + 1, step))
            assert ranks[0] == space.budget.storage.rank_for(first, space.min_keep, step) or len(ranks) == 1


def test_repair_lowers_what_is_furthest_above_its_proposal() -> None:
    space = small_space(0.6, fill=False)
    levels = space.settle([1.0, 0.5, 0.5, 0.5, 0.5])
    assert levels[1:] == tuple(d.at(0.5) for d in space.dimensions[1:])
    # All alike and too much: all are lowered about alike.
    keeps = space.keeps(space.settle([1.0] * 5))
    assert max(keeps) - min(keeps) < 0.15


@pytest.mark.parametrize(
    ("theirs", "ours", "named"),
    [
        ("gpt2", "llama", r"that result has no rank for model\.layers\.0\.self_attn\.q_proj"),
        ("shallow", "llama", r"that result has no rank for model\.layers\.1\."),
        ("llama", "shallow", r"this model has no matrix model\.layers\.1\."),
    ],
)
def test_a_warm_start_of_another_architecture_is_refused(theirs: str, ours: str, named: str) -> None:
    start, run = (compressed_once("llama", 1) if name == "shallow" else compressed(name) for name in (theirs, ours))
    recipe = tiny_recipe(search="spectral", warm_start=str(start.path))
    structure = inspect_structure(run.original)
    with pytest.raises(RecipeError, match=rf"search\.warm_start: {named}.*; it is of another architecture"):
        warm_ranks(recipe, Budget(structure.sites, 0.7, TWO_FACTOR))


@pytest.mark.parametrize("search", [name for name in ALLOCATORS.names() if ALLOCATORS.get(name).warms])
@pytest.mark.parametrize("sizes", [{"hidden_size": 48}, {"intermediate_size": 64}, {"num_key_value_heads": 4}])
def test_a_warm_start_of_other_widths_is_refused(search: str, sizes: dict[str, int]) -> None:
    """Also where the names are the same, and every rank would be allowed."""
    recipe = tiny_recipe(search=search, warm_start=str(compressed("llama").path))
    sites = inspect_structure(tiny_llama(**sizes)).sites
    with pytest.raises(RecipeError, match=r"search\.warm_start: .* is \d+ x \d+ in that result and \d+ x \d+ in this"):
        warm_ranks(recipe, Budget(sites, 0.7, TWO_FACTOR))


@pytest.mark.parametrize("family", ["phi3", "gpt2", "opt"])
def test_a_warm_start_of_the_same_architecture(family: str) -> None:
    run = compressed(family)
    recipe = tiny_recipe(search="spectral", warm_start=str(run.path))
    assert warm_ranks(recipe, Budget(inspect_structure(run.original).sites, 0.9, TWO_FACTOR)) == run.info.ranks


def test_a_warm_start_that_the_recipe_does_not_allow_is_refused() -> None:
    run = compressed("llama")
    structure = inspect_structure(run.original)
    budget = Budget(structure.sites, 0.7, TWO_FACTOR)

    def ranks(**options: object) -> Ranks | None:
        recipe = tiny_recipe(search="spectral", warm_start=str(run.path), options=options)
        return warm_ranks(recipe, budget)

    assert ranks() == run.info.ranks
    assert warm_ranks(tiny_recipe(search="spectral"), budget) is None
    first = next(site for site in structure.sites if run.info.ranks[site.name] is not None)
    named = rf"{re.escape(first.name)} rank {run.info.ranks[first.name]}, which this recipe does not allow"
    for options in ({"search.dense_types": [first.type]}, {"search.rank_multiple": 64}):
        with pytest.raises(RecipeError, match=named):
            ranks(**options)


def test_warm_start_carries_over_to_the_other_layout() -> None:
    one, four = small_space(), small_space(parts=4)
    ranks = one.ranks(one.settle([0.5, 0.6, 0.7, 0.8, 0.6]))
    assert four.ranks(four.settle(four.keeps_of(ranks), fill=False)) == ranks
