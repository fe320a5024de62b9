"""One threshold for all matrices, against brute force on small cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bolaco.allocate.allocators.welore import normalised, rank_at, welore_cut
from bolaco.errors import BudgetError
from bolaco.models.find import inspect_structure
from bolaco.models.structure import Site
from bolaco.models.subject import Subject
from bolaco.storage.budget import Budget
from bolaco.storage.storage import STORAGES
from tests.command import ok
from tests.models import FAMILIES, compress_tiny, slow

MODEST = settings(deadline=None, max_examples=80, derandomize=True)
shapes = st.lists(st.tuples(st.integers(3, 16), st.integers(3, 16)), min_size=1, max_size=4)
TWO_FACTOR, PIVOTED = (STORAGES.get(name) for name in ("two-factor", "pivoted"))
storages = st.sampled_from(["two-factor", "pivoted"]).map(STORAGES.get)
multiples = st.sampled_from([1, 2, 3])
ratios = st.sampled_from([0.0, 0.3, 0.4999])


def _site(name, out, inside):
    return Site(name, name, 0, "q", None, (0, out), out, inside, False)


def _case(shapes, seed, multiple, storage):
    """Sites, and spectra of those that can be factored; some spectra are flat or rank-deficient."""
    sites = [_site(f"m{i}", *shape) for i, shape in enumerate(shapes)]
    generator = torch.Generator().manual_seed(seed)
    spectra = {}
    for i, site in enumerate(sites):
        size = min(site.out_features, site.in_features)
        values = torch.rand(size, generator=generator).double().sort(descending=True)[0] ** (1 + 2 * i)
        if (seed + i) % 5 == 0:
            values[size // 2 :] = 0
        if (seed + i) % 7 == 0:
            values[:] = 2.0
        if storage.max_rank(site, multiple):
            spectra[site.name] = values
    return sites, spectra


def _brute(site, spectrum, threshold, multiple, storage, min_ratio):
    """The rule, one matrix, read off the paper."""
    values = spectrum.sqrt().tolist()
    low, high = min(values), max(values)
    scaled = [(v - low) / (high - low) if high > low else 1.0 for v in values]
    kept = sum(v >= threshold for v in scaled)
    if (len(scaled) - kept) / len(scaled) <= min_ratio:
        return None
    rank = max(kept - kept % multiple, multiple)
    return (
        rank if storage.parameters(site, rank) < site.size and rank < min(site.out_features, site.in_features) else None
    )


@MODEST
@given(shapes, st.integers(0, 10**6), st.floats(0.2, 1.0), storages, multiples, ratios)
def test_lowest_threshold_of_all_that_meets_the_budget(shapes, seed, keep, storage, multiple, min_ratio):
    sites, spectra = _case(shapes, seed, multiple, storage)
    budget = Budget(sites, round(keep, 3), storage)
    grid = sorted({0.0, *(float(v) for s in spectra.values() for v in normalised(s)), 2.0})
    expected = None
    for threshold in grid:
        ranks = {
            s.name: _brute(s, spectra[s.name], threshold, multiple, storage, min_ratio) if s.name in spectra else None
            for s in sites
        }
        if budget.cost(ranks) <= budget.limit:
            expected = ranks
            break
    if expected is None:
        with pytest.raises(BudgetError):
            welore_cut(sites, spectra, budget, multiple, min_ratio)
        return
    found = welore_cut(sites, spectra, budget, multiple, min_ratio).ranks
    assert found == expected
    assert budget.cost(found) <= budget.limit
    for site in sites:
        rank = found[site.name]
        assert rank is None or (rank % multiple == 0 and 0 < rank <= storage.max_rank(site, multiple))


@MODEST
@given(shapes, st.integers(0, 10**6), st.floats(0.3, 1.0), st.floats(0.3, 1.0), storages, multiples, ratios)
def test_a_larger_budget_takes_nothing_away(shapes, seed, first, second, storage, multiple, min_ratio):
    sites, spectra = _case(shapes, seed, multiple, storage)
    low, high = sorted((round(first, 3), round(second, 3)))
    try:
        less = welore_cut(sites, spectra, Budget(sites, low, storage), multiple, min_ratio).ranks
    except BudgetError:
        return
    more = welore_cut(sites, spectra, Budget(sites, high, storage), multiple, min_ratio).ranks
    for site in sites:
        a, b = less[site.name], more[site.name]
        assert b is None or (a is not None and a <= b)


@MODEST
@given(st.integers(3, 20), st.integers(3, 20), st.integers(0, 10**6), storages, multiples, ratios)
def test_the_cost_of_a_matrix_never_rises_with_the_threshold(out, inside, seed, storage, multiple, min_ratio):
    (site,), spectra = _case([(out, inside)], seed, multiple, storage)
    if site.name not in spectra:
        return
    values = normalised(spectra[site.name])
    steps = [rank_at(site, values, t, multiple, storage, min_ratio) for t in [0.0, *values, np.inf]]
    costs = [storage.parameters(site, rank) for rank in steps]
    assert costs == sorted(costs, reverse=True)
    assert steps[-1] == multiple


def test_scaling_a_matrix_changes_nothing():
    sites = [_site("a", 24, 24), _site("b", 24, 24)]
    spectra = {"a": torch.logspace(0, -3, 24).double(), "b": torch.logspace(0, -1, 24).double()}
    budget = Budget(sites, 0.6, TWO_FACTOR)
    ranks = welore_cut(sites, spectra, budget, 1).ranks
    assert ranks["a"] < ranks["b"]
    scaled = {name: value * (1e6 if name == "a" else 1e-6) for name, value in spectra.items()}
    assert welore_cut(sites, scaled, budget, 1).ranks == ranks


def test_a_matrix_that_loses_too_little_stays_dense():
    site, values = _site("a", 40, 40), np.linspace(0, 1, 40)  # 16 of 40 are not below 0.6
    assert rank_at(site, values, 0.6, 1, TWO_FACTOR, 0.0) == 16
    assert rank_at(site, values, 0.6, 1, TWO_FACTOR, 0.59) == 16
    assert rank_at(site, values, 0.6, 1, TWO_FACTOR, 0.6) is None
    # Past break-even: 20 (40 + 40) is the matrix itself; pivoted, 20 of 40 saves.
    assert rank_at(site, values, values[21], 1, TWO_FACTOR, 0.0) == 19
    assert rank_at(site, values, values[20], 1, TWO_FACTOR, 0.0) is None
    assert rank_at(site, values, values[20], 1, PIVOTED, 0.0) == 20
    assert rank_at(site, values, values[20], 8, TWO_FACTOR, 0.0) == 16


def test_all_of_the_budget_leaves_all_dense_and_too_little_is_refused():
    sites = [_site("a", 32, 32)]
    spectra = {"a": torch.logspace(0, -4, 32).double()}
    assert welore_cut(sites, spectra, Budget(sites, 1.0, TWO_FACTOR), 4).ranks == {"a": None}
    with pytest.raises(BudgetError, match=r"102 parameters .* has 256"):
        welore_cut(sites, spectra, Budget(sites, 0.1, TWO_FACTOR), 4)


@pytest.mark.parametrize("family", [slow("llama"), "phi3", "gpt2", slow("opt")])
def test_preset(family, tmp_path):
    run = compress_tiny(FAMILIES[family](), tmp_path / "out", preset="welore", search=None, keep=0.6)
    assert (run.info.method, run.info.storage) == ("svd", "two-factor")
    assert run.recipe.dense_types == ()
    assert 0.45 < run.info.keep_linears <= 0.6
    ranks = set(run.info.ranks.values())
    assert len(ranks) > 1
    structure = inspect_structure(run.original)
    subject = Subject(run.original, structure)
    # The ranks are those of the weights' own singular values.
    spectra = {s.name: torch.linalg.svdvals(subject.weight(s).double()).square() for s in structure.sites}
    assert welore_cut(structure.sites, spectra, Budget(structure.sites, 0.6, TWO_FACTOR), 4).ranks == run.info.ranks


def test_min_ratio_reaches_the_rule(tmp_path):
    options = {"search.min_ratio": 0.4999, "search.rank_multiple": 1}
    run = compress_tiny(FAMILIES["llama"](), tmp_path / "out", preset="welore", search=None, keep=0.85, options=options)
    for site in inspect_structure(run.original).sites:
        rank = run.info.ranks[site.name]
        assert rank is None or rank <= 0.5001 * min(site.out_features, site.in_features)
    assert None in run.info.ranks.values()


@MODEST
@given(shapes, st.integers(0, 10**6), st.floats(0.05, 0.95), storages, multiples)
def test_lowest_threshold_that_reaches_a_reduction(shapes, seed, wanted, storage, multiple):
    sites, spectra = _case(shapes, seed, multiple, storage)
    if not spectra:
        return
    scaled = {name: normalised(spectrum) for name, spectrum in spectra.items()}
    count = sum(len(values) for values in scaled.values())
    grid = sorted({0.0, *(float(v) for values in scaled.values() for v in values), 2.0})
    shares = [sum(int((values < t).sum()) for values in scaled.values()) / count for t in grid]
    found = welore_cut(sites, spectra, Budget(sites, 1.0, storage), multiple, reduction=wanted)
    assert found.reduction == min(share for share in shares if share >= wanted)
    assert found.reduction == sum(int((values < found.threshold).sum()) for values in scaled.values()) / count
    assert found.ranks == {
        site.name: _brute(site, spectra[site.name], found.threshold, multiple, storage, 0.0)
        if site.name in spectra
        else None
        for site in sites
    }


def test_threshold_and_reduction_are_in_the_result(tmp_path):
    """Asked for by its size or by its reduction, it is the same model; both numbers are recorded and shown."""
    llama = FAMILIES["llama"]()
    run = compress_tiny(llama, tmp_path / "size", preset="welore", search=None, keep=0.6)
    threshold, reduction = (run.info.allocation[name] for name in ("threshold", "rank_reduction"))
    assert 0 < threshold <= 1
    assert 0 < reduction < 1
    options = {"search.reduction": reduction}
    same = compress_tiny(llama, tmp_path / "share", preset="welore", search=None, keep=1.0, options=options)
    assert same.info.ranks == run.info.ranks
    assert same.info.allocation == run.info.allocation
    shown = f"threshold {threshold:.4g}, rank reduction {reduction:.4g}"
    assert shown in ok("inspect", tmp_path / "share").out
    assert shown in (tmp_path / "share" / "README.md").read_text()
    with pytest.raises(BudgetError, match=r"search\.reduction .* more than keep 0\.5; raise keep"):
        compress_tiny(llama, tmp_path / "less", preset="welore", search=None, keep=0.5, options=options)


def test_other_rules_have_nothing_to_record(tmp_path):
    assert compress_tiny(FAMILIES["llama"](), tmp_path / "out", keep=0.7).info.allocation == {}
