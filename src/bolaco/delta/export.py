"""A delta as a LoRA adapter in PEFT's format, which PEFT, vLLM and llama.cpp read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bolaco.delta.folder import read_delta, sites_of
from bolaco.errors import UnsupportedModelError
from bolaco.models.find import inspect_structure, meta_model
from bolaco.models.load import load_config
from bolaco.models.structure import prefix_of
from bolaco.work.output import new_folder, refuse_existing

# What vLLM takes without being told, and at most (docs of its engine arguments and of LoRA).
_SERVED, _SERVED_AT_MOST = 16, 512
_PREFIX = "base_model.model."


def export_peft(folder: str, out: Path) -> list[str]:
    """Writes the adapter, dequantized to float32; returns lines that say its rank and what takes it.

    Raises:
        OutputExistsError: ``out`` exists.
        UnsupportedModelError: the delta is no product of thin matrices, has more than matrices in it, or is of fused
            projections or experts.
    """
    refuse_existing(out)
    delta = read_delta(folder)
    if delta.rest:
        raise UnsupportedModelError(
            f"{folder}: {len(delta.rest)} tensors are stored as they are ({next(iter(sorted(delta.rest)))}), which an "
            "adapter of matrices cannot hold; take `bolaco delta apply`"
        )
    skeleton = meta_model(load_config(delta.info.base))
    sites = sites_of(delta, folder, inspect_structure(skeleton))
    prefix = prefix_of(skeleton)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, form in delta.forms.items():
        site, factors = sites[name], form.factors()
        if factors is None:
            raise UnsupportedModelError(
                f"{folder}: its matrices are {form.name}, no products of thin ones; take `bolaco delta apply`"
            )
        if site.part is not None or site.expert is not None:
            raise UnsupportedModelError(
                f"{folder}: {name} is a part of {site.module}; adapters are of whole modules, take `bolaco delta apply`"
            )
        left, right = factors
        if right.shape[0] == 0:
            continue
        module = f"{prefix}{site.module}"
        ranks[module] = right.shape[0]
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = left.contiguous()
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = right.contiguous()
    if not ranks:
        raise UnsupportedModelError(f"{folder}: the delta is zero, and there is no adapter of no matrices")
    most = max(ranks.values())
    with new_folder(out) as partial:
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(_config(delta.info.base, ranks, most), indent=1)
        (partial / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    size = sum(tensor.numel() for tensor in tensors.values()) * torch.float32.itemsize
    lines = [f"rank {min(ranks.values())} to {most}, {size / 2**20:,.1f} MiB in float32"]
    if most > _SERVED:
        beyond = (
            "" if most <= _SERVED_AT_MOST else f", which at most {_SERVED_AT_MOST} goes for: it will not serve this"
        )
        lines.append(
            f"PEFT and llama.cpp take any rank; vLLM takes {_SERVED} unless it is given --max-lora-rank {most}{beyond}"
        )
    return lines


def _config(base: str, ranks: dict[str, int], most: int) -> dict[str, Any]:
    """``adapter_config.json``: the scaling alpha / r is 1 for every matrix."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != most},
        "alpha_pattern": {name: rank for name, rank in ranks.items() if rank != most},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
