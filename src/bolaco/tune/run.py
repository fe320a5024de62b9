"""A tuning run from folder to folder, top to bottom.

load -> perplexity before -> the mode prepares the model -> training, with checkpoints in the work folder -> the mode
finishes the model -> the result is written -> perplexity after, of the folder as loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from bolaco.checkpoint.info import (
    Info,
    TuningPerplexities,
    TuningRecord,
    Unchanged,
    read_any_info,
    versions,
    write_info,
)
from bolaco.checkpoint.result import Result
from bolaco.errors import CheckpointError, RecipeError, UnsupportedModelError
from bolaco.models.load import check_finite, load_model, resolve_device
from bolaco.models.quiet import quiet
from bolaco.progress import Reporter
from bolaco.report.card import tuned_card
from bolaco.report.html import REPORT_FILE, tuned_page
from bolaco.tune.digests import check_unchanged, frozen_digest, tensor_digests
from bolaco.tune.load import Loaded, load
from bolaco.tune.loss import Student
from bolaco.tune.measure import Measured, Size, measure, size_of, tuned_info
from bolaco.tune.mode import MODES, Context, Mode, Options, Prepared, is_coded
from bolaco.tune.resolve import resolve
from bolaco.tune.settings import TuneSettings
from bolaco.tune.teacher import load_original, load_teacher, to_run_dtype
from bolaco.tune.trainer import TRAINED, Trained, load_trained, save_trained, total_steps, train, training_arguments
from bolaco.work.files import require_space
from bolaco.work.folder import LOG_FILE, Artefact, Clock, WorkFolder, work_beside


def tune(
    settings: TuneSettings, out: Path, reporter: Reporter, work: Path | None = None, keep_work: bool = False
) -> Result[Info] | None:
    """Tunes ``settings.model`` and writes ``out``.

    Args:
        settings: what the run does.
        out: folder to write; must not exist.
        reporter: shows progress.
        work: folder of intermediate results, ``<out>.work`` by default. A run that was interrupted continues from it.
        keep_work: keep that folder after success.

    Returns:
        The result. Under torchrun the first process does everything, the others only help to train: they return None.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    mode = MODES.get(settings.mode)
    settings, options = resolve(settings, mode)
    # Processes of torchrun cannot know of each other whether there is anything left to do.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    work = work_beside(out, work, settings if alone else None)
    resolve_device(settings.device)
    folder = WorkFolder(work, settings, out)
    if int(os.environ.get("RANK", "0")) > 0:
        _help_train(_begin(mode, settings, options, folder, Reporter(quiet=True), first=False))
        return None
    with folder, reporter.logged(folder.path / LOG_FILE):
        if folder.finished:
            folder.close(keep_work)
            reporter.say(f"{out} is complete already")
            return Result(out, read_any_info(out))
        reporter.detail(f"{type(settings).__name__} {settings.model_dump_json()}")
        clock = Clock(folder.path, settings, reporter.detail)
        with clock.timed("load"):
            reporter.say(f"loading {settings.model}")
            run = _begin(mode, settings, options, folder, reporter, first=True)
            digests = tensor_digests(run.loaded.model)
        with clock.timed("evaluation"):
            before = _perplexity_before(run, folder)
        with clock.timed("prepare"):
            ready = _prepare(run)
            _require_space(run, ready, out)
        with clock.timed("train"):
            trained = _train_or_reload(run, ready)
        with folder.output(out) as partial_out:
            with clock.timed("write"):
                frozen = _write(partial_out, run, ready)
            with clock.timed("evaluation"):
                found = _measure_result(partial_out, run, ready, digests)
            record = _record(run, ready, trained, found, before, frozen, dict(clock.seconds))
            info = tuned_info(run.loaded.info, run.loaded.model.config.model_type, found.size, record)
            write_info(partial_out, info)
            (partial_out / REPORT_FILE).write_text(tuned_page(info, out.name), encoding="utf-8")
            (partial_out / "README.md").write_text(tuned_card(info, out.name), encoding="utf-8")
        folder.close(keep_work)
    return Result(out, info)


