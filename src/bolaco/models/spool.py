"""Weights as pages of files, also those that no file has as they are in memory.

Fused experts are put together while they are loaded, and weights of another number format converted: copies that take
memory as a whole. Here every weight goes through the disk instead: transformers reads one after the other as if it were
to be offloaded, those that no file has are written to one, and all are mapped. The written files have no name from then
on; the system frees them with the process, however that ends.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.work.pages import mapped, release

_NAME = "weight"


@contextmanager
def offloading(folder: Path) -> Iterator[dict[str, Any]]:
    """Arguments of ``from_pretrained`` with which weights stay on disk; ``folder`` is empty before and after.

    While this lasts the model can be loaded and :func:`bring_back` be called.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _empty(folder)  # a run that was killed
    heard = logging.getLogger("accelerate.big_modeling")
    level = heard.level
    heard.setLevel(logging.ERROR)  # it says that parameters are offloaded
    try:
        yield {"device_map": {"": "disk"}, "offload_folder": str(folder)}
    finally:
        heard.setLevel(level)
        _empty(folder)
        folder.rmdir()


def bring_back(model: PreTrainedModel, folder: Path) -> list[str]:
    """Makes the weights of a model that was loaded so pages of files, one at a time.

    Returns:
        Names of weights that have another shape on disk, which transformers does not look at here; if there are any,
        the model is of no use.
    """
    from accelerate.hooks import remove_hook_from_module
    from transformers.integrations.accelerate import load_offloaded_parameter

    made: dict[str, nn.Parameter] = {}
    others = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            found = load_offloaded_parameter(model, name)
            if found.shape != parameter.shape:
                others.append(name)
                continue
            made[name] = nn.Parameter(_in_a_file(found, folder), requires_grad=False)
            release([made[name]])
    remove_hook_from_module(model, recurse=True)
    for part in model.modules():
        # What is left is the class's own, bound to this object: a copy of the module would go on calling the original.
        part.__dict__.pop("forward", None)
    for name, parameter in made.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, parameter)
    model.tie_weights()
    # What says that a model is offloaded keeps it from being saved and moved as others are.
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map
    return others


def _in_a_file(tensor: Tensor, folder: Path) -> Tensor:
    """The tensor itself if it is a page of a file, else a copy that is one."""
    inside, size = mapped([tensor])
    if inside == size:
        return tensor
    file = folder / f"{_NAME}.safetensors"
    save_file({_NAME: tensor.contiguous()}, file)
    with safe_open(file, framework="pt") as opened:
        found: Tensor = opened.get_tensor(_NAME)
    file.unlink()
    return found


def _empty(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
