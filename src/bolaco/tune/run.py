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
from bolaco.layers import QuantizedLinear
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
    settings: TuneSettings,
    out: Path,
    reporter: Reporter,
    work: Path | None = None,
    keep_work: bool = False,
    named: str | None = None,
) -> Result[Info] | None:
    """Tunes ``settings.model`` and writes ``out``.

    Args:
        settings: what the run does.
        out: folder to write; must not exist.
        reporter: shows progress.
        work: folder of intermediate results, ``<out>.work`` by default. A run that was interrupted continues from it.
        keep_work: keep that folder after success.
        named: what the result calls the model, where its folder is only there for the run; None is ``settings.model``.

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
        if folder.taken_up(reporter, keep_work):
            return Result(out, read_any_info(out))
        reporter.detail(f"{type(settings).__name__} {settings.model_dump_json()}")
        clock = Clock(folder.path, settings, reporter.detail)
        with clock.timed("load"):
            reporter.say(f"loading {settings.model}")
            run = _begin(mode, settings, options, folder, reporter, first=True)
            digests = tensor_digests(run.loaded.model, stored=run.stored_dtype)
        with clock.timed("evaluation"):
            before = _perplexity_before(run, folder)
        with clock.timed("prepare"):
            ready = _prepare(run)
            _require_space(run, ready, out)
        with clock.timed("evaluation"):
            start = _perplexity_at_start(run, folder)
        with clock.timed("train"):
            trained = _train_or_reload(run, ready)
        with folder.output(out) as partial_out:
            with clock.timed("write"):
                frozen = _write(partial_out, run, ready)
            with clock.timed("evaluation"):
                found = _measure_result(partial_out, run, ready, digests)
            record = _record(run, ready, trained, found, before, start, frozen, dict(clock.seconds), named)
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

    @property
    def stored_dtype(self) -> torch.dtype:
        """The number format of the result."""
        own = self.loaded.stored_dtype
        return own if self.mode.stored is None else self.mode.stored(self.context.options, own)


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
    artefact = _trained_artefact(folder, settings, mode, loaded, processes)
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
    if any(isinstance(module, QuantizedLinear) for module in loaded.model.modules()):
        raise UnsupportedModelError(
            f"{settings.model}: its matrices are quantized, and no mode trains codes; tune it before it is quantized, "
            "or make it dense with `bolaco export --dense`"
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


def _trained_artefact(
    folder: WorkFolder, settings: TuneSettings, mode: Mode, loaded: Loaded, processes: int
) -> Artefact:
    """The place of the trained weights: it changes with whatever they depend on.

    They do not depend on what is measured, nor on how often a checkpoint is written, unless training ends by what is
    measured then; the kind of device is part of the input's identity.
    """
    exclude: dict[str, Any] = {"device": True, "options": set(mode.written)}
    data: Any = [loaded.data.trained_on, loaded.data.evaluated_on]
    if settings.training.patience is None:
        exclude |= {"evaluation": True, "training": {"save_steps", "patience"}}
        data = loaded.data.trained_on
    values = settings.model_dump(mode="json", exclude=exclude)
    return folder.artefact("trained", settings=values, model=loaded.identity, data=data, processes=processes)


def _perplexity_before(run: Run, folder: WorkFolder) -> Measured:
    """Perplexity of the input, measured before the mode changes it."""
    model = run.loaded.model
    artefact = folder.artefact("before", model=run.loaded.identity, dtype=str(model.dtype), **_measured_on(run))
    return _measured(run, artefact, "evaluate the input")


def _perplexity_at_start(run: Run, folder: WorkFolder) -> Measured | None:
    """Perplexity of the prepared model before it is trained, where that is not the input's."""
    if run.mode.exact_start:
        return None
    # What the trained weights depend on, the prepared ones do too.
    artefact = folder.artefact("start", trained=run.artefact.path.name, **_measured_on(run))
    return _measured(run, artefact, "evaluate before training")


def _measured_on(run: Run) -> dict[str, Any]:
    """What a perplexity depends on but for the model."""
    settings = run.settings
    return {"data": run.loaded.data.evaluated_on, "batch": settings.training.batch, "chunk": settings.chunk}


def _measured(run: Run, artefact: Artefact, title: str) -> Measured:
    """Perplexity of the model as it is now, or what an earlier call has measured."""
    known = artefact.read(Measured)
    if known is None:
        known = measure(run.loaded.model, run.loaded.data, run.settings, run.reporter, title)
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
    written = () if ready.prepared.alone else run.loaded.model.parameters()
    result = sum(p.numel() for p in written) * run.stored_dtype.itemsize
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
    return train(student, ready.prepared, loaded.data, settings.training, run.arguments, run.reporter)


def _help_train(run: Run) -> None:
    """What the other processes of torchrun do: train along, unless the first one has nothing to train any more."""
    if run.artefact.read(Trained) is None:
        _train(run, _prepare(run))


def _write(folder: Path, run: Run, ready: Ready) -> str:
    """Lets the mode finish the model, and writes the result; returns the digest of what was frozen.

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
    model.requires_grad_(False).to(run.stored_dtype)
    with quiet():
        if not ready.prepared.alone:
            model.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
        if ready.prepared.save_extra is not None:
            ready.prepared.save_extra(folder)
    return frozen


def _measure_result(folder: Path, run: Run, ready: Ready, digests: dict[str, str]) -> Found:
    """Loads what was written, compares it with the input, whose tensors have these digests, and measures it.

    Raises:
        CheckpointError: something is different that the mode does not train.
    """
    model = load_model(str(folder), device=str(run.loaded.model.device), adapters="leave")
    to_run_dtype(model, run.settings)
    unchanged = check_unchanged(digests, model, ready.prepared.touched, run.mode.name)
    size = size_of(model, folder, run.stored_dtype)
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
    start: Measured | None,
    frozen: str,
    seconds: dict[str, float],
    named: str | None,
) -> TuningRecord:
    """What ``bolaco.json`` says of the run."""
    data, info = run.loaded.data, run.loaded.info
    settings = run.settings if named is None else run.settings.model_copy(update={"model": named})
    return TuningRecord(
        mode=run.mode.name,
        paper=run.mode.paper,
        model=settings.model,
        result_type=found.model_type,
        trainable_parameters=ready.trainable,
        parameters=found.size.parameters,
        bytes=found.size.bytes,
        frozen_sha256={"before": ready.frozen, "after": frozen},
        unchanged=found.unchanged,
        steps=trained.steps,
        of_steps=trained.of_steps,
        out_of_time=trained.out_of_time,
        best_step=trained.best_step,
        examples=len(data.train),
        kind=data.kind,
        note=ready.prepared.note,
        adapter_of=run.settings.model if ready.prepared.alone else None,
        perplexity=TuningPerplexities(
            before=before.perplexity,
            start=None if start is None else start.perplexity,
            after=found.after.perplexity,
            data=data.evaluation_source,
            windows=len(data.evaluation),
            tokens=found.after.tokens,
        ),
        curve=trained.curve,
        seconds=seconds,
        settings=settings.model_dump(mode="json"),
        versions=versions(MODES.package(run.mode.name)),
        earlier=None if info is None else info.tuning,
    )
