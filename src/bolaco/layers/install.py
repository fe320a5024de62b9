"""How a stock transformers model becomes the compressed one that its configuration describes."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.layers.base import (
    LARGEST,
    OF_MODULE,
    Entry,
    FactoredLinear,
    build_layer,
    inner_in,
    module_at,
    parts_in,
    put_module,
    size_in,
)


class EntryError(ValueError):
    """An entry of the configuration that describes no layer, in one line."""


def install_layers(base_model: nn.Module, matrices: dict[str, Entry]) -> None:
    """Replaces the named projections of a base model by the layers that ``matrices`` describes.

    Raises:
        EntryError: the model has no such projection, or an entry cannot be that of a layer in its place; names it.
    """
    built = {}
    for name, entry in matrices.items():
        try:
            built[name] = _built(module_at(base_model, name), entry)
        except ValueError as error:
            raise EntryError(f"config.json: lowrank.matrices: {name[:200]}: {error}") from error
        put_module(base_model, name, built[name])
    for name, layer in built.items():
        try:
            _connect(layer, base_model)
        except ValueError as error:
            raise EntryError(f"config.json: lowrank.matrices: {name[:200]}: {error}") from error


def _connect(layer: nn.Module, base_model: nn.Module) -> None:
    for module in layer.modules():
        if isinstance(module, FactoredLinear):
            module.connect(base_model)


def _built(old: nn.Module, entry: Entry) -> nn.Module:
    """The layer that an entry describes, in the place of a module."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        raise ValueError(f"an entry has a kind, not {str(entry)[:40]!r}")
    if entry["kind"] in OF_MODULE:
        return build_layer(old, entry)
    if "in" in entry:
        return build_layer(size_in(entry, "in", LARGEST), entry)
    inputs, outputs = _shape(old)
    described = _outputs(entry)
    if described not in (None, outputs):
        raise ValueError(f"has {described} outputs, the matrix in its place has {outputs}")
    return build_layer(inputs, entry)


def _shape(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a projection; ValueError if the module is none."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        raise ValueError(f"a {type(module).__name__} is no matrix")
    return inputs, outputs


def _outputs(entry: Entry) -> int | None:
    """The outputs that an entry describes; None where its kind says so in its own way."""
    if "parts" in entry:
        found = [_outputs(part) for part in parts_in(entry)]
        return None if None in found else sum(count for count in found if count is not None)
    if "layer" in entry:
        return _outputs(inner_in(entry))
    return size_in(entry, "out", LARGEST) if "out" in entry else None


class LowRankMixin:
    """Put before a transformers model class: builds it, then swaps in the layers of ``config.lowrank``."""

    base_model: nn.Module

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(getattr(config, "lowrank", None), dict):
            raise ValueError(
                f"config.json of a {config.model_type} model must have a 'lowrank' entry; this one has none"
            )
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        matrices = config.lowrank.get("matrices")
        if not isinstance(matrices, dict):
            raise EntryError("config.json: 'lowrank' has no matrices")
        install_layers(self.base_model, matrices)

    def initialize_weights(self) -> None:
        """Gives whatever the checkpoint does not hold its values.

        In classes that are not its own, transformers leaves out modules without parameters; a base model can be one,
        and have buffers of its blocks to fill (Falcon H1).
        """
        super().initialize_weights()  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, PreTrainedModel) and not any(True for _ in module.parameters(recurse=False)):
                module._init_weights(module)
