"""Closed-form allocation: the ranks of least estimated error under the budget, one price for all matrices.

Each matrix has a menu, every multiple of the rank step and "stay dense", with a cost in parameters and an error read
off its spectrum. For a price ``p`` per parameter each matrix takes the entry of least ``error + p x cost`` on its
own; the lowest price that meets the budget is found by bisection, and what rounding leaves is spent on the best
affordable steps. Costs need not be convex in the rank (pivoted storage is concave, dense is a jump): the menu is
searched whole, not walked greedily. The menu of the first matrices of a block's experts has two forms in it, a pair of
factors for each and one input factor for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bolaco.allocate.allocator import Allocation, AllocationTask, Allocator
from bolaco.allocate.space import uniform_preview
from bolaco.factorize.noise import Noise
from bolaco.models.structure import Site, Stack
from bolaco.settings import Section
from bolaco.storage.budget import Budget, Ranks
from bolaco.storage.coded import CodedStorage
from bolaco.storage.storage import Storage

_BISECTIONS = 100
_ADVICE = "raise --keep, or let more types be factored (search.dense_types)"


@dataclass(frozen=True)
class Menu:
    """What one matrix, or several together, can be.

    Attributes:
        ranks: ascending, dense (None) last; of several forms one after the other.
        costs, errors: of each entry.
        units: of each entry, the names of the sites that get its rank.
        bits: of each entry, where they are chosen; else empty.
    """

    ranks: tuple[int | None, ...]
    costs: np.ndarray
    errors: np.ndarray
    units: tuple[tuple[str, ...], ...]
    bits: tuple[int, ...] = ()

    def choose(self, price: float) -> int:
        """Index of least ``error + price x cost``; the cheaper one of equals."""
        return int(np.argmin(self.errors + price * self.costs))


def make_menu(
    site: Site, spectrum: Tensor, multiple: int, storage: Storage, relative: bool, earlier: int | None = None
) -> Menu:
    """The menu of a site from its spectrum (squared errors by component, descending).

    ``relative`` divides by the whole, for methods whose errors are not comparable between matrices. ``earlier`` is the
    rank that an earlier result gives it, which need not be a multiple.
    """
    top = min(storage.top(site, multiple), len(spectrum))
    ranks: list[int | None] = [*sorted({*range(multiple, top + 1, multiple), *([earlier] if earlier else [])})]
    energy = spectrum.double().numpy()
    tails = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])
    errors = [float(tails[rank]) for rank in ranks if rank is not None]
    scale = float(tails[0]) if relative and tails[0] > 0 else 1.0
    costs = [storage.parameters(site, rank) for rank in ranks]
    return Menu(
        (*ranks, None),
        np.array([*costs, storage.dense_cost(site)], dtype=np.int64),
        np.array([*errors, 0.0]) / scale,
        ((site.name,),) * (len(ranks) + 1),
    )


def spectral_ranks(
    sites: Sequence[Site],
    spectra: Mapping[str, Tensor],
    budget: Budget,
    multiple: int,
    relative: bool = False,
    warm: Ranks | None = None,
    offered: Sequence[Stack] = (),
) -> Ranks:
    """Ranks of least estimated error within the budget; sites without a spectrum stay dense.

    Args:
        sites: every decoder linear.
        spectra: squared error by component of the matrices that may be factored.
        budget: the budget; its storage decides what a rank costs.
        multiple: rank step.
        relative: errors count relative to each matrix's own.
        warm: ranks to start from: where they cost too much none is raised, where they leave something none is lowered.
        offered: stacks that can take the place of tied sites.

    Returns:
        Of every site its rank; where a stack is taken, the stack's in the place of its matrices'.

    Raises:
        BudgetError: not even the lowest ranks fit.
    """
    groups = _tied(site for site in sites if site.name in spectra)
    start = warm or {}

    def menu_of(name: str) -> Menu:
        return make_menu(budget.sites[name], spectra[name], multiple, budget.storage, relative, start.get(name))

    menus = [_sum([menu_of(name) for name in names]) for names in groups]
    stacks = {tuple(member.name for member in stack.members): stack for stack in offered if stack.name in spectra}
    for i, names in enumerate(groups):
        stack = stacks.get(tuple(names))
        if stack is not None:
            menus[i] = _either(menus[i], make_menu(stack, spectra[stack.name], multiple, budget.storage, relative))
    if warm is not None:
        over = budget.cost(warm) > budget.limit
        costs = [sum(budget.storage.parameters(budget.sites[n], warm[n]) for n in names) for names in groups]
        menus = [_from(menu, cost, over) for menu, cost in zip(menus, costs, strict=True)]
    fixed = budget.total - sum(budget.storage.dense_cost(budget.sites[n]) for names in groups for n in names)
    choice = _chosen(menus, fixed, budget)
    ranks: Ranks = dict.fromkeys(budget.sites)
    for names, menu, i in zip(groups, menus, choice, strict=True):
        for name in names:
            del ranks[name]
        ranks.update(dict.fromkeys(menu.units[i], menu.ranks[i]))
    return ranks


def coded_menu(
    site: Site,
    spectrum: Tensor | None,
    multiple: int,
    storage: CodedStorage,
    relative: bool,
    noise: Mapping[int, Mapping[str, Noise]],
) -> Menu:
    """The menu of a site with all bits that it can have; costs are in bits, errors those of rank and codes together.

    ``spectrum`` is None for a site that is not factored. Where errors are ``relative`` they are shares of its whole.
    """
    menus, bits = [], []
    energy = torch.zeros(0, dtype=torch.float64) if spectrum is None else spectrum.double()
    for width in storage.choices:
        found = noise[width][site.name]
        menu = make_menu(site, energy, multiple, storage.at(width), relative=False)
        size = found.energy if spectrum is None else float(energy.sum())
        scale = size if relative and size > 0 else 1.0
        common = min(len(found.components), len(energy))
        added = torch.cumsum(found.components[:common] * energy[:common], 0).tolist()
        reached = [found.dense * size if rank is None else added[rank - 1] for rank in menu.ranks]
        menus.append(replace(menu, errors=(menu.errors + np.array(reached)) / scale))
        bits += [width] * len(menu.ranks)
    return Menu(
        tuple(rank for menu in menus for rank in menu.ranks),
        np.concatenate([menu.costs for menu in menus]),
        np.concatenate([menu.errors for menu in menus]),
        tuple(unit for menu in menus for unit in menu.units),
        tuple(bits),
    )


def coded_ranks(
    sites: Sequence[Site],
    spectra: Mapping[str, Tensor],
    budget: Budget,
    multiple: int,
    relative: bool,
    noise: Mapping[int, Mapping[str, Noise]],
) -> tuple[Ranks, dict[str, int]]:
    """Ranks and bits of least estimated error within a budget of bits; sites without a spectrum get bits alone.

    Raises:
        BudgetError: not even the lowest ranks and bits fit.
    """
    storage = budget.storage
    assert isinstance(storage, CodedStorage)  # whoever asks for bits has a budget of them
    menus = [coded_menu(site, spectra.get(site.name), multiple, storage, relative, noise) for site in sites]
    choice = _chosen(menus, 0, budget)
    found = list(zip(sites, menus, choice, strict=True))
    return {site.name: menu.ranks[i] for site, menu, i in found}, {site.name: menu.bits[i] for site, menu, i in found}


def _chosen(menus: Sequence[Menu], fixed: int, budget: Budget) -> list[int]:
    """Of each menu the entry of least error at one price for all, what is left spent.

    Args:
        menus: of the matrices.
        fixed: cost of the others.
        budget: what may not be exceeded.

    Raises:
        BudgetError: the cheapest entries cost more.
    """

    def cost(choice: Sequence[int]) -> int:
        return fixed + sum(int(menu.costs[i]) for menu, i in zip(menus, choice, strict=True))

    cheapest = [int(menu.costs.argmin()) for menu in menus]
    if cost(cheapest) > budget.limit:
        raise budget.too_small(cost(cheapest), _ADVICE)
    low, high = 0.0, _price_of_everything(menus)
    choice = [menu.choose(low) for menu in menus]
    if cost(choice) > budget.limit:
        choice = cheapest
        for _ in range(_BISECTIONS):
            price = (low + high) / 2
            tried = [menu.choose(price) for menu in menus]
            if cost(tried) > budget.limit:
                low = price
            else:
                high, choice = price, tried
    _spend(menus, choice, budget.limit - cost(choice))
    return choice


def _tied(sites: Iterable[Site]) -> list[list[str]]:
    """Names of the sites that have one rank together, as the experts of a block do; most are alone."""
    groups: dict[object, list[str]] = {}
    for site in sites:
        groups.setdefault(site.tie or site.name, []).append(site.name)
    return list(groups.values())


def _sum(menus: Sequence[Menu]) -> Menu:
    """The menu of matrices that take one entry together."""
    if len(menus) == 1:
        return menus[0]
    shortest = min(menus, key=lambda menu: len(menu.ranks))
    common = [rank for rank in shortest.ranks if all(rank in menu.ranks for menu in menus)]
    at = [[menu.ranks.index(rank) for rank in common] for menu in menus]
    costs = sum(menu.costs[i] for menu, i in zip(menus, at, strict=True))
    errors = sum(menu.errors[i] for menu, i in zip(menus, at, strict=True))
    units = tuple(name for menu in menus for name in menu.units[0])
    return Menu(tuple(common), np.asarray(costs), np.asarray(errors), (units,) * len(common))


def _either(apart: Menu, stack: Menu) -> Menu:
    """The menu of matrices that are factored apart or as one stack; dense is an entry of the first."""
    factored = [i for i, rank in enumerate(stack.ranks) if rank is not None]
    return Menu(
        (*apart.ranks, *(stack.ranks[i] for i in factored)),
        np.concatenate([apart.costs, stack.costs[factored]]),
        np.concatenate([apart.errors, stack.errors[factored]]),
        (*apart.units, *(stack.units[i] for i in factored)),
    )


def _from(menu: Menu, cost: int, over: bool) -> Menu:
    """The entries that cost no more than ``cost`` where the budget is overdrawn, no less where something is left."""
    allowed = np.flatnonzero(menu.costs <= cost if over else menu.costs >= cost)
    return Menu(
        tuple(menu.ranks[i] for i in allowed),
        menu.costs[allowed],
        menu.errors[allowed],
        tuple(menu.units[i] for i in allowed),
    )


def _price_of_everything(menus: Sequence[Menu]) -> float:
    """A price at which every matrix takes its cheapest entry."""
    largest = max((float(menu.errors.max()) for menu in menus), default=0.0)
    return 2 * largest + 1e-300


def _spend(menus: Sequence[Menu], choice: list[int], left: int) -> None:
    """Takes, while there is one, the affordable entry that saves most error per parameter; changes ``choice``."""
    while True:
        best: tuple[float, int, int, int] | None = None
        for m, menu in enumerate(menus):
            extra = menu.costs - menu.costs[choice[m]]
            saved = menu.errors[choice[m]] - menu.errors
            able = np.flatnonzero((extra > 0) & (extra <= left) & (saved >= 0))
            if len(able):
                worth = saved[able] / extra[able]
                i = int(np.argmax(worth))
                if best is None or worth[i] > best[0]:
                    best = (float(worth[i]), m, int(able[i]), int(extra[able[i]]))
        if best is None:
            return
        _, changed, entry, price = best
        choice[changed] = entry
        left -= price


class SpectralOptions(Section):
    """Options of the closed form."""

    shared_experts: bool = Field(
        True, description="let the experts of a block have one input factor where that is the cheaper form"
    )


def allocate(task: AllocationTask, options: SpectralOptions) -> Allocation:
    """The closed form."""
    structure = task.structure
    if task.noise is not None:
        spectra, relative = task.spectra(), not task.comparable
        ranks, bits = coded_ranks(structure.sites, spectra, task.budget, task.multiple, relative, task.noise())
        return Allocation(ranks, bits=bits)
    found = spectral_ranks(
        structure.sites,
        task.spectra(),
        task.budget,
        task.multiple,
        not task.comparable,
        task.warm,
        structure.offered,
    )
    return Allocation(found)


def preview(task: AllocationTask, options: SpectralOptions) -> Ranks:
    """One ratio for all; raises BudgetError where the lowest ranks do not fit."""
    storage, budget = task.budget.storage, task.budget
    if isinstance(storage, CodedStorage) and len(storage.choices) > 1:
        budget = budget.in_storage(storage.cheapest())
        task, storage = replace(task, budget=budget), budget.storage
    least = 0
    for site in task.structure.sites:
        factored = site.type not in task.dense_types and storage.max_rank(site, task.multiple) > 0
        least += storage.cost(site, task.multiple) if factored else storage.dense_cost(site)
    if least > budget.limit:
        raise budget.too_small(least, _ADVICE)
    return uniform_preview(task)


ALLOCATOR = Allocator(
    name="spectral",
    paper="",
    summary="closed form: least estimated error under the budget, one price for all matrices; no trials",
    allocate=allocate,
    preview=preview,
    shows="uniform",
    options=SpectralOptions,
    offers=lambda options: options.shared_experts,
    warms=True,
    chooses_bits=True,
)
