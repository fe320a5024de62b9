"""The closed-form allocation against brute force on small cases."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bolaco.allocate.allocators.spectral import make_menu, spectral_ranks
from bolaco.errors import BudgetError
from bolaco.models.structure import Site
from bolaco.storage.budget import Budget
from bolaco.storage.storage import STORAGES

TWO_FACTOR, PIVOTED = (STORAGES.get(name) for name in ("two-factor", "pivoted"))


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
    st.sampled_from([TWO_FACTOR.name, PIVOTED.name]),
)
def test_close_to_brute_force_and_within_budget(shapes, seed, keep, name):
    storage = STORAGES.get(name)
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
    budget = Budget(sites, round(keep, 3), PIVOTED)
    menus = [make_menu(s, spectra[s.name], 1, PIVOTED, False) for s in sites]
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
    ranks = spectral_ranks(sites, spectra, Budget(sites, 0.75, TWO_FACTOR), 4)
    assert ranks["loud"] is None
    assert ranks["quiet"] is not None


def test_sites_without_spectrum_stay_dense():
    sites = [_site("a", 32, 32), _site("b", 32, 32)]
    ranks = spectral_ranks(sites, {"a": torch.logspace(0, -6, 32)}, Budget(sites, 0.75, TWO_FACTOR), 4)
    assert ranks["b"] is None
    assert ranks["a"] is not None


def test_impossible_budget_names_the_numbers():
    sites = [_site("a", 32, 32)]
    with pytest.raises(BudgetError, match=r"102 parameters .* has 256"):
        spectral_ranks(sites, {"a": torch.ones(32)}, Budget(sites, 0.1, TWO_FACTOR), 4)


# --- from an earlier allocation


def _warm_case(data, multiple, storage):
    """Sites and spectra, and ranks that an earlier result may have: any the storage allows, or dense."""
    shapes = data.draw(st.lists(st.tuples(st.integers(6, 14), st.integers(6, 14)), min_size=2, max_size=4))
    sites = [_site(f"m{i}", *shape) for i, shape in enumerate(shapes)]
    spectra = _spectra(sites, data.draw(st.integers(0, 10**6)))
    tops = {s.name: storage.max_rank(s, multiple) for s in sites}
    # The first one stays dense, and so does what is too small to be factored: they have no spectrum.
    spectra = {name: spectrum for name, spectrum in spectra.items() if tops[name] and name != "m0"}
    ranks = {name: data.draw(st.integers(1, tops[name] + 1)) for name in spectra}
    warm = {s.name: ranks[s.name] if ranks.get(s.name, 99) <= tops[s.name] else None for s in sites}
    return sites, spectra, warm


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    st.data(), st.integers(1, 4), st.sampled_from([TWO_FACTOR.name, PIVOTED.name]), st.floats(0.6, 1.3), st.booleans()
)
def test_a_warm_start_is_refitted_to_the_budget(data, multiple, name, share, relative):
    storage = STORAGES.get(name)
    sites, spectra, warm = _warm_case(data, multiple, storage)
    budget = Budget(sites, 1.0, storage)
    budget.limit = min(int(share * budget.cost(warm)), budget.total)
    over = budget.cost(warm) > budget.limit
    try:
        ranks = spectral_ranks(sites, spectra, budget, multiple, relative, warm)
    except BudgetError:
        # Only where the lowest ranks, those of the earlier result among them, do not fit.
        lowest = {s.name: min(multiple, warm[s.name] or s.size) if s.name in spectra else None for s in sites}
        assert over
        assert budget.cost(lowest) > budget.limit
        return
    assert ranks.keys() == warm.keys()
    assert budget.cost(ranks) <= budget.limit
    for site in sites:
        before, after = (storage.parameters(site, r[site.name]) for r in (warm, ranks))
        assert after <= before if over else after >= before
        # What is changed is changed to a multiple of the step.
        if ranks[site.name] not in (None, warm[site.name]):
            assert ranks[site.name] % multiple == 0
    # Nothing is left that would have been affordable, and was not ruled out.
    left = budget.limit - budget.cost(ranks)
    for site in sites:
        now = storage.parameters(site, ranks[site.name])
        ceiling = storage.parameters(site, warm[site.name]) if over else site.size
        for rank in range(multiple, storage.max_rank(site, multiple) + 1, multiple):
            cost = storage.cost(site, rank)
            if site.name in spectra and now < cost <= ceiling:
                assert cost - now > left


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data(), st.integers(1, 3), st.sampled_from([TWO_FACTOR.name, PIVOTED.name]))
def test_a_warm_start_that_spends_the_budget_stays(data, multiple, name):
    storage = STORAGES.get(name)
    sites, spectra, warm = _warm_case(data, multiple, storage)
    budget = Budget(sites, 1.0, storage)
    budget.limit = budget.cost(warm)
    assert spectral_ranks(sites, spectra, budget, multiple, warm=warm) == warm
    # The ranks the closed form found itself are where it starts from, too.
    budget.limit = int(0.8 * budget.total)
    try:
        found = spectral_ranks(sites, spectra, budget, multiple)
    except BudgetError:
        return
    assert spectral_ranks(sites, spectra, budget, multiple, warm=found) == found


def test_a_refit_follows_the_spectra():
    """From equal ranks, what has to go goes where it costs least, and what is free goes where it is worth most."""
    sites = [_site("loud", 32, 32), _site("quiet", 32, 32)]
    spectra = {"loud": torch.full((32,), 10.0).double(), "quiet": torch.logspace(0, -6, 32).double()}
    warm = {"loud": 12, "quiet": 12}  # of at most 15 that save anything
    lower = spectral_ranks(sites, spectra, Budget(sites, 0.6, TWO_FACTOR), 1, warm=warm)
    assert (lower["loud"], lower["quiet"]) == (12, 7)
    higher = spectral_ranks(sites, spectra, Budget(sites, 0.85, TWO_FACTOR), 1, warm=warm)
    assert (higher["loud"], higher["quiet"]) == (15, 12)
