"""Several methods at several sizes on one model and one text, side by side."""

from bolaco.comparison.plan import Comparison, make_comparison
from bolaco.comparison.run import ComparisonResult, compare

__all__ = ["Comparison", "ComparisonResult", "compare", "make_comparison"]
