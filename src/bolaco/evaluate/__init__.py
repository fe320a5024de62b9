"""Evaluation of dense and compressed models."""

from bolaco.evaluate.perplexity import PerplexityResult, perplexity

__all__ = ["PerplexityResult", "perplexity"]
