"""Starting from the ranks of an earlier result."""

from __future__ import annotations

from bolaco.checkpoint.info import read_info
from bolaco.errors import RecipeError
from bolaco.recipe.recipe import LowRankRecipe
from bolaco.storage.budget import Budget, Ranks


def warm_ranks(recipe: LowRankRecipe, budget: Budget) -> Ranks | None:
    """The allocation of ``search.warm_start``, if there is one.

    Raises:
        RecipeError: it is of another architecture, or not allowed by this recipe.
        CheckpointError: there is no result in that folder.
    """
    start = recipe.search.warm_start
    if start is None:
        return None
    ranks = read_info(start).ranks
    for name in [*budget.sites.keys() - ranks.keys(), *ranks.keys() - budget.sites.keys()]:
        has = "that result has no rank for" if name in budget.sites else "this model has no matrix"
        raise RecipeError(f"search.warm_start: {has} {name}; it is of another architecture")
    for site in budget.sites.values():
        rank = ranks[site.name]
        allowed = budget.storage.max_rank(site, recipe.search.rank_multiple)
        if rank is not None and (site.type in recipe.dense_types or rank > allowed):
            raise RecipeError(
                f"search.warm_start: {start} gives {site.name} rank {rank}, which this recipe does not allow"
            )
    return ranks
