"""What a tuning mode is: what it trains in a loaded model, and how that becomes a checkpoint again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.checkpoint.export import biased_skeleton
from bolaco.checkpoint.info import CompressedInfo, TunedInfo
from bolaco.errors import UnsupportedModelError
from bolaco.layers import Entry, FactoredLinear, SketchLinear, SplitLinear, put_module
from bolaco.models.lowrank import is_compressed
from bolaco.models.structure import Structure, inspect_structure, prefix_of
from bolaco.plugins import Registry, in_folder
from bolaco.progress import Reporter
from bolaco.settings import Section
from bolaco.tune.settings import TuneSettings


class Options(Section):
    """Options of one mode; a mode subclasses it with its own."""


@dataclass(frozen=True)
class Matrix:
    """One layer of a decoder block: a factored matrix, or a dense one (fused projections are one, unless split).

    Attributes:
        name: of the module, in the causal model.
        layer: index of the decoder block.
        types: matrix types it holds, of ``q k v o gate up down``; several only where it is fused.
        entry: its entry in ``config.lowrank["matrices"]``, to be changed with the layer; None where it has none.
    """

    name: str
    layer: int
    types: tuple[str, ...]
    entry: Entry | None

    def of(self, model: nn.Module) -> nn.Module:
        """The module as it is now."""
        return model.get_submodule(self.name)

    def put(self, model: nn.Module, module: nn.Module) -> None:
        """Replaces the module."""
        put_module(model, self.name, module)


@dataclass
class Context:
    """What a mode gets to know.

    Attributes:
        model: the loaded model, to be changed in place; no parameter requires a gradient.
        settings: of the run, with every default filled in.
        options: the mode's options, validated.
        info: ``bolaco.json`` of the input, None if there is none.
        tokens: called with a number, gives at most so many sequences of the data as token ids ``[1, length]`` each,
            for modes that calibrate.
        original: loads the model that was compressed, on the same device and in the same type: the one of this name,
            or the one that ``bolaco.json`` names.
        folder: of the run's intermediate results, where a mode may keep what took long to prepare; None in processes
            that are not the first.
        reporter: where progress goes.
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
        """Every matrix of the types that are tuned, in order of execution.

        Raises:
            UnsupportedModelError: the model's structure is not known.
        """
        types = self.settings.types
        return tuple(m for m in matrices_of(self.model) if types is None or set(m.types) & set(types))

    @cached_property
    def factored(self) -> tuple[Matrix, ...]:
        """Those that are factored.

        Raises:
            UnsupportedModelError: there is none.
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


@dataclass
class Prepared:
    """A model ready to be trained: parameters that require a gradient are trained, the others are not.

    Attributes:
        finish: called once after training; folds what folds, and returns the model to save with ``save_pretrained``.
        touched: names of modules or parameters of the loaded model that may come out changed. Everything else in the
            result is compared with the input, bit by bit.
        on_step: called before every optimiser step with its number, from 0, and the number of all; for schedules. Where
            time ends sooner the number is the one that the clock stands for.
        save_extra: writes what belongs to the result and is not in the model into its folder.
        note: for the model card, what a user of the result has to know; a sentence or two.
    """

    finish: Callable[[], PreTrainedModel]
    touched: frozenset[str]
    on_step: Callable[[int, int], None] | None = None
    save_extra: Callable[[Path], None] | None = None
    note: str = ""


@dataclass(frozen=True)
class Defaults:
    """A mode's settings of training, from its paper where it has one."""

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
    """A mode, as ``--mode`` names it.

    Attributes:
        name: as on the command line.
        paper: where it comes from.
        summary: one line.
        defaults: of training.
        prepare: changes the model of a context in place so that it can be trained. Its outputs stay the same up to
            rounding, unless ``exact_start`` is false. It depends on nothing but the context and torch's generator,
            which is seeded: a run that goes on after an interruption prepares again, then loads what was trained by
            name.
        options: pydantic class of its options.
        exact_start: outputs before the first step are the input's.
        same_ranks: the result has the ranks and the parameter count of the input.
        coded: takes models whose matrices are coded into tables (mode ``sketch``).
        check: raises what is wrong with the options for this model, before anything long is done.
        attach: puts on the loaded result what else is in its folder, before it is measured.
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


def matrices_of(model: PreTrainedModel) -> tuple[Matrix, ...]:
    """Every matrix of the decoder, in a dense model or a compressed one.

    Raises:
        UnsupportedModelError: the model's structure is not known.
    """
    entries: dict[str, Entry] = model.config.lowrank["matrices"] if is_compressed(model.config) else {}
    prefix = prefix_of(model)
    found: dict[str, Matrix] = {}
    for site in structure_of(model).sites:
        name, entry = site.module, entries.get(site.module)
        if site.part is not None and isinstance(model.base_model.get_submodule(name), SplitLinear):
            name = f"{name}.parts.{site.part}"
            entry = next(part for part in entries[site.module]["parts"] if part["name"] == site.part)
        types = (*found[name].types, site.type) if name in found else (site.type,)
        found[name] = Matrix(prefix + name, site.layer, types, entry)
    return tuple(found.values())


def structure_of(model: PreTrainedModel) -> Structure:
    """Blocks and matrices of a dense model, or of the one that a compressed model was made from.

    Raises:
        UnsupportedModelError: the model's structure is not known.
    """
    return inspect_structure(biased_skeleton(model) if is_compressed(model.config) else model)


def is_coded(model: PreTrainedModel) -> bool:
    """Whether a matrix of the model is coded into tables."""
    return any(isinstance(module, SketchLinear) for module in model.modules())


MODES = Registry("mode", "mode", Mode, in_folder("bolaco.tune.modes", "MODE"), group="bolaco.modes")
