"""Multiplying the factors back, for tools that only know stock architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.errors import UnsupportedModelError
from bolaco.layers import CodedLinear, Entry, FactoredLinear, SplitLinear
from bolaco.models.experts import experts_of, fused_tensors
from bolaco.models.find import inspect_structure, meta_model
from bolaco.models.load import load_model, load_tokenizer
from bolaco.models.lowrank import is_compressed, stock_config
from bolaco.models.quiet import quiet
from bolaco.models.size import parameters_in
from bolaco.models.structure import has_module, prefix_of, weight_of
from bolaco.work.output import new_folder, refuse_existing

# Configuration switches that give a stock architecture biases -> what the names of the projections they cover contain.
_BIAS_SWITCHES = {"attention_bias": ".self_attn.", "mlp_bias": ".mlp.", "enable_bias": "."}


def export_dense(folder: str, out: Path, drop_bias: bool = False) -> dict[str, int]:
    """Writes the dense model equivalent to a compressed folder; returns parameter counts before and after.

    The bias that a factored matrix carries needs a place in the stock architecture: one it has already, or one its
    configuration can switch on.

    Raises:
        OutputExistsError: ``out`` exists.
        UnsupportedModelError: not a compressed folder, or a bias has no place and ``drop_bias`` is false.
    """
    refuse_existing(out)
    model = load_model(folder, adapters="refuse")
    if not is_compressed(model.config):
        raise UnsupportedModelError(f"{folder}: a {model.config.model_type} model, not a compressed one")
    tokenizer = load_tokenizer(folder)
    dense: Any = biased_skeleton(model)
    structure = inspect_structure(dense)
    state = dict(model.state_dict())
    prefix = prefix_of(dense)
    stock = dense.state_dict()
    homeless = []
    apart = dict(experts_of(model.base_model))
    for name, experts in apart.items():
        for key in [key for key in state if key.startswith(f"{prefix}{name}.")]:
            del state[key]
        for own, tensor in fused_tensors(experts, dense.base_model.get_submodule(name), _dense).items():
            key = f"{prefix}{name}.{own}"
            if key in stock:
                state[key] = tensor
            elif float(tensor.abs().max()) > 0:
                homeless.append(key)
        # What else there is in the stock module, such as a norm behind the experts.
        rest = {
            key.removeprefix("rule."): value for key, value in experts.state_dict().items() if key.startswith("rule.")
        }
        state.update({f"{prefix}{name}.{key}": value for key, value in rest.items()})
    for module in dict.fromkeys(site.module for site in structure.sites):
        if any(module.startswith(f"{name}.") for name in apart):
            continue
        if not has_module(model.base_model, module):
            continue  # an expert whose matrices are fused still
        key = prefix + module
        weight, bias = _dense(model.base_model.get_submodule(module))
        for name in [name for name in state if name.startswith(f"{key}.")]:
            del state[name]
        conv = isinstance(dense.base_model.get_submodule(module), Conv1D)
        state[f"{key}.weight"] = weight.T.contiguous() if conv else weight
        if f"{key}.bias" in stock:
            state[f"{key}.bias"] = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias
        elif bias is not None:
            homeless.append(key)
    if homeless and not drop_bias:
        raise UnsupportedModelError(
            f"{homeless[0]} and {len(homeless) - 1} more: {dense.config.model_type} has no place for the bias of a "
            "factored matrix; --drop-bias exports without it (the logits change), or compress with "
            "--method svd-llm, which has none"
        )
    with new_folder(out) as partial, quiet():
        dense.to(dtype=model.dtype).save_pretrained(partial, state_dict=state)
        tokenizer.save_pretrained(partial)
    return {
        "parameters": parameters_in(model),
        "parameters_dense": sum(p.numel() for p in dense.parameters()),
    }


def biased_skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model on the meta device, with biases switched on where the compressed one has some."""
    config = stock_config(model.config)
    matrices: dict[str, Entry] = model.config.lowrank["matrices"]
    biased = {name for name, entry in matrices.items() if _has_bias(entry)}
    for switch, marker in _BIAS_SWITCHES.items():
        if hasattr(config, switch) and any(marker in name for name in biased):
            setattr(config, switch, True)
    skeleton = meta_model(config)
    skeleton.generation_config = model.generation_config
    return skeleton


def _has_bias(entry: Entry) -> bool:
    """Whether a layer, or one inside it, has a bias."""
    inner = [*entry.get("parts", ()), *([entry["layer"]] if "layer" in entry else ())]
    return bool(entry.get("bias")) or any(_has_bias(part) for part in inner)


def _dense(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight ``[out, in]`` and bias of a layer, whatever it is made of."""
    if isinstance(module, SplitLinear):
        folded = [_dense(part) for part in module.parts.values()]
        bias = None
        if any(b is not None for _, b in folded):
            bias = torch.cat([torch.zeros_like(w[:, 0]) if b is None else b for w, b in folded])
        return torch.cat([w for w, _ in folded]), bias
    if isinstance(module, FactoredLinear):
        offset = module.dense_bias()
        return module.dense().detach(), None if offset is None else offset.detach()
    if isinstance(module, CodedLinear):
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    own = module.bias
    assert own is None or isinstance(own, Tensor)
    return weight_of(module).detach().contiguous(), None if own is None else own.detach()
