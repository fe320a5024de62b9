"""Decoder blocks of the model as it will be, one after the other, and what their matrices are called with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bolaco.delta.form import Form
from bolaco.delta.method import DeltaTask
from bolaco.errors import NonFiniteError, UnsupportedModelError
from bolaco.models.structure import Site, weight_of
from bolaco.models.walk import BlockRunner, by_sequence


class DeltaWalk:
    """The blocks of the fine-tuned model with their compressed deltas in the place of the real ones.

    Args:
        task: whose blocks.

    Attributes:
        layer: the block that is next.

    Raises:
        UnsupportedModelError: the model's blocks cannot be run one by one.
    """

    def __init__(self, task: DeltaTask) -> None:
        subject = task.subject
        if subject.structure.walk.hooks:
            raise UnsupportedModelError(
                f"{type(subject.model).__name__}: blocks cannot be run one by one ({subject.structure.walk.hooks}), "
                "which this method needs; take --method lowrank or ultradelta"
            )
        self.task, self.subject, self.layer = task, subject, 0
        self.runner = BlockRunner(subject.model, subject.structure, task.tokens, task.calibration.batch)
        self.hidden = self.runner.embed()

    @contextmanager
    def deltas(self, layer: int, deltas: Mapping[str, Tensor]) -> Iterator[None]:
        """While it lasts, the matrices of a block are the base's plus these deltas ``[out, in]``, by site name."""
        subject, before = self.subject, {}
        for site in subject.structure.of_layer(layer):
            weight = weight_of(subject.model.base_model.get_submodule(site.module))[slice(*site.rows)]
            before[site.name] = weight.detach().clone()
            base = weight_of(subject.base.base_model.get_submodule(site.module))[slice(*site.rows)]
            new = base.to(weight.dtype) if site.name not in deltas else (base + deltas[site.name].to(base.device))
            weight.data.copy_(new)
        try:
            yield
        finally:
            for site in subject.structure.of_layer(layer):
                weight = weight_of(subject.model.base_model.get_submodule(site.module))[slice(*site.rows)]
                weight.data.copy_(before[site.name])

    def second_moments(self, layer: int) -> dict[str, Tensor]:
        """``E[x x^T]`` ``[in, in]``, float64, of what the matrices are called with, by input group.

        Raises:
            NonFiniteError: NaN or infinity among the inputs.
        """
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        size = [0]

        def watch(site: Site) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                x = by_sequence(site, args[0].detach(), size[0])
                x = (x if site.expert is None else x[:, x[0].any(dim=-1)]).reshape(-1, x.shape[-1])
                x = x if x.dtype == torch.float64 else x.float()
                found = sums.setdefault(site.input_group, torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64))
                found += (x.T @ x).cpu()
                counts[site.input_group] = counts.get(site.input_group, 0) + len(x)

            return hook

        handles, seen = [], set()
        for name, sites in self.subject.structure.modules(layer).items():
            if sites[0].input_group not in seen:
                seen.add(sites[0].input_group)
                module = self.subject.model.base_model.get_submodule(name)
                handles.append(module.register_forward_pre_hook(watch(sites[0])))
        try:
            with torch.no_grad():
                for rows in self.runner.slices:
                    size[0] = rows.stop - rows.start
                    self.runner.run(layer, self.hidden[rows], rows=rows)
        finally:
            for handle in handles:
                handle.remove()
        for group, total in sums.items():
            if not torch.isfinite(total).all():
                raise NonFiniteError(f"block {layer}, input of {group}: NaN or infinity; try --dtype float32")
        return {group: total / max(counts[group], 1) for group, total in sums.items()}

    def advance(self, forms: Mapping[str, Form]) -> None:
        """Goes through the next block, whose deltas are these, by site name."""
        with self.deltas(self.layer, {name: form.dense() for name, form in forms.items()}):
            self.runner.advance(self.layer, self.hidden)
        self.layer += 1
