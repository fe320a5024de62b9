"""Text: where it comes from, and the disjoint blocks of tokens that a run takes from it."""
