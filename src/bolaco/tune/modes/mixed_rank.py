"""Factors are trained in a model that often still has the weights they replace: LPAF's third stage (arXiv 2306.14152).

In every step, each factored matrix is replaced with probability p by the weight W that was factored:
``z W + (1 - z) B A`` with ``z ~ Bernoulli(p)``, drawn for each matrix by itself. Only the factors B and A are trained.
p falls linearly from ``start`` in the first step to 0 after a share ``decay`` of the steps. From there on, and in
evaluation and result, W is not used. If a draw replaces all matrices, the one nearest to the other outcome keeps its
factors: the loss would depend on nothing that is trained, and the step be lost.

W is the pruned weight if there is a file ``sparse.safetensors`` beside the model, and otherwise the weight of the
original model, which ``bolaco.json`` names. The paper gives no schedule in numbers: the linear one and the defaults of
its options are ours, and the learning rate is WeLore's for factors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.errors import CheckpointError
from bolaco.layers import FactoredLinear, FollowerLinear, LowRankLinear
from bolaco.models.find import inspect_structure
from bolaco.models.load import resolve
from bolaco.models.structure import prefix_of
from bolaco.models.subject import Subject
from bolaco.transform.prune import SPARSE_FILE
from bolaco.tune.factored import stored, two_factors
from bolaco.tune.mode import Context, Matrix, Mode, Options, Prepared, structure_of
from bolaco.tune.modes import factors
from bolaco.tune.teacher import original_name

# Weight ``[out, in]`` and bias ``[out]`` or None, by the name of the matrix.
Weights = dict[str, tuple[Tensor, Tensor | None]]


class MixedOptions(Options):
    """How often factors are replaced, for how long, and by what."""

    start: float = Field(
        0.9, ge=0, lt=1, description="probability of the original weight in the first step; at 1 nothing is trained"
    )
    original: str | None = Field(None, description="the model that was factored; default: the one bolaco.json names")
    decay: float = Field(0.5, gt=0, le=1, description="share of the steps after which that probability is zero")


class MixedLinear(nn.Module):
    """Two factors that are trained, and the weight that they replace.

    Args:
        layer: the factors.
        weight: the weight, ``[out, in]``.
        bias: the bias that belongs to the weight, ``[out]``, or None.

    Attributes:
        mixed: z: whether the weight is used instead of the factors; has no effect in evaluation mode.
    """

    def __init__(self, layer: LowRankLinear | FollowerLinear, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.layer, self.mixed = layer, False
        # Not part of the state dict: neither checkpoints nor the result need them.
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.weight: Tensor
        self.bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        if not (self.mixed and self.training):
            made: Tensor = self.layer(x)
            return made
        # Gives the factors a gradient of zero instead of none. Otherwise processes that train together would wait for
        # gradients that never come.
        nothing = sum(0.0 * parameter.flatten()[0] for parameter in self.layer.parameters() if parameter.requires_grad)
        return F.linear(x, self.weight, self.bias) + nothing


def probability(step: int, steps: int, start: float, decay: float) -> float:
    """The probability p of the original weight in a step; steps count from 0."""
    return start * max(0.0, 1 - step / (decay * steps))


def draw(seed: int, step: int, name: str) -> float:
    """A number in [0, 1) for one matrix in one step, evenly distributed.

    It depends on the arguments only, so that a run that was interrupted continues as if it had not been.
    """
    found = hashlib.sha256(f"{seed} {step} {name}".encode()).digest()
    return int.from_bytes(found[:4], "big") / 2**32


def replaced_in(seed: int, step: int, names: Collection[str], chance: float) -> set[str]:
    """The matrices with z = 1 in a step: each with probability ``chance``, but never all of them."""
    draws = {name: draw(seed, step, name) for name in names}
    found = {name for name, drawn in draws.items() if drawn < chance}
    return found - {max(draws, key=draws.__getitem__)} if len(found) == len(draws) else found


def prepare(context: Context) -> Prepared:
    """Puts the weights that were factored beside the factors, which require gradients."""
    model, options, seed = context.model, context.options, context.settings.seed
    matrices = context.factored
    weights = _replaced(context, matrices)
    mixed: dict[str, MixedLinear] = {}
    for name, layer in two_factors(model, matrices).items():
        weight, bias = weights[name]
        mixed[name] = MixedLinear(layer, weight, bias)
        for linear in layer.linears().values():
            linear.weight.requires_grad_(True)
    for matrix in matrices:
        matrix.put(model, mixed[matrix.name].train(model.training))

    def on_step(step: int, steps: int) -> None:
        chance = probability(step, steps, options.start, options.decay)
        found = replaced_in(seed, step, mixed.keys(), chance)
        for name, module in mixed.items():
            module.mixed = name in found

    def finish() -> PreTrainedModel:
        for matrix in matrices:
            matrix.put(model, mixed[matrix.name].layer)
        stored(model, matrices)
        return model

    return Prepared(finish, frozenset(matrix.name for matrix in matrices), on_step)


def _replaced(context: Context, matrices: tuple[Matrix, ...]) -> Weights:
    """Weight and bias of each matrix before it was factored.

    Raises:
        CheckpointError: ``sparse.safetensors`` is damaged, or a matrix is neither in it nor in the original.
        UnsupportedModelError: the original is needed, and it is not known or cannot be loaded.
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
    # The file holds no biases.
    if not sparse or any(sites[matrix.name].bias for matrix in matrices):
        whole = context.original(context.options.original)
        original = Subject(whole, inspect_structure(whole))
        known = {site.name: site for site in original.structure.sites}
    found = Weights()
    for matrix in matrices:
        name, layer = sites[matrix.name].name, matrix.of(model)
        assert isinstance(layer, FactoredLinear)  # these are what is called factored
        shape = (layer.out_features, layer.in_features)
        weight, bias = sparse.get(name), None
        if original is not None and name in known:
            bias = original.bias(known[name])
            weight = weight if sparse else original.weight(known[name])
        if weight is None or tuple(weight.shape) != shape:
            where = file if sparse else context.options.original or original_name(context.info)
            raise CheckpointError(f"{where}: has no matrix {name} of shape {list(shape)}, as mode 'mixed-rank' needs")
        found[matrix.name] = weight.to(model.device, model.dtype).clone(), None if bias is None else bias.clone()
    return found


MODE = Mode(
    name="mixed-rank",
    paper="arXiv 2306.14152",
    summary="the factors, in steps that replace them by the original or pruned weight ever more rarely (LPAF)",
    defaults=factors.MODE.defaults,  # that mode trains the same parameters
    prepare=prepare,
    options=MixedOptions,
    check=lambda context: context.factored,
)
