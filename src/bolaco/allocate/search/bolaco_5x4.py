"""Bolaco's search with one ratio for each matrix type in each quarter of the depth (arXiv 2405.10616)."""

from bolaco.allocate.search.bolaco import bolaco_allocator

ALLOCATOR = bolaco_allocator("5x4", "the same for each matrix type in each quarter of the depth", parts=4)
