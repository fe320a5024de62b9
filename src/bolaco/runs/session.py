"""What every stage of a run is given: the model, its texts, and where results and progress go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from bolaco.data.texts import Texts, prepare_texts
from bolaco.evaluation.objective import check_tokens
from bolaco.models.experts import unfused
from bolaco.models.find import inspect_structure
from bolaco.models.load import check_finite, load_config, load_model, load_tokenizer, weights_fingerprint
from bolaco.models.lowrank import refuse_compressed
from bolaco.models.match import check_rebuildable
from bolaco.models.observe import observed
from bolaco.models.structure import Structure
from bolaco.progress import Reporter
from bolaco.recipe.recipe import Recipe
from bolaco.work.folder import Clock, WorkFolder


@dataclass(frozen=True)
class Source:
    """A model before its weights are read.

    Attributes:
        name: as the user wrote it.
        model: the model itself where the user has loaded it; it is not changed.
        config: its configuration.
        tokenizer: its tokenizer.
    """

    name: str
    model: PreTrainedModel | None
    config: Any
    tokenizer: Any


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    Attributes:
        name: as the user wrote it.
        model: in evaluation mode, not to be changed.
        working: the same with fused experts taken apart; what the structure's names refer to.
        tokenizer: of the model.
        structure: its decoder.
        identity: changes with any weight and with the kind of device, on which rounding depends.
        parameters: of the whole model.
    """

    name: str
    model: PreTrainedModel
    working: PreTrainedModel
    tokenizer: Any
    structure: Structure
    identity: str
    parameters: int

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter."""
        return self.model.dtype.itemsize


@dataclass(frozen=True)
class Session:
    """Where a run keeps what is finished, counts seconds, and says what it does."""

    folder: WorkFolder
    clock: Clock
    reporter: Reporter


def open_source(name: str, model: PreTrainedModel | None, tokenizer: Any) -> Source:
    """Reads configuration and tokenizer, unless they are given.

    Raises:
        UnsupportedModelError: they cannot be read, the model is compressed already, or a model that is given is not
            what its configuration makes.
    """
    if model is not None:
        check_rebuildable(model)
    config = model.config if model is not None else load_config(name)
    refuse_compressed(config)
    return Source(name, model, config, tokenizer if tokenizer is not None else load_tokenizer(name))


def texts_for(
    recipe: Recipe, source: Source, calibrates: bool | None = None, more: tuple[str, ...] = (), local: bool = False
) -> Texts:
    """The texts of a recipe; see :func:`bolaco.data.texts.prepare_texts`."""
    return prepare_texts(
        recipe.calibration,
        recipe.validation,
        recipe.evaluation,
        source.tokenizer,
        source.config,
        calibrates=recipe.calibrates if calibrates is None else calibrates,
        searches=recipe.searches,
        bos=recipe.bos,
        more=more,
        local=local,
    )


def load(source: Source, dtype: str, device: str, tokens: Tensor | None = None) -> Loaded:
    """Reads the weights, unless the model is given, and looks at what they are by running a few tokens.

    Raises:
        BolacoError: they cannot be read, are not finite, or the structure is not known.
    """
    model = source.model if source.model is not None else load_model(source.name, dtype, device, "refuse")
    check_finite(model)
    if tokens is not None:
        check_tokens(model, tokens)
    working = unfused(model)
    structure = observed(working, inspect_structure(working), tokens)
    identity = f"{weights_fingerprint(model)} {model.device.type}"
    parameters = sum(p.numel() for p in model.parameters())
    return Loaded(source.name, model, working, source.tokenizer, structure, identity, parameters)
