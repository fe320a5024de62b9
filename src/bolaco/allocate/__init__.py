"""Allocation: which rank each matrix gets, under a parameter budget."""

from bolaco.allocate.budget import Budget, Ranks, max_rank, parameters, rank_for
from bolaco.allocate.space import SearchSpace, hand_keeps, make_space

__all__ = ["Budget", "Ranks", "SearchSpace", "hand_keeps", "make_space", "max_rank", "parameters", "rank_for"]
