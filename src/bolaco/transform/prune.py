"""Gradual first-order pruning, the first stage of LPAF (arXiv 2306.14152): the decoder's matrices, element by element.

While the model is trained on text, the share of zeros grows from 0 to ``s`` along ``s (1 - (1 - t)^3)``. Which elements
stay is decided by scores that collect, step after step, ``|dL/dW W|`` (how much the loss feels an element) or
``-(dL/dW) W`` (whether training moves it away from zero; of use after many steps only). A masked element keeps its last
value and its score goes on, so it can come back.

Deviations from the paper: the loss is that of language modelling on the calibration text, not of a task; only the
decoder's matrices are trained; every matrix gets the same sparsity. What it costs: a copy of the model in float32, with
five more numbers for each element of these matrices. Logits are computed a few positions at a time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.errors import NonFiniteError
from bolaco.evaluation.losses import summed_losses
from bolaco.evaluation.objective import Head, final_hidden
from bolaco.models.structure import Site, Structure, weight_of
from bolaco.models.subject import Subject
from bolaco.settings import Section
from bolaco.statistics.importance import INPUT_IMPORTANCE, OUTPUT_IMPORTANCE
from bolaco.statistics.stored import StatisticStore
from bolaco.transform.subject import SubjectTask
from bolaco.work.blockstore import BlockStore

# In the result's folder: the pruned matrices ``[out, in]`` by name.
SPARSE_FILE = "sparse.safetensors"
# Share of the steps in which the sparsity grows; in the rest the elements that stay settle.
_GROWING = 0.8


class PruningOptions(Section):
    """How far weights are pruned, and by what."""

    sparsity: float | None = Field(None, gt=0, lt=1, description="share of zeros at the end; default: 1 - keep")
    steps: int = Field(64, gt=0, description="AdamW steps on the calibration text")
    batch: int = Field(4, gt=0, description="sequences a step")
    learning_rate: float = Field(2e-5, gt=0)
    score: Literal["sensitivity", "movement"] = Field(
        "sensitivity", description="what elements are kept by: the sum over steps of |dL/dW W|, or of -(dL/dW) W"
    )
    keep_sparse: bool = Field(False, description=f"write the pruned matrices to {SPARSE_FILE} in the result")


@dataclass(frozen=True)
class Pruned:
    """One matrix ``[out, in]`` after pruning.

    Attributes:
        weight: with its zeros, in the model's precision.
        outputs, inputs: ``[out]`` and ``[in]``, mean over the steps of ``|dL/dW W|``, added up over the elements of a
            row or a column that were not masked.
    """

    weight: Tensor
    outputs: Tensor
    inputs: Tensor


def sparsity_at(t: float, sparsity: float) -> float:
    """The cubic schedule: share of zeros at ``t`` of the way, ``sparsity`` from 1 on."""
    return sparsity * (1 - (1 - min(t, 1.0)) ** 3)


def kept_elements(scores: Tensor, sparsity: float) -> Tensor:
    """Mask of the elements with the highest scores; of ``n`` exactly ``floor(sparsity n)`` are false.

    Of equal scores the first ones go.
    """
    flat = scores.flatten()
    zeros = math.floor(sparsity * len(flat) + 1e-9)
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(zeros).values
    mask = flat >= threshold
    left = zeros - int((~mask).sum())
    mask[(flat == threshold).nonzero()[:left, 0]] = False
    return mask.view_as(scores)


class _Matrix:
    """One matrix during pruning: its values without the mask, its scores and its mask."""

    def __init__(self, site: Site, parameter: nn.Parameter, transposed: bool) -> None:
        self.name = site.name
        self._rows, self._parameter, self._transposed = slice(*site.rows), parameter, transposed
        self.values = self._view(parameter.detach()).clone()
        self.scores = torch.zeros_like(self.values)
        self.mask = torch.ones_like(self.values, dtype=torch.bool)
        self.outputs = torch.zeros(site.out_features, dtype=torch.float64, device=self.values.device)
        self.inputs = torch.zeros(site.in_features, dtype=torch.float64, device=self.values.device)

    def _view(self, tensor: Tensor) -> Tensor:
        return (tensor.T if self._transposed else tensor)[self._rows]

    def observe(self, score: str) -> None:
        """Adds what the gradient says to the scores, of the kind ``score``, then masks the gradient."""
        assert self._parameter.grad is not None
        gradient = self._view(self._parameter.grad)
        gain = gradient * self.values
        if score == "movement":
            self.scores -= gain
        gain.abs_()
        if score == "sensitivity":
            self.scores += gain
        gain *= self.mask
        self.outputs += gain.sum(dim=1, dtype=torch.float64)
        self.inputs += gain.sum(dim=0, dtype=torch.float64)
        gradient *= self.mask

    def update(self, sparsity: float) -> None:
        """Keeps the values that the optimizer has changed, then masks the matrix anew, to ``sparsity``."""
        held = self._view(self._parameter.data)
        self.values = torch.where(self.mask, held, self.values)
        self.mask = kept_elements(self.scores, sparsity)
        held.copy_(self.values * self.mask)


def prune(
    model: PreTrainedModel,
    structure: Structure,
    tokens: Tensor,
    sparsity: float,
    settings: PruningOptions,
    seed: int = 0,
    tick: Callable[[int], Any] | None = None,
) -> dict[str, Pruned]:
    """Prunes a copy of ``model``; returns its matrices by name.

    Args:
        model: the model, in evaluation mode; not changed.
        structure: its structure.
        tokens: ``[sequences, length]`` of text.
        sparsity: share of zeros in every matrix at the end.
        settings: steps, batch and learning rate.
        seed: of the order of the sequences.
        tick: called with 1 after each step.

    Raises:
        NonFiniteError: a loss or gradient with NaN or infinity.
    """
    dtype = model.dtype
    copied: Any = copy.deepcopy(model).float().requires_grad_(False)
    head = Head(copied)
    matrices: list[_Matrix] = []
    parameters: dict[str, nn.Parameter] = {}
    for unit in structure.sites:
        for site in unit.members:
            module = copied.base_model.get_submodule(site.module)
            parameters[site.module] = module.weight
            matrices.append(_Matrix(site, module.weight, isinstance(module, Conv1D)))
    trained = list(parameters.values())
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    warm = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 1 - (step - warm) / max(settings.steps - warm + 1, 1))
    )
    generator = torch.Generator().manual_seed(seed)
    growing = max(1, math.floor(_GROWING * settings.steps))
    order = torch.empty(0, dtype=torch.int64)
    with torch.enable_grad():
        for step in range(settings.steps):
            while len(order) < settings.batch:
                order = torch.cat([order, torch.randperm(len(tokens), generator=generator)])
            rows, order = tokens[order[: settings.batch]].to(model.device), order[settings.batch :]
            optimizer.zero_grad(set_to_none=True)
            targets = rows[:, 1:]
            loss = summed_losses(head, final_hidden(copied, rows)[:, :-1], targets)[0] / targets.numel()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                raise NonFiniteError(f"pruning, step {step}: NaN or infinity; lower method.learning_rate")
            for matrix in matrices:
                matrix.observe(settings.score)
            optimizer.step()
            schedule.step()
            now = sparsity_at((step + 1) / growing, sparsity)
            for matrix in matrices:
                matrix.update(now)
            if tick:
                tick(1)
    return {
        matrix.name: Pruned(
            (matrix.values * matrix.mask).to(dtype).cpu(),
            (matrix.outputs / settings.steps).float().cpu(),
            (matrix.inputs / settings.steps).float().cpu(),
        )
        for matrix in matrices
    }


def with_weights(model: PreTrainedModel, structure: Structure, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of ``model`` with these matrices ``[out, in]`` by name, all of them; everything else is shared."""
    tensors = (*model.parameters(), *model.buffers())
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    rows: dict[str, list[Tensor]] = {}
    for unit in structure.sites:
        for site in sorted(unit.members, key=lambda s: s.rows):
            rows.setdefault(site.module, []).append(weights[site.name])
    for name, parts in rows.items():
        module = copied.base_model.get_submodule(name)
        whole = torch.cat(parts).to(weight_of(module))
        module.weight = nn.Parameter(whole.T.contiguous() if isinstance(module, Conv1D) else whole, requires_grad=False)
    return copied


