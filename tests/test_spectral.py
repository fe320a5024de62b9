"""The closed-form allocation against brute force on small cases."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bolaco.allocate import Budget
from bolaco.allocate.spectral import make_menu, spectral_ranks
from bolaco.errors import BudgetError
from bolaco.models import Site


def _site(name, out, inside):
    return Site(name, name, 0, "q", None, (0, out), out, inside, False)


def _spectra(sites, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        s.name: torch.rand(min(s.out_features, s.in_features), generator=generator).double().sort(descending=True)[0]
        ** (1 + 3 * i)
        for i, s in enumerate(sites)
    }


def _error(sites, spectra, ranks):
    return sum(0.0 if ranks[s.name] is None else float(spectra[s.name][ranks[s.name] :].sum()) for s in sites)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(4, 12), st.integers(4, 12)), min_size=1, max_size=3),
    st.integers(0, 10**6),
    st.floats(0.4, 1.0),
    st.sampled_from(["two-factor", "pivoted"]),
)
def test_close_to_brute_force_and_within_budget(shapes, seed, keep, storage):
    sites = [_site(f"m{i}", *shape) for i, shape in enumerate(shapes)]
    spectra = _spectra(sites, seed)
    budget = Budget(sites, round(keep, 3), storage)
    menus = [make_menu(s, spectra[s.name], 1, storage, False) for s in sites]
    best = None
    for choice in itertools.product(*(range(len(m.ranks)) for m in menus)):
        ranks = {s.name: m.ranks[i] for s, m, i in zip(sites, menus, choice)}
        if budget.cost(ranks) <= budget.limit:
            error = _error(sites, spectra, ranks)
            best = error if best is None or error < best else best
    if best is None:
        with pytest.raises(BudgetError):
            spectral_ranks(sites, spectra, budget, 1)
        return
    ranks = spectral_ranks(sites, spectra, budget, 1)
    assert budget.cost(ranks) <= budget.limit
    # A single price cannot reach every allocation (a knapsack); what it misses is at most one step of one matrix.
    steps = [float(s.max()) * len(s) for s in spectra.values()]
    assert best - 1e-9 <= _error(sites, spectra, ranks) <= best + max(steps)
    # No affordable improvement is left.
    left = budget.limit - budget.cost(ranks)
    for menu, site in zip(menus, sites):
        now = menu.ranks.index(ranks[site.name])
        extra = menu.costs - menu.costs[now]
        assert not ((extra > 0) & (extra <= left) & (menu.errors <= menu.errors[now])).any()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(0, 10**6), st.floats(0.45, 0.95))
def test_optimal_for_the_parameters_it_uses(seed, keep):
    """A price's allocation is never beaten by another one with no more parameters (before the rest is spent)."""
    sites = [_site("a", 9, 7), _site("b", 6, 10)]
    spectra = _spectra(sites, seed)
    budget = Budget(sites, round(keep, 3), "pivoted")
    menus = [make_menu(s, spectra[s.name], 1, "pivoted", False) for s in sites]
    for price in (0.001, 0.01, 0.1):
        choice = [m.choose(price) for m in menus]
        cost = sum(int(m.costs[i]) for m, i in zip(menus, choice))
        error = sum(float(m.errors[i]) for m, i in zip(menus, choice))
        for other in itertools.product(*(range(len(m.ranks)) for m in menus)):
            if sum(int(m.costs[i]) for m, i in zip(menus, other)) <= cost:
                assert sum(float(m.errors[i]) for m, i in zip(menus, other)) >= error - 1e-12
    assert budget.total == 123


def test_keeps_sensitive_matrices_dense():
    sites = [_site("loud", 32, 32), _site("quiet", 32, 32)]
    spectra = {"loud": torch.full((32,), 10.0), "quiet": torch.logspace(0, -6, 32)}
    ranks = spectral_ranks(sites, spectra, Budget(sites, 0.75), 4)
    assert ranks["loud"] is None
    assert ranks["quiet"] is not None


def test_sites_without_spectrum_stay_dense():
    sites = [_site("a", 32, 32), _site("b", 32, 32)]
    ranks = spectral_ranks(sites, {"a": torch.logspace(0, -6, 32)}, Budget(sites, 0.75), 4)
    assert ranks["b"] is None
    assert ranks["a"] is not None


def test_impossible_budget_names_the_numbers():
    sites = [_site("a", 32, 32)]
    with pytest.raises(BudgetError, match=r"102 parameters .* has 256"):
        spectral_ranks(sites, {"a": torch.ones(32)}, Budget(sites, 0.1), 4)
