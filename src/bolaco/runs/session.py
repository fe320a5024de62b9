"""What every stage of a run is given: the model, its texts, and where results and progress go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.checkpoint.info import versions
from bolaco.data.memory import InMemory
from bolaco.data.texts import Texts, prepare_texts
from bolaco.evaluation.objective import check_tokens
from bolaco.models.experts import unfused
from bolaco.models.find import inspect_structure
from bolaco.models.load import (
    check_finite,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    weights_fingerprint,
)
from bolaco.models.lowrank import refuse_compressed
from bolaco.models.match import check_rebuildable
from bolaco.models.observe import observed
from bolaco.models.structure import Structure
from bolaco.models.turns import needs_streaming, take_turns, why_not_streamed
from bolaco.models.weights import StoredWeights, dtype_name, result_dtype, stored_weights
from bolaco.parallel import team
from bolaco.progress import Reporter
from bolaco.recipe.recipe import Recipe
from bolaco.runs.size import Shapes
from bolaco.work.folder import LOG_FILE, Clock, WorkFolder, work_beside


@dataclass(frozen=True)
class Source:
    """A model before its weights are read.

    Attributes:
        name: as the user wrote it.
        model: the model itself where the user has loaded it; it is not changed.
        config: its configuration.
        tokenizer: its tokenizer.
        given: texts in memory by their names, which recipes have as sources.
    """

    name: str
    model: PreTrainedModel | None
    config: Any
    tokenizer: Any
    given: Mapping[str, InMemory] = field(default_factory=dict)


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
        dtype: number format of the result; GGUF files are worked on in float32 whatever it is.
        stored: the weights on disk; None for a model that the user has loaded.
        streamed: weights are in memory for their block's turn only, and so is whatever else grows with the layers.
    """

    name: str
    model: PreTrainedModel
    working: PreTrainedModel
    tokenizer: Any
    structure: Structure
    identity: str
    parameters: int
    dtype: torch.dtype
    stored: StoredWeights | None = None
    streamed: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter in memory."""
        return self.model.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Of the weights on disk; of those in memory where there are none on disk."""
        return self.parameters * self.itemsize if self.stored is None else self.stored.bytes

    @property
    def format(self) -> str:
        """Number format of most weights of the source."""
        known = "" if self.stored is None else self.stored.format
        return known or dtype_name(self.model.dtype)

    @property
    def shapes(self) -> Shapes:
        """What sizes are counted by."""
        return Shapes(self.model, self.structure, self.dtype)


@dataclass(frozen=True)
class Session:
    """Where a run keeps what is finished, counts seconds, and says what it does."""

    folder: WorkFolder
    clock: Clock
    reporter: Reporter

    @property
    def spool(self) -> Path:
        """Where weights go that are streamed and are on no disk as they are in memory."""
        return team.own_file(self.folder.path / "weights")


def begin(folder: WorkFolder, run: BaseModel, reporter: Reporter) -> Session:
    """The session of a run in its work folder; the log begins with what it depends on."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    reporter.detail(f"{found}; {torch.get_num_threads()} threads")
    reporter.detail(f"{type(run).__name__} {run.model_dump_json()}")
    return Session(folder, Clock(folder.path, run, reporter.detail), reporter)


def open_source(
    name: str, model: PreTrainedModel | None, tokenizer: Any, given: Mapping[str, InMemory] | None = None
) -> Source:
    """Reads configuration and tokenizer, unless they are given.

    Raises:
        UnsupportedModelError: they cannot be read, the model is compressed already, or a model that is given is not
            what its configuration makes.
    """
    if model is not None:
        check_rebuildable(model)
    config = model.config if model is not None else load_config(name)
    refuse_compressed(config)
    return Source(name, model, config, tokenizer if tokenizer is not None else load_tokenizer(name), given or {})


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
        given=source.given,
        local=local,
    )


def load(
    source: Source,
    dtype: str,
    device: str,
    tokens: Tensor | None = None,
    stream: bool | None = None,
    session: Session | None = None,
) -> Loaded:
    """Reads the weights, unless the model is given, and looks at what they are by running a few tokens.

    ``stream`` says whether they stay on disk but for the turn of their block; None: where they leave too little room.
    Those that are on no disk as they are in memory go to the folder of the ``session``, which says where they cannot.

    Raises:
        BolacoError: they cannot be read, are not finite, or the structure is not known.
    """
    stored = None if source.model is not None else stored_weights(source.name)
    in_memory = "auto" if stored is not None and stored.gguf else dtype
    # What is still on the hub is of no known size.
    expected = 0 if stored is None else stored.bytes_in(in_memory)
    spool = session.spool if session is not None and needs_streaming(expected, stream) else None
    model = source.model
    if model is None:
        model = load_model(source.name, in_memory, device, "refuse", spool)
    check_finite(model)
    if tokens is not None:
        check_tokens(model, tokens)
    working = unfused(model)
    found = inspect_structure(working)
    reporter = None if session is None else session.reporter
    streamed = source.model is None and _streamed(model, working, found, stored, stream, reporter)
    structure = observed(working, found, tokens)
    identity = f"{weights_fingerprint(model)} {model.device.type}"
    parameters = sum(p.numel() for p in model.parameters())
    if stored is None and source.model is None:
        stored = stored_weights(source.name)  # a hub id's are in the cache now
    made = result_dtype(dtype, stored, model.dtype)
    return Loaded(
        source.name, model, working, source.tokenizer, structure, identity, parameters, made, stored, streamed
    )


def _streamed(
    model: PreTrainedModel,
    working: PreTrainedModel,
    structure: Structure,
    stored: StoredWeights | None,
    stream: bool | None,
    reporter: Reporter | None,
) -> bool:
    """Whether the weights of a model that was just loaded are streamed from here on."""
    size = sum(p.nbytes for p in model.parameters())
    if not needs_streaming(size, stream):
        return False
    why = why_not_streamed(model, stored is not None and stored.quantized)
    if why:
        if reporter is not None:
            reporter.say(f"weights are not streamed and stay in memory as a whole: {why}")
        return False
    take_turns(structure.block_modules(working))
    if model is not working:
        take_turns(structure.block_modules(model))
    if reporter is not None:
        reporter.say("weights are streamed: read for each block's turn, whole forward passes (evaluation) are slower")
    return True


@contextmanager
def work_folder(
    run: BaseModel, out: Path, work: Path | None, named: bool, device: str, reporter: Reporter
) -> Iterator[tuple[WorkFolder, Reporter]]:
    """The locked work folder of a run, and where its progress goes, which is to its log too.

    Under torchrun its processes are ranks of one run while this lasts. The first one locks, writes and speaks.

    Args:
        run: everything the run depends on.
        out: what it writes.
        work: the folder, if it is not the one beside ``out``.
        named: which model it is is known, so that the folder may be of a run that is finished.
        device: that the ranks compute on.
        reporter: shows progress.

    Raises:
        BolacoError: the folder is in use or of something else, ``out`` exists, or there is no such device.
    """
    with team.together(resolve_device(device)):
        place = Path(team.first(lambda: str(work_beside(out, work, run if named else None))))
        with WorkFolder(place, run, out) as folder:
            if team.is_first():
                with reporter.logged(folder.path / LOG_FILE):
                    yield folder, reporter
            else:
                yield folder, Reporter(quiet=True)
            team.barrier()
