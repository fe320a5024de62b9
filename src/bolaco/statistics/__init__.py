"""Streaming statistics of layer inputs: additive, so shards merge exactly, and collected block by block."""

from bolaco.statistics.collect import collect
from bolaco.statistics.moments import Moments, PooledMoments

__all__ = ["Moments", "PooledMoments", "collect"]
