"""Evaluation of dense and compressed models."""

from bolaco.evaluation.perplexity import PerplexityResult, perplexity

__all__ = ["PerplexityResult", "perplexity"]
