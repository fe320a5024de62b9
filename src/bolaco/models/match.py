"""Whether a model in memory is the one that its configuration makes: a checkpoint of it is built from that."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from bolaco.errors import UnsupportedModelError
from bolaco.models.find import meta_model
from bolaco.models.lowrank import refuse_compressed


def check_rebuildable(model: Any) -> None:
    """Stops where the model that a checkpoint is built from would be another one than that in memory.

    Raises:
        UnsupportedModelError: a wrapper, a class with a forward pass of its own, hooks, weights that are not in memory,
            or other modules or shapes than the configuration says.
    """
    what = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(f"a compiled model ({what}); hand over the model that was compiled")
    if not hasattr(model, "config") or not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"a {what} is no transformers model")
    refuse_compressed(model.config)
    config: Any = model.config
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise UnsupportedModelError(f"{name} is not in memory (offloaded); load the model without device_map")
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise UnsupportedModelError(f"{name}: a compiled module; hand over the model before it was compiled")
        if hasattr(module, "_hf_hook"):
            raise UnsupportedModelError(f"{name or what}: moved between devices by hooks; load it without device_map")
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedModelError(
                f"{name or what}: has forward hooks; what they change would not be in the result, remove them first"
            )
    made = meta_model(copy.deepcopy(model.config))
    if type(made) is not type(model):
        raise UnsupportedModelError(
            f"a {what}, where its configuration (model type {config.model_type}) makes a {type(made).__name__}: "
            "the result would be another model"
        )
    here, there = _shapes(model), _shapes(made)
    for name in [*here.keys(), *there.keys()]:
        if here.get(name) != there.get(name):
            raise UnsupportedModelError(
                f"{name}: {_said(here.get(name))} in memory, {_said(there.get(name))} by its configuration; "
                "the result would be another model"
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _said(shape: tuple[int, ...] | None) -> str:
    return "is not there" if shape is None else f"has shape {list(shape)}"
