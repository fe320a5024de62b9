"""How large a model is, whatever its matrices are made of."""

from __future__ import annotations

from torch import nn

from bolaco.layers import SketchLinear


def coded_layers(model: nn.Module) -> list[SketchLinear]:
    """The layers of a model whose weights are coded into tables."""
    return [module for module in model.modules() if isinstance(module, SketchLinear)]


def parameters_in(model: nn.Module) -> int:
    """Parameters of a model, where a matrix that is coded into tables counts as the matrix that it stands for."""
    more = sum(layer.in_features * layer.out_features - layer.lut.numel() for layer in coded_layers(model))
    return sum(p.numel() for p in model.parameters()) + more


def bytes_in(model: nn.Module) -> int:
    """Bytes of a model's weights as they are stored: of a matrix that is coded into tables, tables and codes."""
    codes = sum(layer.codes.nbytes for layer in coded_layers(model))
    return sum(p.numel() * p.element_size() for p in model.parameters()) + codes
