"""Factorizers: from a matrix and the statistics of its input to factors of every rank, computed once.

What a method needs to import, its own and those of other packages, is here.
"""

from bolaco.factorize.method import METHODS, ChosenMethod, Method
from bolaco.factorize.solver import Factors, InputMetric, OutputMetric, low_rank
from bolaco.statistics.fisher import FISHER
from bolaco.statistics.gradient import GRADIENT
from bolaco.statistics.importance import INPUT_IMPORTANCE, OUTPUT_IMPORTANCE
from bolaco.statistics.magnitude import MAGNITUDE
from bolaco.statistics.moments import MOMENTS, Moments
from bolaco.statistics.statistic import SiteStatistics

__all__ = [
    "FISHER",
    "GRADIENT",
    "INPUT_IMPORTANCE",
    "MAGNITUDE",
    "METHODS",
    "MOMENTS",
    "OUTPUT_IMPORTANCE",
    "ChosenMethod",
    "Factors",
    "InputMetric",
    "Method",
    "Moments",
    "OutputMetric",
    "SiteStatistics",
    "low_rank",
]
