"""Bolaco's search with one ratio for each matrix type (arXiv 2405.10616)."""

from bolaco.allocate.search.bolaco import bolaco_allocator

ALLOCATOR = bolaco_allocator("5x1", "Bayesian search of a keep ratio for each matrix type (Bolaco)", parts=1)