@dataclass(frozen=True)
class Run:
    """A run whose input has been read, and checked as far as it can be without a forward pass.

    Attributes:
        mode: what is trained.
        settings: settings of the run, resolved.
        loaded: the input.
        context: what the mode is given.
        arguments: what the Trainer is given.
        artefact: where the trained weights are kept, and until then the checkpoints.
        reporter: shows progress.
    """

    mode: Mode
    settings: TuneSettings
    loaded: Loaded
    context: Context
    arguments: TrainingArguments
    artefact: Artefact
    reporter: Reporter


@dataclass(frozen=True)
class Ready:
    """A model that is ready to be trained.

    Attributes:
        prepared: what the mode says of it.
        trainable: number of parameters that are trained.
        frozen: :func:`bolaco.tune.digests.frozen_digest` of the others.
    """

    prepared: Prepared
    trainable: int
    frozen: str


@dataclass(frozen=True)
class Found:
    """What was found of the result, as it was loaded from its folder.

    Attributes:
        model_type: its type.
        size: its size.
        unchanged: proof that what the mode does not train is in it as it was in the input.
        after: its perplexity.
    """

    model_type: str
    size: Size
    unchanged: Unchanged
    after: Measured


def _begin(
    mode: Mode, settings: TuneSettings, options: Options, folder: WorkFolder, reporter: Reporter, first: bool
) -> Run:
    """Reads the input, and checks it; ``first`` says whether this is the first process.

    Raises:
        BolacoError: in one line, what is wrong.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    loaded = load(settings, processes)
    artefact = _trained_artefact(folder, settings, loaded, processes)
    if first:
        artefact.path.mkdir(parents=True, exist_ok=True)
    context = Context(
        loaded.model,
        settings,
        options,
        loaded.info,
        loaded.data.tokens,
        partial(load_original, settings, loaded.info),
        artefact.path if first else None,
        reporter,
    )
    if is_coded(loaded.model) and not mode.coded:
        raise UnsupportedModelError(
            f"{settings.model}: its weights are coded into tables, and mode {mode.name!r} would lose that; "
            "use --mode sketch, or make it dense with `bolaco export --dense`"
        )
    if mode.check is not None:
        mode.check(context)
    steps = total_steps(settings, len(loaded.data.train), processes)
    with quiet():
        arguments = training_arguments(settings, steps, artefact.path / "checkpoints", loaded.model.device)
    return Run(mode, settings, loaded, context, arguments, artefact, reporter)


def _trained_artefact(folder: WorkFolder, settings: TuneSettings, loaded: Loaded, processes: int) -> Artefact:
    """The place of the trained weights: it changes with whatever they depend on.

    They do not depend on what is measured, nor on how often a checkpoint is written; the kind of device is part of the
    input's identity.
    """
    values = settings.model_dump(mode="json", exclude={"evaluation": True, "device": True, "training": {"save_steps"}})
    return folder.artefact(
        "trained", settings=values, model=loaded.identity, data=loaded.data.trained_on, processes=processes
    )


def _perplexity_before(run: Run, folder: WorkFolder) -> Measured:
    """Perplexity of the input, measured before the mode changes it."""
    settings, loaded = run.settings, run.loaded
    artefact = folder.artefact(
        "before",
        model=loaded.identity,
        dtype=str(loaded.model.dtype),
        data=loaded.data.evaluated_on,
        batch=settings.training.batch,
        chunk=settings.chunk,
    )
    known = artefact.read(Measured)
    if known is None:
        known = measure(loaded.model, loaded.data, settings, run.reporter, "evaluate the input")
        artefact.write(known)
    return known


def _prepare(run: Run) -> Ready:
    """Lets the mode prepare the model.

    Raises:
        RecipeError: nothing would be trained.
    """
    model = run.loaded.model
    set_seed(run.settings.seed)
    prepared = run.mode.prepare(run.context)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trainable == 0:
        raise RecipeError(f"mode {run.mode.name!r} with these options trains no parameter")
    return Ready(prepared, trainable, frozen_digest(model))


def _require_space(run: Run, ready: Ready, out: Path) -> None:
    """Stops before training if checkpoints and result would not fit on the disk."""
    # Two checkpoints stay while a third is written, each with the parameters and both of Adam's moments in float32.
    checkpoints = 3 * 3 * 4 * ready.trainable
    result = sum(p.numel() for p in run.loaded.model.parameters()) * run.loaded.stored_dtype.itemsize
    require_space([(run.artefact.path, checkpoints), (out, result)], "checkpoints and the result")


def _train_or_reload(run: Run, ready: Ready) -> Trained:
    """Trains; or loads what an earlier call has trained, if that was interrupted only afterwards."""
    model, file = run.loaded.model, run.artefact.path / TRAINED
    known = run.artefact.read(Trained)
    if known is not None:
        load_trained(model, file)
        return known
    trained = _train(run, ready)
    save_trained(model, file)
    run.artefact.write(trained)
    return trained


def _train(run: Run, ready: Ready) -> Trained:
    """Trains; the teacher, if there is one, is in memory only meanwhile."""
    settings, loaded = run.settings, run.loaded
    teacher = load_teacher(settings, loaded.info)
    student = Student(loaded.model, settings.distillation.weight, teacher, settings.chunk)
    return train(student, ready.prepared, loaded.data, settings.training.minutes, run.arguments, run.reporter)


def _help_train(run: Run) -> None:
    """What the other processes of torchrun do: train along, unless the first one has nothing to train any more."""
    if run.artefact.read(Trained) is None:
        _train(run, _prepare(run))


def _write(folder: Path, run: Run, ready: Ready) -> str:
    """Lets the mode finish the model, and writes it with its tokenizer; returns the digest of what was frozen.

    Raises:
        CheckpointError: training has changed something that is not trained.
        NonFiniteError: a weight is NaN or infinite.
    """
    loaded = run.loaded
    frozen = frozen_digest(loaded.model)
    if frozen != ready.frozen:
        raise CheckpointError(f"mode {run.mode.name!r}: frozen weights have changed during training; nothing is kept")
    loaded.model.eval()
    with torch.no_grad():
        model: Any = ready.prepared.finish()
    check_finite(model)
    model.requires_grad_(False).to(loaded.stored_dtype)
    with quiet():
        model.save_pretrained(folder)
        if ready.prepared.save_extra is not None:
            ready.prepared.save_extra(folder)
        loaded.tokenizer.save_pretrained(folder)
    return frozen


def _measure_result(folder: Path, run: Run, ready: Ready, digests: dict[str, str]) -> Found:
    """Loads what was written, compares it with the input, whose tensors have these digests, and measures it.

    Raises:
        CheckpointError: something is different that the mode does not train.
    """
    model = load_model(str(folder), device=str(run.loaded.model.device), adapters="leave")
    to_run_dtype(model, run.settings)
    unchanged = check_unchanged(digests, model, ready.prepared.touched, run.mode.name)
    size = size_of(model, folder)
    if run.mode.attach is not None:
        run.mode.attach(model, folder)
    after = measure(model, run.loaded.data, run.settings, run.reporter, "evaluate the result")
    return Found(model.config.model_type, size, unchanged, after)


def _record(
    run: Run,
    ready: Ready,
    trained: Trained,
    found: Found,
    before: Measured,
    frozen: str,
    seconds: dict[str, float],
) -> TuningRecord:
    """What ``bolaco.json`` says of the run."""
    data, info = run.loaded.data, run.loaded.info
    return TuningRecord(
        mode=run.mode.name,
        paper=run.mode.paper,
        model=run.settings.model,
        result_type=found.model_type,
        trainable_parameters=ready.trainable,
        parameters=found.size.parameters,
        bytes=found.size.bytes,
        frozen_sha256={"before": ready.frozen, "after": frozen},
        unchanged=found.unchanged,
        steps=trained.steps,
        of_steps=trained.of_steps,
        out_of_time=trained.out_of_time,
        examples=len(data.train),
        kind=data.kind,
        note=ready.prepared.note,
        perplexity=TuningPerplexities(
            before=before.perplexity,
            after=found.after.perplexity,
            data=data.evaluation_source,
            windows=len(data.evaluation),
            tokens=found.after.tokens,
        ),
        curve=trained.curve,
        seconds=seconds,
        settings=run.settings.model_dump(mode="json"),
        versions=versions(MODES.package(run.mode.name)),
        earlier=None if info is None else info.tuning,
    )
