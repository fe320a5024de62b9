"""A tuning run from folder to folder, top to bottom.

load -> perplexity before -> the mode prepares the model -> training, with checkpoints in the work folder -> the mode
folds -> the result is written -> perplexity after, of the folder as loaded.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed

from bolaco.checkpoint.info import (
    INFO_FILE,
    CompressedInfo,
    CurvePoint,
    TunedInfo,
    TuningPerplexities,
    TuningRecord,
    read_any_info,
    versions,
    weight_bytes,
    write_info,
)
from bolaco.checkpoint.result import Result
from bolaco.errors import CheckpointError, RecipeError, UnsupportedModelError
from bolaco.layers import SketchLinear
from bolaco.models.load import (
    check_finite,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    resolve_device,
    weights_fingerprint,
)
from bolaco.models.quiet import quiet
from bolaco.progress import Reporter
from bolaco.report.card import tuned_card
from bolaco.report.html import REPORT_FILE, tuned_page
from bolaco.tune.data import TuneData, prepare_data
from bolaco.tune.digests import check_unchanged, digests, frozen_digest
from bolaco.tune.factored import growth
from bolaco.tune.loss import Student, mean_loss
from bolaco.tune.mode import MODES, Context, Mode, Options, Prepared, is_coded
from bolaco.tune.resolve import resolve as resolve_settings
from bolaco.tune.settings import TuneSettings
from bolaco.tune.teacher import AnyInfo, as_trained, check_teacher, load_original, load_other, teacher_name
from bolaco.tune.trainer import (
    TRAINED,
    TuneTrainer,
    last_checkpoint,
    load_trained,
    total_steps,
    trained_state,
    training_arguments,
)
from bolaco.work.files import require_space, whole
from bolaco.work.folder import Artefact, Clock, WorkFolder
from bolaco.work.output import new_folder, work_beside

# Points of the loss curve that bolaco.json keeps.
CURVE = 200


@dataclass(frozen=True)
class Loaded:
    """Everything a run reads.

    Attributes:
        settings: with every default filled in.
        mode: what is trained.
        info: ``bolaco.json`` of the input, None if it has none.
        tokenizer, data: of the input, and what it is tuned on.
        model: the input, in the number format of the run; no parameter requires a gradient.
        dtype: in which it was stored.
        identity: changes with any weight and with the kind of device.
        place: of what training leaves in the work folder.
        context: what the mode gets to know.
        arguments: what the settings mean to the Trainer.
        reporter: where progress goes.
    """

    settings: TuneSettings
    mode: Mode
    info: AnyInfo
    tokenizer: Any
    data: TuneData
    model: PreTrainedModel
    dtype: torch.dtype
    identity: str
    place: Artefact
    context: Context
    arguments: TrainingArguments
    reporter: Reporter


@dataclass(frozen=True)
class Readied:
    """A model that the mode has prepared.

    Attributes:
        prepared: what the mode says of it.
        student: what the trainer trains.
        trainable: parameters that are trained.
        frozen: a hash of those that are not.
    """

    prepared: Prepared
    student: Student
    trainable: int
    frozen: str


class Measured(BaseModel):
    """Loss on the evaluation text in nats a token, and how many tokens that are."""

    model_config = ConfigDict(frozen=True)

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Trained(BaseModel):
    """How training went: steps taken of those planned, whether time ran out, and the loss on the way."""

    model_config = ConfigDict(frozen=True)

    steps: int
    of_steps: int
    out_of_time: bool
    curve: list[CurvePoint]


def tune(
    settings: TuneSettings, out: Path, reporter: Reporter, work: Path | None = None, keep_work: bool = False
) -> Result[CompressedInfo | TunedInfo] | None:
    """Tunes ``settings.model`` and writes ``out``; None in the processes of torchrun that are not the first.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    work = work_beside(out, work)
    mode = MODES.get(settings.mode)
    settings, options = resolve_settings(settings, mode)
    resolve_device(settings.device)
    folder = WorkFolder(work, settings)
    if int(os.environ.get("RANK", "0")) > 0:
        follower = _load(settings, mode, options, folder, Reporter(quiet=True), first=False)
        _train(follower, _ready(follower, distils=settings.distillation.weight > 0))
        return None
    with folder:
        clock = Clock(folder.path, settings)
        with clock.timed("load"):
            reporter.say(f"loading {settings.model}")
            loaded = _load(settings, mode, options, folder, reporter, first=True)
        # Before the mode touches anything.
        before_digests = digests(loaded.model)
        before = _before(loaded, folder, clock)
        ready, training = _trained(loaded, clock)
        with new_folder(out) as partial, folder.unfinished(partial):
            with clock.timed("write"):
                frozen_after = _write(partial, loaded, ready)
            with clock.timed("evaluation"):
                after, record = _measure(partial, loaded, ready, before, before_digests, training, frozen_after)
            record = record.model_copy(update={"seconds": dict(clock.seconds)})
            info = _info_of(loaded, record, after, partial)
            write_info(partial, info)
            (partial / REPORT_FILE).write_text(tuned_page(info, out.name), encoding="utf-8")
            (partial / "README.md").write_text(tuned_card(info, out.name), encoding="utf-8")
        if not keep_work:
            folder.remove()
    return Result(out, info)


