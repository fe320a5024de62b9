"""Factorizers: from a matrix and the statistics of its input to factors of every rank, computed once."""

from bolaco.factorize.method import Method
from bolaco.factorize.registry import METHODS, get_method, list_methods
from bolaco.factorize.solver import Factors, InputMetric, OutputMetric, low_rank
from bolaco.statistics.moments import Moments
from bolaco.statistics.site import SiteStatistics

__all__ = [
    "METHODS",
    "Factors",
    "InputMetric",
    "Method",
    "Moments",
    "OutputMetric",
    "SiteStatistics",
    "get_method",
    "list_methods",
    "low_rank",
]
