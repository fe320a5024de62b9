"""How a stock transformers model becomes the compressed one that its configuration describes."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from bolaco.layers.base import Entry, FactoredLinear, build_layer, put_module


def install_layers(base_model: nn.Module, matrices: dict[str, Entry]) -> None:
    """Replaces the named projections of a base model by the layers that ``matrices`` describes."""
    built = []
    for name, entry in matrices.items():
        old = base_model.get_submodule(name)
        in_features = old.nx if isinstance(old, Conv1D) else old.in_features
        layer = build_layer(int(in_features), entry)  # type: ignore[arg-type]
        put_module(base_model, name, layer)
        built.append(layer)
    for layer in built:
        for module in layer.modules():
            if isinstance(module, FactoredLinear):
                module.connect(base_model)


class LowRankMixin:
    """Put before a transformers model class: builds it, then swaps in the layers of ``config.lowrank``."""

    base_model: nn.Module

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(getattr(config, "lowrank", None), dict):
            raise ValueError(
                f"config.json of a {config.model_type} model must have a 'lowrank' entry; this one has none"
            )
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install_layers(self.base_model, config.lowrank["matrices"])
