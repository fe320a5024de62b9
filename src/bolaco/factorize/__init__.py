"""Factorizers: from a matrix and the statistics of its input to factors of every rank, computed once."""

from bolaco.factorize.registry import METHODS, Method, get_method
from bolaco.factorize.solver import Factors, InputMetric, low_rank

__all__ = ["METHODS", "Factors", "InputMetric", "Method", "get_method", "low_rank"]
