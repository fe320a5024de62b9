"""How large a model is, whatever its matrices are made of."""

from __future__ import annotations

from torch import nn

from bolaco.layers import CodedLinear


def coded_layers(model: nn.Module) -> list[CodedLinear]:
    """The layers of a model whose weights are looked up from codes."""
    return [module for module in model.modules() if isinstance(module, CodedLinear)]


def parameters_in(model: nn.Module) -> int:
    """Parameters of a model, where a matrix that is coded counts as the matrix that it stands for."""
    more = sum(layer.in_features * layer.out_features - layer.values.numel() for layer in coded_layers(model))
    return sum(p.numel() for p in model.parameters()) + more


def bytes_in(model: nn.Module) -> int:
    """Bytes of a model's weights as they are stored: codes, and what they are looked up in, of a coded one."""
    codes = sum(layer.codes.nbytes for layer in coded_layers(model))
    return sum(p.numel() * p.element_size() for p in model.parameters()) + codes