def _load(
    settings: TuneSettings, mode: Mode, options: Options, folder: WorkFolder, reporter: Reporter, first: bool
) -> Loaded:
    """Reads everything, in order of cost, and checks what can be checked; ``first``: of all processes.

    Raises:
        BolacoError: in one line.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    place = Path(resolve(settings.model).path)
    info = read_any_info(place) if (place / INFO_FILE).is_file() else None
    config = load_config(settings.model)
    tokenizer = load_tokenizer(settings.model)
    data = prepare_data(settings, tokenizer, config, world)
    check_teacher(settings, info, config, tokenizer)
    model = load_model(settings.model, device=settings.device, adapters="refuse")
    dtype = model.dtype
    as_trained(model, settings)
    check_finite(model)
    if is_coded(model) and not mode.coded:
        raise UnsupportedModelError(
            f"{settings.model}: its weights are coded into tables, and mode {mode.name!r} would lose that; "
            "use --mode sketch, or make it dense with `bolaco export --dense`"
        )
    identity = f"{weights_fingerprint(model)} {model.device.type}"
    trained = folder.artefact("trained", model=identity, data=data.fingerprint, settings=settings, world=world)
    original = partial(load_original, settings=settings, info=info)
    kept = trained.path if first else None
    context = Context(model, settings, options, info, data.tokens, original, kept, reporter)
    if mode.check is not None:
        mode.check(context)
    steps = total_steps(settings, len(data.train), world)
    with quiet():
        arguments = training_arguments(settings, steps, trained.path / "checkpoints", model.device)
    model.requires_grad_(False)
    return Loaded(settings, mode, info, tokenizer, data, model, dtype, identity, trained, context, arguments, reporter)


def _measured(loaded: Loaded, model: PreTrainedModel, title: str) -> Measured:
    data, settings = loaded.data, loaded.settings
    with loaded.reporter.stage(title, len(data.evaluation)) as tick:
        loss, tokens = mean_loss(model, data.evaluation, data.collate, settings.training.batch, settings.chunk, tick)
    return Measured(loss=loss, tokens=tokens)


def _before(loaded: Loaded, folder: WorkFolder, clock: Clock) -> Measured:
    """Loss of the input on the evaluation text."""
    settings = loaded.settings
    artefact = folder.artefact(
        "before",
        model=loaded.identity,
        data=loaded.data.fingerprint,
        batch=settings.training.batch,
        chunk=settings.chunk,
    )
    known = artefact.read(Measured)
    if known is None:
        with clock.timed("evaluation"):
            known = _measured(loaded, loaded.model, "evaluate the input")
        artefact.write(known)
    return known


def _trained(loaded: Loaded, clock: Clock) -> tuple[Readied, Trained]:
    """The model as the mode prepares it and as it is after training, or as an earlier call has trained it."""
    done = loaded.place.read(Trained)
    file = loaded.place.path / TRAINED
    with clock.timed("prepare"):
        ready = _ready(loaded, distils=loaded.settings.distillation.weight > 0 and done is None)
    if done is not None:
        load_trained(loaded.model, file)
        return ready, done
    with clock.timed("train"):
        done = _train(loaded, ready)
    with whole(file) as partial_file:
        save_file(trained_state(loaded.model), partial_file)
    loaded.place.write(done)
    return ready, done


def _ready(loaded: Loaded, distils: bool) -> Readied:
    """Lets the mode prepare the model, and loads its teacher if it has one.

    Raises:
        RecipeError: nothing would be trained.
        BolacoError: no space for checkpoints and the result.
    """
    settings, model = loaded.settings, loaded.model
    set_seed(settings.seed)
    first = loaded.context.folder is not None
    if first:
        loaded.place.path.mkdir(parents=True, exist_ok=True)
    prepared = loaded.mode.prepare(loaded.context)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trainable = sum(p.numel() for p in trained.values())
    if trainable == 0:
        raise RecipeError(f"mode {loaded.mode.name!r} with these options trains no parameter")
    if first:
        # Two checkpoints stay while a third is written; each has the parameters and both of Adam's moments.
        size = sum(p.numel() for p in model.parameters()) * loaded.dtype.itemsize
        work = loaded.place.folder
        require_space([(work, 3 * 3 * 4 * trainable), (work.parent, size)], "checkpoints and the result")
    teacher = load_other(teacher_name(settings, loaded.info), settings) if distils else None
    student = Student(model, settings.distillation.weight, teacher, settings.chunk)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    return Readied(prepared, student, trainable, frozen_digest(model))


def _train(loaded: Loaded, ready: Readied) -> Trained:
    """Trains, from the last checkpoint if there is one."""
    settings, data, arguments = loaded.settings, loaded.data, loaded.arguments
    with quiet():
        _wait(arguments)
        steps = arguments.max_steps
        last = last_checkpoint(Path(str(arguments.output_dir)))
        begun = 0 if last is None else int(last[1]["global_step"])
        if last is not None:
            loaded.reporter.say(f"training: {begun} of {steps} steps are done already")
        with loaded.reporter.stage("train", steps - begun) as tick:
            trainer = TuneTrainer(
                ready.student,
                ready.prepared,
                settings.training.minutes,
                tick,
                args=arguments,
                train_dataset=data.train,
                data_collator=data.collate,
            )
            out_of_time = last is not None and trainer.out_of_time(last[0]) and begun < steps
            finished = last is not None and (begun >= steps or out_of_time)
            if last is not None and finished:
                load_trained(loaded.model, last[0] / TRAINED)
            else:
                trainer.train(resume_from_checkpoint=None if last is None else str(last[0]))
                out_of_time = trainer.watch.out_of_time
    state = last[1] if last is not None and finished else vars(trainer.state)
    return Trained(
        steps=int(state["global_step"]),
        of_steps=steps,
        out_of_time=out_of_time,
        curve=_curve(state["log_history"]),
    )


def _write(folder: Path, loaded: Loaded, ready: Readied) -> str:
    """Folds, and writes the model with its tokenizer; returns a hash of what was frozen.

    Raises:
        CheckpointError: that has changed during training.
    """
    frozen = frozen_digest(loaded.model)
    if frozen != ready.frozen:
        raise CheckpointError(
            f"mode {loaded.mode.name!r}: frozen weights have changed during training; nothing is kept"
        )
    loaded.model.eval()
    with torch.no_grad():
        model: Any = ready.prepared.finish()
    check_finite(model)
    model.requires_grad_(False).to(loaded.dtype)
    with quiet():
        model.save_pretrained(folder)
        if ready.prepared.save_extra is not None:
            ready.prepared.save_extra(folder)
        loaded.tokenizer.save_pretrained(folder)
    return frozen


@dataclass(frozen=True)
class _After:
    """Of the result as loaded: its parameters, and the growth of rounding errors by matrix."""

    parameters: int
    growth: dict[str, float]


def _measure(
    folder: Path,
    loaded: Loaded,
    ready: Readied,
    before: Measured,
    before_digests: dict[str, str],
    training: Trained,
    frozen_after: str,
) -> tuple[_After, TuningRecord]:
    """Loads what was written, compares and measures it."""
    settings, mode = loaded.settings, loaded.mode
    model = load_model(str(folder), device=str(loaded.model.device), adapters="leave")
    as_trained(model, settings)
    unchanged = check_unchanged(model, before_digests, ready.prepared.touched, mode.name)
    after = _After(weights_in(model), growth(model))
    if mode.attach is not None:
        mode.attach(model, folder)
    measured = _measured(loaded, model, "evaluate the result")
    record = TuningRecord(
        mode=mode.name,
        paper=mode.paper,
        model=settings.model,
        result_type=model.config.model_type,
        trainable_parameters=ready.trainable,
        parameters=after.parameters,
        bytes=weight_bytes(folder),
        frozen_sha256={"before": ready.frozen, "after": frozen_after},
        unchanged=unchanged,
        steps=training.steps,
        of_steps=training.of_steps,
        out_of_time=training.out_of_time,
        examples=len(loaded.data.train),
        kind=loaded.data.kind,
        note=ready.prepared.note,
        perplexity=TuningPerplexities(
            before=before.perplexity,
            after=measured.perplexity,
            data=loaded.data.evaluation_source,
            windows=len(loaded.data.evaluation),
            tokens=measured.tokens,
        ),
        curve=training.curve,
        seconds={},
        settings=settings.model_dump(mode="json"),
        versions=versions(),
        earlier=None if loaded.info is None else loaded.info.tuning,
    )
    return after, record


def _info_of(loaded: Loaded, record: TuningRecord, after: _After, folder: Path) -> CompressedInfo | TunedInfo:
    """The content of ``bolaco.json``: that of the compression before, if there was one, and the tuning."""
    if isinstance(loaded.info, CompressedInfo):
        changed: dict[str, Any] = {"parameters": after.parameters, "bytes": weight_bytes(folder), "tuning": record}
        return loaded.info.model_copy(update=changed | ({"pivot_growth": after.growth} if after.growth else {}))
    return TunedInfo(format=1, model_type=loaded.model.config.model_type, tuning=record)


def weights_in(model: nn.Module) -> int:
    """Parameters of a model; what is coded into tables counts as the weights it stands for."""
    coded = [module for module in model.modules() if isinstance(module, SketchLinear)]
    more = sum(module.in_features * module.out_features - module.lut.numel() for module in coded)
    return sum(p.numel() for p in model.parameters()) + more


def _curve(history: list[dict[str, Any]]) -> list[CurvePoint]:
    """Loss over steps, in at most :data:`CURVE` points; each is the mean of the steps up to it."""
    points = [(int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry]
    size = math.ceil(len(points) / CURVE) or 1
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [CurvePoint(step=run[-1][0], loss=sum(loss for _, loss in run) / len(run)) for run in runs]


def _wait(arguments: TrainingArguments) -> None:
    """Until every process has come this far; the arguments have set up the group, if there is one."""
    _ = arguments.device
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
