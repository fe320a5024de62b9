"""What a tuning mode is: what it trains in a loaded model, and how that becomes a checkpoint again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.checkpoint.export import biased_skeleton
from bolaco.checkpoint.info import CompressedInfo, TunedInfo
from bolaco.errors import UnsupportedModelError
from bolaco.layers import Entry, FactoredLinear, SplitLinear, put_module
from bolaco.models.find import inspect_structure
from bolaco.models.lowrank import is_compressed
from bolaco.models.size import coded_layers
from bolaco.models.structure import Structure, has_module, prefix_of
from bolaco.plugins import Registry, in_folder
from bolaco.progress import Reporter
from bolaco.settings import Section
from bolaco.tune.settings import TuneSettings


class Options(Section):
    """Base class of the options of a mode; as it is, it has none."""


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a decoder block, dense or factored.

    A fused projection (qkv, gate_up) is one matrix, unless it was split when it was compressed.

    Attributes:
        name: name of its module in the causal model.
        layer: index of the decoder block.
        types: its type, one of ``q k v o gate up down``; several for a fused projection.
        entry: what ``config.lowrank["matrices"]`` says of it, to be changed whenever the kind of layer changes; None
            where there is no entry.
    """

    name: str
    layer: int
    types: tuple[str, ...]
    entry: Entry | None

    def of(self, model: nn.Module) -> nn.Module:
        """The module that is in its place now."""
        return model.get_submodule(self.name)

    def put(self, model: nn.Module, module: nn.Module) -> None:
        """Puts another module in its place."""
        put_module(model, self.name, module)


@dataclass
class Context:
    """What a mode is given.

    Attributes:
        model: the model to tune, which the mode changes in place; none of its parameters requires a gradient.
        settings: the settings of the run, with all defaults filled in.
        options: the mode's own options, an instance of ``Mode.options``.
        info: content of the ``bolaco.json`` beside the model; None if there is none.
        tokens: ``tokens(n)`` gives the first n training sequences as token ids ``[1, length]``, or all if there are
            fewer; for modes that calibrate on text.
        original: ``original(name)`` loads another model to the same device and number format. ``original(None)`` loads
            the one that this model was compressed from, or raises UnsupportedModelError if ``info`` does not name it.
        folder: where a mode may keep what took long to compute, for when the run is interrupted; it depends on
            everything that the mode is given. None in all processes of torchrun but the first.
        reporter: shows progress.
    """

    model: PreTrainedModel
    settings: TuneSettings
    options: Any
    info: CompressedInfo | TunedInfo | None
    tokens: Callable[[int], list[Tensor]]
    original: Callable[[str | None], PreTrainedModel]
    folder: Path | None = None
    reporter: Reporter = field(default_factory=lambda: Reporter(quiet=True))

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """The matrices of the types to be tuned, in order of execution.

        Raises:
            UnsupportedModelError: the model's structure is not known.
        """
        types = self.settings.types
        return tuple(m for m in matrices_of(self.model) if types is None or set(m.types) & set(types))

    @cached_property
    def factored(self) -> tuple[Matrix, ...]:
        """Of these matrices, the factored ones.

        Raises:
            UnsupportedModelError: there are none.
        """
        found = tuple(m for m in self.matrices if isinstance(m.of(self.model), FactoredLinear))
        if not found:
            types = self.settings.types
            among = "" if types is None else f" of type {', '.join(types)}"
            raise UnsupportedModelError(
                f"{self.settings.model}: mode {self.settings.mode!r} tunes factored matrices, and this model has "
                f"none{among}; compress it first, or use --mode continued or lora"
            )
        return found


@dataclass(frozen=True)
class Moments:
    """What AdamW knows of gradients after some steps, by the names of parameters.

    Attributes:
        mean, square: running means of the gradients and of their squares.
        steps: how many there were.
    """

    mean: dict[str, Tensor]
    square: dict[str, Tensor]
    steps: int


