"""Factors trained among the weights they replace: the third stage of LPAF (arXiv 2306.14152).

In every step each matrix is, by a coin of its own, the weight that was factored or its factors:
``W~ = z W + (1 - z) B A`` with ``z ~ Bernoulli(p)``. The probability p falls linearly from ``start`` to 0 at ``decay``
of the steps; from there on, in evaluation and in the result, there are the factors only. Only they are trained.

W is the pruned weight where the input's folder has a file ``sparse.safetensors``, else that of the original model,
which ``bolaco.json`` names. The paper's summary gives no schedule in numbers: the linear one and both
options' defaults are ours, and the learning rate is WeLore's for factors.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.checkpoint.info import CompressedInfo
from bolaco.errors import CheckpointError
from bolaco.layers import FactoredLinear, FollowerLinear, LowRankLinear
from bolaco.models.load import resolve
from bolaco.models.structure import inspect_structure, prefix_of
from bolaco.models.subject import Subject
from bolaco.transform.prune import SPARSE_FILE
from bolaco.tune.factored import stored, two_factors
from bolaco.tune.mode import Context, Matrix, Mode, Options, Prepared, structure_of
from bolaco.tune.modes import factors

Weights = dict[str, tuple[Tensor, Tensor | None]]


class MixedOptions(Options):
    """How often the factors give way, and for how long."""

    start: float = Field(1.0, ge=0, le=1, description="probability of the original weight in the first step")
    original: str | None = Field(None, description="the model that was factored; default: what bolaco.json names")
    decay: float = Field(0.5, gt=0, le=1, description="share of the steps after which it is zero")


class MixedLinear(nn.Module):
    """Two trained factors, or the weight they stand for.

    Args:
        layer: the factors.
        weight: ``[out, in]``, of the other.
        bias: ``[out]`` or None, of the other.

    Attributes:
        mixed: whether it is the other now (z = 1); in training mode only.
    """

    def __init__(self, layer: LowRankLinear | FollowerLinear, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.layer, self.mixed = layer, False
        # No part of the state: checkpoints of the run and the result do without.
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.weight: Tensor
        self.bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        if not (self.mixed and self.training):
            made: Tensor = self.layer(x)
            return made
        # The factors get gradients of zero instead of none: where all matrices are mixed there is still a loss to
        # differentiate, and processes that train together agree on what has a gradient.
        nothing = sum(0.0 * parameter.flatten()[0] for parameter in self.layer.parameters() if parameter.requires_grad)
        return F.linear(x, self.weight, self.bias) + nothing


def probability(step: int, steps: int, start: float, decay: float) -> float:
    """p in step ``step`` of ``steps``, counted from 0."""
    return start * max(0.0, 1 - step / (decay * steps))


def coin(seed: int, step: int, name: str, chance: float) -> bool:
    """z of one matrix in one step: the same whenever it is asked for, so that runs go on as if not interrupted."""
    found = hashlib.sha256(f"{seed} {step} {name}".encode()).digest()
    return int.from_bytes(found[:8], "big") < chance * 2**64


def prepare(context: Context) -> Prepared:
    """Factors in two balanced matrices each, which require gradients, beside what they replace."""
    model, options, seed = context.model, context.options, context.settings.seed
    matrices = context.factored
    weights = _replaced(context, matrices)
    mixed: dict[str, MixedLinear] = {}
    for name, layer in two_factors(model, matrices).items():
        weight, bias = weights[name]
        mixed[name] = MixedLinear(layer, weight, bias)
        layer.expand.weight.requires_grad_(True)
        # A factor that two matrices share belongs to the first.
        if isinstance(layer, LowRankLinear):
            layer.reduce.weight.requires_grad_(True)
    for matrix in matrices:
        matrix.put(model, mixed[matrix.name].train(model.training))

    def on_step(step: int, steps: int) -> None:
        chance = probability(step, steps, options.start, options.decay)
        for name, module in mixed.items():
            module.mixed = coin(seed, step, name, chance)

    def finish() -> PreTrainedModel:
        for matrix in matrices:
            matrix.put(model, mixed[matrix.name].layer)
        stored(model, matrices)
        return model

    return Prepared(finish, frozenset(matrix.name for matrix in matrices), on_step)


def _replaced(context: Context, matrices: tuple[Matrix, ...]) -> Weights:
    """Weight and bias of each matrix before it was factored, by its name in the compressed model.

    Raises:
        CheckpointError: ``sparse.safetensors`` is damaged, or it or the original lacks a matrix.
    """
    model = context.model
    file = Path(resolve(context.settings.model).path) / SPARSE_FILE
    try:
        sparse = load_file(file) if file.is_file() else {}
    except Exception as error:  # a file can hold anything
        raise CheckpointError(f"{file}: damaged ({error})") from error
    prefix = prefix_of(model)
    sites = {prefix + s.module + (f".parts.{s.part}" if s.part else ""): s for s in structure_of(model).sites}
    original, known = None, {}
    if not sparse or any(sites[matrix.name].bias for matrix in matrices):
        whole = context.original(context.options.original)
        original = Subject(whole, inspect_structure(whole))
        known = {site.name: site for site in original.structure.sites}
    found = Weights()
    for matrix in matrices:
        name, layer = sites[matrix.name].name, matrix.of(model)
        assert isinstance(layer, FactoredLinear)  # what is factored
        shape = (layer.out_features, layer.in_features)
        weight, bias = sparse.get(name), None
        if original is not None and name in known:
            bias = original.bias(known[name])
            weight = weight if sparse else original.weight(known[name])
        if weight is None or tuple(weight.shape) != shape:
            named = context.info.model if isinstance(context.info, CompressedInfo) else None
            where = file if sparse else context.options.original or named
            raise CheckpointError(f"{where}: has no matrix {name} of shape {list(shape)}, as mode 'mixed-rank' needs")
        found[matrix.name] = weight.to(model.device, model.dtype).clone(), None if bias is None else bias.clone()
    return found


MODE = Mode(
    name="mixed-rank",
    paper="arXiv 2306.14152",
    summary="the factors, in steps that replace them by the original or pruned weight ever more rarely (LPAF)",
    defaults=factors.MODE.defaults,  # the same parameters are trained
    prepare=prepare,
    options=MixedOptions,
    check=lambda context: context.factored,
)
