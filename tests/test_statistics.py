"""Every statistic: additive, right for stacked matrices, the same after it was stored, and seen only by who asked."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import bolaco.statistics
from bolaco.data.settings import Calibration
from bolaco.errors import ResumeError
from bolaco.factorize import METHODS, ChosenMethod, Factors, InputMetric, Method, SiteStatistics, low_rank
from bolaco.factorize.method import NoOptions
from bolaco.factorize.run import FactorJob, factorize
from bolaco.factorize.store import FactorStore
from bolaco.models.find import inspect_structure
from bolaco.models.structure import Site, Stack, Structure, stacked
from bolaco.models.subject import Subject
from bolaco.progress import Reporter
from bolaco.refine.run import Refiner
from bolaco.refine.settings import Refinement
from bolaco.statistics.fisher import FISHER
from bolaco.statistics.gradient import GRADIENT
from bolaco.statistics.importance import INPUT_IMPORTANCE, OUTPUT_IMPORTANCE
from bolaco.statistics.magnitude import MAGNITUDE
from bolaco.statistics.moments import MOMENTS
from bolaco.statistics.statistic import GradientStatistic, InputStatistic, Statistic, StoredStatistic
from bolaco.statistics.stored import StatisticStore, site_statistics
from bolaco.work.blockstore import BlockStore
from tests.models import tiny_llama, token_blocks

CPU = torch.device("cpu")
INPUTS: tuple[InputStatistic[Any], ...] = (MOMENTS, MAGNITUDE)
GRADIENTS: tuple[GradientStatistic, ...] = (GRADIENT, FISHER)
STORED: tuple[StoredStatistic, ...] = (*GRADIENTS, OUTPUT_IMPORTANCE, INPUT_IMPORTANCE)
# Whatever there is must hold to what is tested here.
EVERY: tuple[Statistic[Any], ...] = (*INPUTS, *STORED)
SEQUENCES, LENGTH = 6, 20
SITE = inspect_structure(tiny_llama()).sites[0]


def named(kind: Statistic[Any]) -> str:
    return kind.name


@pytest.fixture(scope="module")
def structure() -> Structure:
    """Of a model with fewer keys than queries; its sites are stacks where matrices share an input."""
    return stacked(inspect_structure(tiny_llama()))


@dataclass(frozen=True)
class Samples:
    """Raw samples of some matrices on one input, float64: inputs, output gradients, gradients of the elements."""

    x: Tensor
    gradients: dict[str, Tensor]
    elements: dict[str, Tensor]

    def whole(self, names: list[str]) -> Samples:
        """Of the matrices stacked along their outputs."""
        together = torch.cat([self.gradients[name] for name in names], dim=-1)
        return Samples(self.x, {"stack": together}, {"stack": torch.cat([self.elements[n] for n in names], dim=-2)})


def samples(sites: tuple[Site, ...], seed: int = 0) -> Samples:
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    inside = sites[0].in_features
    # Outputs of all matrices depend on each other, so that the blocks off the diagonal are not zero.
    common = noise(SEQUENCES, LENGTH, 5)
    return Samples(
        noise(SEQUENCES, LENGTH, inside) @ noise(inside, inside) + noise(inside),
        {site.name: 1e-3 * (common @ noise(5, site.out_features)) for site in sites},
        {site.name: 1e-4 * noise(7, site.out_features, inside) for site in sites},
    )


def reference(kind: Statistic[Any], found: Samples, name: str) -> Any:
    """By the definition, from everything at once."""
    x, g = found.x.flatten(0, 1), found.gradients[name].flatten(0, 1)
    if kind is MOMENTS:
        return x.mean(0), torch.cov(x.T), x.T @ x / len(x)
    if kind is MAGNITUDE:
        return x.abs().mean(0)
    if kind is GRADIENT:
        return g.T @ g / len(g)
    if kind is FISHER:
        return (found.gradients[name].mT @ found.x).square().mean(0).sum(0)
    importance = found.elements[name].abs().mean(0)
    return importance.sum(1 if kind is OUTPUT_IMPORTANCE else 0)


def estimated(kind: Statistic[Any], found: Samples, site: Site, pieces: list[int] | None = None) -> Any:
    """By the accumulator, from batches of so many sequences; what has none is found elsewhere."""
    parts = pieces or [SEQUENCES]
    if isinstance(kind, InputStatistic):
        accumulator = kind.accumulator(site.in_features, 1, CPU)
        for batch in found.x.split(parts):
            accumulator.update(batch)
        return accumulator.finalize()
    if isinstance(kind, GradientStatistic):
        gradient = kind.accumulator(site, CPU)
        for inputs, outputs in zip(found.x.split(parts), found.gradients[site.name].split(parts), strict=True):
            gradient.update(inputs, outputs)
        return gradient.result()
    return reference(kind, found, site.name)


def numbers_of(value: Any) -> tuple[Tensor, ...]:
    """All there is to compare of a statistic."""
    return value if isinstance(value, tuple) else (value,) if isinstance(value, Tensor) else _moments(value)


def _moments(value: Any) -> tuple[Tensor, ...]:
    return value.mean, value.covariance, value.second_moment


def assert_same(left: Any, right: Any) -> None:
    for a, b in zip(numbers_of(left), numbers_of(right), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(b.abs().max()))


def test_none_is_left_out() -> None:
    """The modules have no statistic that is not tested here, and no two are stored in one folder."""
    found = set()
    for module in pkgutil.iter_modules(bolaco.statistics.__path__):
        values = vars(importlib.import_module(f"bolaco.statistics.{module.name}")).values()
        found |= {value for value in values if isinstance(value, Statistic)}
    assert found == set(EVERY)
    assert len({kind.name for kind in EVERY}) == len(EVERY)


# --- accumulators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*INPUTS, *GRADIENTS], ids=named)
@given(cuts=st.sets(st.integers(1, SEQUENCES - 1)))
@settings(deadline=None)
def test_batches_of_any_size_give_what_everything_at_once_gives(kind: Statistic[Any], cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), SEQUENCES]
    found = samples((SITE,))
    parts = [b - a for a, b in pairwise(edges)]
    assert_same(estimated(kind, found, SITE, parts), reference(kind, found, SITE.name))


@pytest.mark.parametrize("kind", INPUTS, ids=named)
@pytest.mark.parametrize("cut", [0, 1, 3, SEQUENCES])
def test_shards_add_up(kind: InputStatistic[Any], cut: int, structure: Structure) -> None:
    site = structure.sites[0]
    found = samples(site.members)
    shards: list[Any] = [kind.accumulator(site.in_features, 1, CPU) for _ in range(2)]
    for shard, part in zip(shards, found.x.split([cut, SEQUENCES - cut]), strict=True):
        if len(part):
            shard.update(part)
    shards[0].merge(shards[1])
    assert_same(shards[0].finalize(), reference(kind, found, site.members[0].name))


# --- stacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY, ids=named)
@pytest.mark.parametrize("type_", ["qk", "gate_up"])
def test_stack_is_the_statistic_of_the_stacked_matrix(kind: Statistic[Any], type_: str, structure: Structure) -> None:
    stack = next(site for site in structure.sites if site.type == type_)
    assert isinstance(stack, Stack)
    found = samples(stack.members, seed=3)
    value = kind.stack([estimated(kind, found, member) for member in stack.members])
    expected = reference(kind, found.whole([member.name for member in stack.members]), "stack")
    if kind is GRADIENT:
        ones = [torch.ones(member.out_features, dtype=torch.float64) for member in stack.members]
        blocks = torch.block_diag(*(torch.outer(side, side) for side in ones))
        assert float(expected[blocks == 0].abs().max()) > 0.1 * float(expected.abs().max())
        expected = expected * blocks  # outputs of different matrices count as uncorrelated
    assert_same(value, expected)
    if isinstance(kind, StoredStatistic):
        assert value.shape == kind.decode(kind.encode(value)).shape


def test_what_is_stored_of_the_members_is_stacked(structure: Structure, tmp_path: Path) -> None:
    sites = structure.of_layer(1)
    stores = [StatisticStore(tmp_path / kind.name, kind) for kind in STORED]
    found = {member.name: samples((member,), seed=i) for i, site in enumerate(sites) for member in site.members}
    for store in stores:
        kind = store.statistic
        store.put(1, {m.name: estimated(kind, found[m.name], m) for site in sites for m in site.members})
    known = site_statistics(1, sites, stores, CPU)
    assert known.keys() == {site.name for site in sites}
    for site in sites:
        assert known[site.name].values.keys() == set(STORED)
        for kind in STORED:
            parts = [estimated(kind, found[m.name], m).float() for m in site.members]
            expected = kind.stack(parts) if len(parts) > 1 else parts[0]
            assert torch.equal(known[site.name][kind], expected), (site.name, kind.name)


# --- on disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORED, ids=named)
def test_the_same_after_it_was_stored_in_as_many_numbers_as_it_says(
    kind: StoredStatistic, structure: Structure, tmp_path: Path
) -> None:
    store = StatisticStore(tmp_path, kind)
    members = [member for site in structure.of_layer(0) for member in site.members]
    values = {m.name: estimated(kind, samples((m,)), m) for m in members}
    store.put(0, values)
    for member in members:
        value = values[member.name].float()
        assert torch.equal(kind.decode(kind.encode(value)), value)
        assert torch.equal(store.get(0, CPU)[member.name], value)
    written = load_file(store.path(0))
    assert {name: (value.dtype, value.numel()) for name, value in written.items()} == {
        member.name: (torch.float32, kind.numbers(member)) for member in members
    }


def test_what_cannot_be_what_was_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 x 3 is no folded symmetric matrix"):
        GRADIENT.decode(torch.ones(3, 3))
    store = StatisticStore(tmp_path, GRADIENT)
    BlockStore(tmp_path).write(2, {"m": torch.ones(3, 3)})
    with pytest.raises(ResumeError, match=r"block-00002.*no folded symmetric matrix.*delete this file"):
        store.get(2, CPU)


# --- what a method gets to know -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY, ids=named)
def test_what_was_not_asked_for_is_a_defect_of_the_method(kind: Statistic[Any]) -> None:
    others = SiteStatistics({other: object() for other in EVERY if other is not kind})
    said = rf"statistic '{kind.name}' was not asked for; name it under Method\.needs"
    with pytest.raises(LookupError, match=said):
        others[kind]
    with pytest.raises(LookupError, match=said):
        SiteStatistics({})[kind]
    value = object()
    assert others.with_values({kind: value})[kind] is value
    with pytest.raises(LookupError, match=said):  # the others are as they were
        others[kind]


def _spying(needs: tuple[Statistic[Any], ...], seen: list[tuple[str, set[Statistic[Any]]]]) -> ChosenMethod:
    """A method that notes what it is given, and asks for nothing."""

    def metric(statistics: SiteStatistics, options: Any) -> InputMetric:
        seen.append(("metric", set(statistics.values)))
        return InputMetric(None)

    def prepare(
        weight: Tensor, metric: InputMetric, statistics: SiteStatistics, max_rank: int, options: Any
    ) -> Factors:
        seen.append(("prepare", set(statistics.values)))
        return low_rank(weight, metric, max_rank)

    method = Method(name="spy", paper="-", summary="-", prepare=prepare, metric=metric, needs=needs)
    return ChosenMethod(method, NoOptions())


@pytest.mark.parametrize("needs", [(), (MOMENTS,), (MAGNITUDE,), (FISHER,), (MAGNITUDE, GRADIENT, FISHER)])
def test_a_method_gets_what_it_needs_and_nothing_else(needs: tuple[Statistic[Any], ...], tmp_path: Path) -> None:
    """Beside a method that needs everything, in one pass; and again when blocks are fitted."""
    model = tiny_llama()
    subject, tokens = Subject(model, inspect_structure(model)), token_blocks(4, 16)
    top = {site.name: 4 for site in subject.structure.sites}
    stores = {kind: StatisticStore(tmp_path / kind.name, kind) for kind in GRADIENTS}
    for kind, store in stores.items():
        for layer in range(subject.structure.num_layers):
            sites = subject.structure.of_layer(layer)
            store.put(layer, {site.name: estimated(kind, samples((site,)), site) for site in sites})
    seen: dict[str, list[tuple[str, set[Statistic[Any]]]]] = {"some": [], "all": []}
    jobs = []
    for name, asked in (("some", needs), ("all", (*INPUTS, *GRADIENTS))):
        own = [stores[kind] for kind in asked if isinstance(kind, GradientStatistic)]
        jobs.append(FactorJob(_spying(asked, seen[name]), subject, FactorStore(tmp_path / name), top, own))
    factorize(tokens, jobs, Calibration(batch=2, groups=2), Reporter(quiet=True))
    of_inputs = {kind for kind in needs if isinstance(kind, InputStatistic)}
    assert [given for stage, given in seen["some"] if stage == "metric"] == [of_inputs] * 8  # four inputs a block
    assert [given for stage, given in seen["some"] if stage == "prepare"] == [set(needs)] * 14
    assert [given for stage, given in seen["all"] if stage == "prepare"] == [{*INPUTS, *GRADIENTS}] * 14

    seen["some"].clear()
    chosen = Refinement(fit=True, steps=0, sequences=2)
    job = jobs[0]
    refiner = Refiner(subject, job.store, top, tokens, job.method, chosen, Calibration(batch=2), job.statistics)
    refiner.run(BlockStore(tmp_path / "refined"), Reporter(quiet=True))
    assert [given for stage, given in seen["some"] if stage == "metric"] == [of_inputs] * 8
    assert [given for stage, given in seen["some"] if stage == "prepare"] == [set(needs)] * 14


def test_a_method_that_forgot_to_ask_is_told(tmp_path: Path) -> None:
    """Also where another method of the same pass did ask."""
    model = tiny_llama()
    subject = Subject(model, inspect_structure(model))

    def metric(statistics: SiteStatistics, options: Any) -> InputMetric:
        return InputMetric(statistics[MAGNITUDE])

    top = {site.name: 2 for site in subject.structure.sites}
    asvd = METHODS.get("asvd")
    forgetful = Method(
        name="forgetful", paper="-", summary="-", prepare=METHODS.get("svd").prepare, metric=metric, needs=(MOMENTS,)
    )
    jobs = [
        FactorJob(ChosenMethod(method, method.options()), subject, FactorStore(tmp_path / method.name), top)
        for method in (asvd, forgetful)
    ]
    with pytest.raises(LookupError, match="statistic 'magnitude' was not asked for"):
        factorize(token_blocks(2, 8), jobs, Calibration(batch=2), Reporter(quiet=True))


def test_what_a_method_s_needs_are_sorted_into() -> None:
    kfac, lpaf, svd = (METHODS.get(name) for name in ("kfac", "lpaf", "svd"))
    assert (kfac.inputs, kfac.gradients, kfac.stored) == ((MOMENTS,), (GRADIENT,), (GRADIENT,))
    assert (lpaf.inputs, lpaf.gradients, lpaf.stored) == ((), (), (OUTPUT_IMPORTANCE, INPUT_IMPORTANCE))
    assert [method.reads_text for method in (kfac, lpaf, svd)] == [True, True, False]