@dataclass
class Prepared:
    """What a mode says of the model it has prepared. Parameters that require a gradient will be trained.

    Attributes:
        finish: called once, after training: undoes or merges what was only there for training, and returns the model
            to save with ``save_pretrained``.
        touched: names of the modules and parameters, in the model as it was loaded, that may be different in the
            result. Every other tensor of the result is compared with the input's, bit for bit.
        on_step: ``on_step(step, steps)``, called before every optimiser step, from step 0; for schedules. In a run that
            is limited by time, ``step`` follows the clock where that is ahead.
        save_extra: writes what belongs to the result, but is not part of the model, into the folder of the result.
        alone: whether that is the whole result: it names the model that was tuned, which is not written again.
        moments: what the optimizer begins with.
        note: one or two sentences for the model card: what users of the result have to know.
    """

    finish: Callable[[], PreTrainedModel]
    touched: frozenset[str]
    on_step: Callable[[int, int], None] | None = None
    save_extra: Callable[[Path], None] | None = None
    alone: bool = False
    moments: Moments | None = None
    note: str = ""


@dataclass(frozen=True)
class Defaults:
    """A mode's training settings, those of its paper if it has any; ``distill_rate`` is for runs with a teacher."""

    learning_rate: float
    distill_rate: float | None = None
    epochs: float = 1.0
    warmup: float = 0.0
    schedule: str = "linear"
    final_rate: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Mode:
    """A tuning mode.

    Attributes:
        name: what ``--mode`` takes.
        paper: where it is from, such as ``arXiv 2405.10616``.
        summary: one line for ``bolaco methods``.
        defaults: training settings for whatever the user does not set.
        prepare: makes the model of a context ready for training, in place. It must depend on the context and torch's
            random generator (which is seeded) only: a run that continues after an interruption calls it again, then
            loads the trained parameters by name.
        options: class of its options.
        exact_start: whether the prepared model's outputs are those of the input, up to rounding. If not, the
            perplexity before the first step is measured and recorded too.
        same_ranks: whether the result has the ranks and the number of parameters of the input.
        coded: whether it can tune models whose matrices are coded into tables (by mode ``sketch``).
        check: raises whatever is wrong with options and model, before anything that takes long.
        attach: puts adapters that the mode keeps in files of their own on the result, so that it is measured with them.
        written: options that only say how the result is written; what was trained does not depend on them.
        stored: the number format of the result, from the mode's options and that of the input; None is the latter.
    """

    name: str
    paper: str
    summary: str
    defaults: Defaults
    prepare: Callable[[Context], Prepared]
    options: type[Options] = Options
    exact_start: bool = True
    same_ranks: bool = True
    coded: bool = False
    check: Callable[[Context], Any] | None = None
    attach: Callable[[PreTrainedModel, Path], None] | None = None
    written: tuple[str, ...] = ()
    stored: Callable[[Any, torch.dtype], torch.dtype] | None = None


def matrices_of(model: PreTrainedModel) -> tuple[Matrix, ...]:
    """All matrices in the decoder blocks of a dense or a compressed model, in order of execution.

    Raises:
        UnsupportedModelError: the model's structure is not known.
    """
    entries: dict[str, Entry] = model.config.lowrank["matrices"] if is_compressed(model.config) else {}
    prefix = prefix_of(model)
    found: dict[str, Matrix] = {}
    for site in structure_of(model).sites:
        name, entry = site.module, entries.get(site.module)
        if site.expert is not None and not has_module(model.base_model, name):
            continue  # experts whose matrices are in one tensor stay as they are
        if site.part is not None and isinstance(model.base_model.get_submodule(name), SplitLinear):
            name = f"{name}.parts.{site.part}"
            entry = next(part for part in entries[site.module]["parts"] if part["name"] == site.part)
        # Several sites of one module: a fused projection.
        types = (*found[name].types, site.type) if name in found else (site.type,)
        found[name] = Matrix(prefix + name, site.layer, types, entry)
    return tuple(found.values())


def structure_of(model: PreTrainedModel) -> Structure:
    """Blocks and matrices of a dense model; of a compressed one, those of the dense model it was made from.

    Raises:
        UnsupportedModelError: the model's structure is not known.
    """
    return inspect_structure(biased_skeleton(model) if is_compressed(model.config) else model)


def is_coded(model: PreTrainedModel) -> bool:
    """Whether any matrix of the model is coded into tables (by mode ``sketch``)."""
    return bool(coded_layers(model))


MODES = Registry("mode", "mode", Mode, in_folder("bolaco.tune.modes", "MODE"), group="bolaco.modes")
