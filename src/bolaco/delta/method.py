"""What a method is: a function that makes the delta of every matrix small, within a number of bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bolaco.data.settings import Calibration
from bolaco.delta.form import Form, read_form
from bolaco.delta.pair import DeltaSubject
from bolaco.errors import BudgetError, CheckpointError
from bolaco.models.structure import Site
from bolaco.plugins import Registry, in_folder
from bolaco.progress import Reporter
from bolaco.settings import Section
from bolaco.work.blockstore import BlockStore

# What a number of a delta is counted as where nothing is compressed.
DENSE_BITS = 16


class NoOptions(Section):
    """Of a method that has none."""


class FormStore(BlockStore):
    """The deltas of a model's matrices in one folder, a file for each decoder block."""

    def save(self, layer: int, forms: Mapping[str, Form]) -> None:
        """Writes those of one block, by site name."""
        tensors: dict[str, Tensor] = {}
        for name, form in forms.items():
            known = json.dumps({"form": form.name, "entry": form.entry(), "shape": form.shape}, sort_keys=True)
            tensors[f"{name}/"] = torch.frombuffer(bytearray(known.encode()), dtype=torch.uint8)
            tensors |= {f"{name}/{key}": tensor for key, tensor in form.tensors().items()}
        self.write(layer, tensors)

    def load(self, layer: int) -> dict[str, Form]:
        """Reads them.

        Raises:
            ResumeError: missing or damaged; names the file.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.read(layer).items():
            name, _, own = key.partition("/")
            found.setdefault(name, {})[own] = tensor
        try:
            return {name: _form(tensors) for name, tensors in found.items()}
        except (ValueError, KeyError, CheckpointError) as error:
            raise self.damaged(layer, error) from error


def _form(tensors: dict[str, Tensor]) -> Form:
    known = json.loads(tensors.pop("").numpy().tobytes())
    return read_form(known["form"], known["entry"], tensors, tuple(known["shape"]))


@dataclass(frozen=True)
class DeltaTask:
    """What a method is given.

    Attributes:
        subject: the deltas; its model is the fine-tuned one.
        share: bits of the result as a share of 16 bits for every number of the matrices.
        tokens: ``[sequences, length]`` of calibration text; without sequences for methods that read none.
        calibration: batch and groups of the statistics.
        store: where the result goes, block by block; what is there already is not made again.
        folder: of a stage of this run, by its name and what it depends on beside models and text, so that an
            interrupted run finds it again.
        reporter: where progress goes.
        seed: of the run.
    """

    subject: DeltaSubject
    share: Fraction
    tokens: Tensor
    calibration: Calibration
    store: FormStore
    folder: Callable[[str, Any], Path]
    reporter: Reporter
    seed: int

    @property
    def layers(self) -> int:
        """Decoder blocks."""
        return self.subject.structure.num_layers

    def sites(self, layer: int) -> list[Site]:
        """Matrices of a block that fine-tuning has changed; the others have the empty delta."""
        return [site for site in self.subject.structure.of_layer(layer) if bool(self.subject.weight(site).any())]

    def budget(self, site: Site) -> int:
        """Bits of one matrix, where all are given the same share."""
        return int(self.share * DENSE_BITS * site.size)

    @property
    def total(self) -> int:
        """Bits of all matrices together."""
        return int(self.share * DENSE_BITS * sum(site.size for site in self.subject.structure.sites))

    def each_block(self, stage: str, make: Callable[[Site, Tensor], Form]) -> None:
        """Makes and stores every matrix by itself, from its delta ``[out, in]``."""
        with self.reporter.stage(stage, self.layers) as tick:
            for layer in range(self.layers):
                if not self.store.has(layer):
                    sites = self.sites(layer)
                    self.store.save(layer, {site.name: make(site, self.subject.weight(site).cpu()) for site in sites})
                tick(1)


# compress(task, options) stores the forms of all blocks.
Compress = Callable[[DeltaTask, Any], None]


@dataclass(frozen=True, kw_only=True)
class DeltaMethod:
    """A way to make a delta small.

    Attributes:
        name: what ``--method`` takes.
        paper: where it is from.
        summary: one line for ``bolaco methods``.
        compress: does it.
        options: what ``--set options.NAME=VALUE`` can change.
        reads_text: whether it needs calibration text.
    """

    name: str
    paper: str
    summary: str
    compress: Compress
    options: type[Section] = NoOptions
    reads_text: bool = True


def no_room(site: Site, budget: int, least: int) -> BudgetError:
    """The error where not even the least form of a matrix fits."""
    return BudgetError(
        f"{site.name}: {budget:,} bits are too few, {least:,} are needed for {site.out_features} x {site.in_features}; "
        f"raise --ratio to {Fraction(least, DENSE_BITS * site.size).limit_denominator(10_000)} or more"
    )


DELTA_METHODS: Registry[DeltaMethod] = Registry(
    "method of delta", "method", DeltaMethod, in_folder("bolaco.delta.methods", "METHOD"), group="bolaco.deltas"
)
"""What ``bolaco delta --method`` takes."""
