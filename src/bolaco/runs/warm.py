"""Starting from the ranks of an earlier result."""

from __future__ import annotations

from bolaco.checkpoint.info import read_info
from bolaco.errors import RecipeError
from bolaco.models.find import inspect_structure, meta_model
from bolaco.models.load import load_config
from bolaco.models.lowrank import stock_config
from bolaco.models.structure import stack_of
from bolaco.recipe.recipe import LowRankRecipe
from bolaco.storage.budget import Budget, Ranks
from bolaco.storage.storage import pair_cost


def warm_ranks(recipe: LowRankRecipe, budget: Budget) -> Ranks | None:
    """The allocation of ``search.warm_start``, if there is one.

    Raises:
        RecipeError: it is of another architecture, whatever search would take it, or not allowed by this recipe.
        CheckpointError: there is no result in that folder.
    """
    start = recipe.search.warm_start
    if start is None:
        return None
    info = read_info(start)
    ranks = dict(info.ranks)
    sites = budget.sites
    # In their order, which that of a set is not.
    for name in [*(name for name in sites if name not in ranks), *(name for name in ranks if name not in sites)]:
        has = "that result has no rank for" if name in sites else "this model has no matrix"
        raise RecipeError(f"search.warm_start: {has} {name}; it is of another architecture")
    theirs = _shapes(start)
    for name, site in sites.items():
        here, there = (site.out_features, site.in_features), theirs.get(name)
        if there is not None and there != here:
            raise RecipeError(
                f"search.warm_start: {name} is {there[0]} x {there[1]} in that result and {here[0]} x {here[1]} in "
                "this model; it is of another architecture"
            )
    for stack in info.stacks:
        # Ranks of a stack say little of its matrices apart: those of the share that the stack has.
        members = tuple(sites[name] for name in stack)
        whole, multiple = stack_of(members[0].type, members), recipe.search.rank_multiple
        paid = pair_cost(whole, ranks[stack[0]] or 0) / whole.size
        ranks |= {site.name: budget.storage.rank_for(site, paid, multiple) for site in members}
    for site in sites.values():
        rank = ranks[site.name]
        allowed = budget.storage.max_rank(site, recipe.search.rank_multiple)
        if rank is not None and (site.type in recipe.dense_types or rank > allowed):
            raise RecipeError(
                f"search.warm_start: {start} gives {site.name} rank {rank}, which this recipe does not allow"
            )
    return ranks


def _shapes(folder: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices of a result, by name, as its configuration has them."""
    original = stock_config(load_config(folder))
    sites = inspect_structure(meta_model(original)).sites
    return {site.name: (site.out_features, site.in_features) for site in sites}
