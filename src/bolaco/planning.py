"""What a recipe means for a structure, before any weight is looked at."""

from __future__ import annotations

from bolaco.allocate import Budget, Ranks, SearchSpace, hand_keeps, make_space, max_rank
from bolaco.checkpoint.info import read_info
from bolaco.errors import RecipeError
from bolaco.factorize import get_method
from bolaco.models.structure import Structure, stacked
from bolaco.recipe import Recipe

# Searches whose first allocation is the one by hand.
BY_HAND = ("5x1", "5x4", "none")


def calibrates(recipe: Recipe) -> bool:
    """Whether any stage of a run reads the calibration text."""
    return recipe.refines or (recipe.transform is None and get_method(recipe.factorization.method).reads_text)


def warm_ranks(recipe: Recipe, space: SearchSpace) -> Ranks | None:
    """The allocation of ``search.warm_start``, if there is one.

    Raises:
        RecipeError: it is of another architecture, or not allowed by this recipe.
        CheckpointError: there is no result in that folder.
    """
    start = recipe.search.warm_start
    if start is None:
        return None
    ranks: Ranks = read_info(start)["ranks"]
    space.keeps_of(ranks)
    for site in space.budget.sites.values():
        rank = ranks.get(site.name)
        if rank is not None and (
            site.type in recipe.dense_types or rank > max_rank(site, recipe.search.rank_multiple, space.budget.storage)
        ):
            raise RecipeError(
                f"search.warm_start: {start} gives {site.name} rank {rank}, which this recipe does not allow"
            )
    return ranks


def units_of(recipe: Recipe, structure: Structure) -> Structure:
    """The structure with one site for each matrix, or stack of matrices, that is compressed as one."""
    return stacked(structure, recipe.dense_types) if recipe.factorization.storage == "shared" else structure


def space_of(recipe: Recipe, structure: Structure) -> SearchSpace:
    """The search space of a recipe on a structure."""
    search = recipe.search
    return make_space(
        structure,
        Budget(structure.sites, recipe.keep, recipe.factorization.storage),
        search.space,
        recipe.dense_types,
        search.rank_multiple,
        search.min_keep,
        search.fill,
    )


def first_keeps(recipe: Recipe, space: SearchSpace) -> list[float]:
    """Keep ratios that need no look at the weights: by hand, or one for all where no search starts from the former."""
    return hand_keeps(space) if recipe.search.space in BY_HAND else [recipe.keep] * len(space.names)


def top_ranks(recipe: Recipe, structure: Structure) -> dict[str, int]:
    """Largest rank a recipe can give each matrix that it may factor, by site name."""
    multiple, storage = recipe.search.rank_multiple, recipe.factorization.storage
    sites = (site for site in structure.sites if site.type not in recipe.dense_types)
    return {site.name: max_rank(site, multiple, storage) for site in sites}
