"""Writing a compressed model as a normal Hugging Face folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.errors import NonFiniteError, UnsupportedModelError
from bolaco.layers import (
    CodedLinear,
    EachExpert,
    Entry,
    FactoredLinear,
    GroupedExperts,
    QuantizedLinear,
    RoutedExperts,
    SplitLinear,
    put_module,
)
from bolaco.layers.quantized import entry_of
from bolaco.models.experts import experts_of, together
from bolaco.models.lowrank import compressed_config, compressed_skeleton
from bolaco.models.quiet import quiet
from bolaco.models.structure import Site, Structure, prefix_of
from bolaco.models.weights import in_dtype
from bolaco.quantize.grid import SCALES
from bolaco.storage.storage import Storage
from bolaco.work.blockstore import BlockStore
from bolaco.work.pages import release

# Bytes of one file of weights; as much of them is in memory while it is written.
FILE_BYTES = 2 * 10**9


@dataclass
class CompressedState:
    """What a checkpoint is made of.

    Attributes:
        matrices: the ``matrices`` entry of the configuration.
        tensors: the state dict.
        growth: of matrices whose stored form lets rounding errors grow, the factor, by site name.
        exact: names of the scales of codes, which are stored in 16 bits whatever the number format.
    """

    matrices: dict[str, Entry]
    tensors: dict[str, Tensor]
    growth: dict[str, float] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)


def compressed_state(
    model: PreTrainedModel,
    structure: Structure,
    blocks: Iterable[nn.Module],
    storage: Storage,
    store: BlockStore | None = None,
) -> CompressedState:
    """Configuration entry and state dict of the model whose decoder blocks are ``blocks``, in order.

    ``model`` is left as it is; tensors that do not change are shared with it. The blocks are packed in place. With
    ``store`` they are written there, one after the other, and the tensors are the pages of those files: never more
    than one block is in memory.

    Raises:
        NonFiniteError: a tensor of a changed matrix with NaN or infinity.
    """
    result = CompressedState({}, dict(model.state_dict()))
    prefix, originals = prefix_of(model), structure.block_modules(model)
    for layer, block in enumerate(blocks):
        inside = f"{structure.blocks[layer]}."
        for key in [key for key in result.tensors if key.startswith(prefix + inside)]:
            del result.tensors[key]
        apart = dict(experts_of(block))
        forms = _stored_forms(block, storage)
        for sites in structure.modules(layer).values():
            name = structure.name_in_block(sites[0])
            if any(name.startswith(f"{place}.") for place in apart):
                _packed(block, sites[0], name, forms, result.growth)
                continue
            if isinstance(block.get_submodule(name), SplitLinear):
                places = [(site, f"{name}.parts.{site.part}") for site in sites]
                parts = [{"name": site.part} | _packed(block, site, at, forms, result.growth) for site, at in places]
                result.matrices[inside + name] = {"kind": SplitLinear.kind, "parts": parts}
                continue
            entry = _packed(block, sites[0], name, forms, result.growth)
            original = model.base_model.get_submodule(sites[0].module)
            module = block.get_submodule(name)
            # A dense matrix is as it was, unless it has got a bias, or a Conv1D (GPT-2) has become a Linear.
            stays = not isinstance(module, FactoredLinear | CodedLinear) and isinstance(module, Conv1D) == isinstance(
                original, Conv1D
            )
            if not stays or (entry["bias"] and original.bias is None):
                result.matrices[inside + name] = entry
        for name, experts in apart.items():
            stored = together(experts, model.base_model.get_submodule(inside + name))
            put_module(block, name, stored)
            if isinstance(stored, RoutedExperts | EachExpert | GroupedExperts):
                result.matrices[inside + name] = stored.entry()
        result.exact |= {f"{prefix}{inside}{name}.scales" for name in _quantized(block)}
        made = {key: value.contiguous() for key, value in block.state_dict().items()}
        if store is not None:
            store.write(layer, made)
            found = store.read(layer)
            made = {key: found[key] for key in made}  # in this order they are shared out over files
            release(made.values())
            release(originals[layer].parameters())
        result.tensors.update({prefix + inside + key: _alone(value) for key, value in made.items()})
    return result


def _stored_forms(block: nn.Module, storage: Storage) -> dict[FactoredLinear, FactoredLinear]:
    """The stored form of every factored layer of a block, several at a time.

    Each has one thread: matrices of a block are too small for more, and results do not depend on how many there are.
    """
    layers = [module for module in block.modules() if isinstance(module, FactoredLinear) and _finite(module)]
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(layers, pool.map(storage.packed, layers), strict=True))


def _alone(tensor: Tensor) -> Tensor:
    """The same memory as a storage of its own: transformers writes what has one storage, as a mapped file, into one."""
    if tensor.device.type != "cpu":
        return tensor
    bytes_of = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
    return bytes_of.view(tensor.dtype).view(tensor.shape)


def _quantized(block: nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if isinstance(module, QuantizedLinear)]


def _finite(module: nn.Module) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in module.state_dict().values())


def _packed(
    block: nn.Module, site: Site, name: str, forms: Mapping[FactoredLinear, FactoredLinear], growth: dict[str, float]
) -> Entry:
    """Brings one matrix of a block into its stored form; returns its entry in the configuration."""
    module = block.get_submodule(name)
    if not _finite(module):
        raise NonFiniteError(f"{site.name}: its compressed form holds NaN or infinity")
    if isinstance(module, CodedLinear):
        return entry_of(module)
    if not isinstance(module, FactoredLinear):
        return {"kind": "dense", "out": site.out_features, "bias": module.bias is not None}
    packed = forms[module]
    if packed is not module:
        put_module(block, name, packed)
    grows = packed.growth()
    if grows is not None:
        growth[site.name] = grows
    return entry_of(packed)


def check_savable(model: PreTrainedModel, tokenizer: Any, compressed: bool = True) -> None:
    """Stops if a model of this configuration, or its tokenizer, could not be saved in the end; nothing is computed.

    Args:
        model: whose configuration and settings for generation the result will have.
        tokenizer: of the model.
        compressed: the result will be of the compressed type; else of the model's own.

    Raises:
        UnsupportedModelError: what transformers refuses to write, and why.
    """
    try:
        with quiet(), TemporaryDirectory() as folder:
            config = compressed_config(model, {}) if compressed else copy.deepcopy(model.config)
            # What a model makes of it, and what some values do not go with.
            config._attn_implementation = model.config._attn_implementation
            config.save_pretrained(folder)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"a model of this configuration cannot be saved: {why}") from error


def write_model(folder: Path, model: PreTrainedModel, state: CompressedState, dtype: torch.dtype) -> None:
    """Writes configuration, weights, generation settings and modelling code into an existing folder.

    What is in the model's number format is written in ``dtype``. The tensors of ``state`` are gone afterwards.
    """
    # Without memory: the skeleton only tells save_pretrained names, ties and shards.
    skeleton = compressed_skeleton(model, state.matrices)
    skeleton.to(dtype)
    plain = {name: tensor for name, tensor in state.tensors.items() if name not in state.exact}
    scales = {name: state.tensors[name].to(SCALES) for name in state.exact}
    tensors = in_dtype(plain, model.dtype, dtype) | scales
    # save_pretrained forgets each file's tensors once it is written; so is their memory, if nothing else knows them.
    plain.clear()
    state.tensors.clear()
    with quiet():
        skeleton.save_pretrained(folder, state_dict=tensors, max_shard_size=FILE_BYTES)


def lowrank_model(model: PreTrainedModel, matrices: dict[str, Entry]) -> PreTrainedModel:
    """``model``, whose modules are those that ``matrices`` describes already, as a model of the compressed type.

    It shares all tensors, and is there to be saved: what a checkpoint does not hold is on the meta device.
    """
    made: PreTrainedModel = compressed_skeleton(model, matrices)
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    return made