@dataclass(frozen=True)
class PrunedSubject(Subject):
    """A pruned copy of a model.

    Attributes:
        kept: the pruned matrices by name where they are to be kept in the result, else None.
    """

    kept: Mapping[str, Tensor] | None = None

    def save_extra(self, folder: Path) -> None:
        """Writes the pruned matrices, if they are to be kept."""
        if self.kept is not None:
            save_file(dict(self.kept), folder / SPARSE_FILE, metadata={"format": "pt"})


def pruned_subject(task: SubjectTask) -> PrunedSubject:
    """Prunes a copy of the model; its matrices and their importances are in the task's folder, found there again."""
    model, structure = task.subject.model, task.subject.structure
    options: PruningOptions = task.options
    layers = range(structure.num_layers)
    store = BlockStore(task.folder / "pruned")
    if not store.complete(len(layers)):
        sparsity = 1 - task.keep if options.sparsity is None else options.sparsity
        with task.reporter.stage("prune", options.steps) as tick:
            found = prune(model, structure, task.tokens, sparsity, options, task.seed, tick)
        outputs = StatisticStore(task.folder / OUTPUT_IMPORTANCE.name, OUTPUT_IMPORTANCE)
        inputs = StatisticStore(task.folder / INPUT_IMPORTANCE.name, INPUT_IMPORTANCE)
        for layer in layers:
            names = [site.name for unit in structure.of_layer(layer) for site in unit.members]
            outputs.put(layer, {name: found[name].outputs for name in names})
            inputs.put(layer, {name: found[name].inputs for name in names})
            store.write(layer, {name: found[name].weight for name in names})
    weights = {name: weight for layer in layers for name, weight in store.read(layer).items()}
    pruned = with_weights(model, structure, weights)
    return PrunedSubject(pruned, structure, weights if options.keep_sparse else None)
