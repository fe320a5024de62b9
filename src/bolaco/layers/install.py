"""How a stock transformers model becomes the compressed one that its configuration describes."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.layers.base import OF_MODULE, Entry, FactoredLinear, build_layer, put_module


def install_layers(base_model: nn.Module, matrices: dict[str, Entry]) -> None:
    """Replaces the named projections of a base model by the layers that ``matrices`` describes."""
    built = []
    for name, entry in matrices.items():
        old = base_model.get_submodule(name)
        layer = build_layer(old if entry["kind"] in OF_MODULE else _in_features(old, entry), entry)
        put_module(base_model, name, layer)
        built.append(layer)
    for layer in built:
        for module in layer.modules():
            if isinstance(module, FactoredLinear):
                module.connect(base_model)


def _in_features(module: nn.Module, entry: Entry) -> int:
    if "in" in entry:
        return int(entry["in"])
    return int(module.nx if isinstance(module, Conv1D) else module.in_features)  # type: ignore[arg-type]


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

    def initialize_weights(self) -> None:
        """Gives whatever the checkpoint does not hold its values.

        In classes that are not its own, transformers leaves out modules without parameters; a base model can be one,
        and have buffers of its blocks to fill (Falcon H1).
        """
        super().initialize_weights()  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, PreTrainedModel) and not any(True for _ in module.parameters(recurse=False)):
                module._init_weights(module)
