"""Layers of a compressed model, one file each; a checkpoint carries the files that it uses."""

from bolaco.layers.base import BUILDERS, Entry, FactoredLinear, build_layer, builds, put_module
from bolaco.layers.coded import CodedLinear
from bolaco.layers.common import FollowerLinear, LeadLinear
from bolaco.layers.experts import EachExpert, GroupedExperts, RoutedExperts, SortedExperts
from bolaco.layers.install import LowRankMixin, install_layers
from bolaco.layers.low_rank import LowRankLinear
from bolaco.layers.pivoted import PivotedLinear
from bolaco.layers.quantized import QuantizedLinear
from bolaco.layers.sketch import SketchLinear
from bolaco.layers.split import SplitLinear

__all__ = [
    "BUILDERS",
    "CodedLinear",
    "EachExpert",
    "Entry",
    "FactoredLinear",
    "FollowerLinear",
    "GroupedExperts",
    "LeadLinear",
    "LowRankLinear",
    "LowRankMixin",
    "PivotedLinear",
    "QuantizedLinear",
    "RoutedExperts",
    "SketchLinear",
    "SortedExperts",
    "SplitLinear",
    "build_layer",
    "builds",
    "install_layers",
    "put_module",
]
