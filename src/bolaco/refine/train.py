"""Local training of one compressed block towards the original block's output (AA-SVD, arXiv 2604.02119, section on
block refinement). It uses gradients, but no labels and nothing beyond the block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bolaco.layers import FollowerLinear, LowRankLinear
from bolaco.models.walk import BlockRunner
from bolaco.refine.settings import Refinement


def train_block(
    runner: BlockRunner,
    layer: int,
    block: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    settings: Refinement,
    seed: int,
    tick: Callable[[int], Any] | None = None,
) -> list[float]:
    """Trains all parameters of ``block`` (factors, norms, biases); returns the loss of every step.

    The loss is each token's squared error over the original output's squared norm, averaged: tokens with massive
    activations count as much as the others.

    Args:
        runner: calls blocks.
        layer: which block.
        block: the compressed block; changed in place, without gradients afterwards.
        inputs: ``[sequences, length, d]``, its inputs in the compressed model.
        targets: the original block's outputs.
        settings: steps, batch, learning rate.
        seed: of the order of the sequences.
        tick: called with 1 after each step.
    """
    dtype = next(block.parameters()).dtype
    block.float()  # steps are too small for half precision
    balance(block)
    parameters = [p for p in block.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
    )
    steps, warm = settings.steps, max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
        ),
    )
    generator = torch.Generator().manual_seed(seed * 100_003 + layer)
    size = runner.slices[0].stop
    losses, autocast = [], settings.autocast and fast_bfloat16(runner.model.device)
    order = torch.empty(0, dtype=torch.int64)
    with torch.enable_grad():
        for _ in range(steps):
            while len(order) < size:
                order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
            rows, order = order[:size], order[size:]
            target = targets[rows].to(runner.model.device).float()
            try:
                with torch.autocast(target.device.type, torch.bfloat16, enabled=autocast):
                    output = runner.run(layer, inputs[rows], block, rows)
            except RuntimeError:
                if not autocast:
                    raise
                # Some families put results of several precisions into one tensor.
                autocast = False
                output = runner.run(layer, inputs[rows], block, rows)
            error = output.float() - target
            loss = (error.square().sum(dim=-1) / target.square().sum(dim=-1).clamp(min=1e-12)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if tick:
                tick(1)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    block.to(dtype)
    return losses


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are no slower than in float32: a CPU without instructions for them takes longer."""
    known = getattr(torch.cpu, "get_capabilities", None)  # not in older versions of torch
    if device.type != "cpu" or known is None:
        return True
    return any(value for name, value in known().items() if name.endswith("bf16"))


def balance(block: nn.Module) -> None:
    """Gives both factors of every component the same norm: Adam's steps are of one size for all parameters."""
    expands: dict[LowRankLinear, list[Tensor]] = {}
    for module in block.modules():
        if isinstance(module, LowRankLinear | FollowerLinear):
            owner = module.lead if isinstance(module, FollowerLinear) else module
            expands.setdefault(owner, []).append(module.expand.weight.data)
    for module, outputs in expands.items():
        reduce = module.reduce.weight.data
        ratio = (reduce.norm(dim=1) / torch.cat(outputs).norm(dim=0)).sqrt()
        ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
        for expand in outputs:
            expand *= ratio
        reduce /= ratio[:, None]
