"""The training itself: transformers' Trainer, whose checkpoints hold only what is trained."""

from __future__ import annotations

import json
import math
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from bolaco.checkpoint.info import CurvePoint, Record
from bolaco.errors import NonFiniteError, RecipeError, ResumeError
from bolaco.models.quiet import quiet
from bolaco.progress import Reporter, Tick
from bolaco.tune.data import TuneData
from bolaco.tune.fill import begin_with
from bolaco.tune.loss import Student
from bolaco.tune.mode import Prepared
from bolaco.tune.settings import Training, TuneSettings
from bolaco.work.files import checksum, write_text
from bolaco.work.tensors import load_tensors, save_tensors

# In a checkpoint of the Trainer: what is trained, the seconds that training has taken so far, checksums of all files.
TRAINED = "trained.safetensors"
_CLOCK = "clock.json"
_SUMS = "checksums.json"
_SCHEDULES = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}
# The loss curve in bolaco.json has at most so many points.
CURVE = 200


class Trained(Record):
    """How training went: steps taken out of those planned, whether time ended it early, and the loss on the way.

    ``best_step`` is the step whose weights are kept, where the evaluation text was looked at for it.
    """

    steps: int
    of_steps: int
    out_of_time: bool
    best_step: int | None = None
    curve: list[CurvePoint]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the Trainer: its folder, and the content of its ``trainer_state.json``."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps taken until then."""
        return int(self.state["global_step"])


def total_steps(settings: TuneSettings, examples: int, processes: int) -> int:
    """Optimiser steps that the settings ask for.

    Args:
        settings: settings of the run, resolved.
        examples: sequences to train on.
        processes: processes that train together.
    """
    training = settings.training
    an_epoch = math.ceil(math.ceil(examples / (training.batch * processes)) / training.gradient_accumulation)
    wanted = [] if training.max_steps is None else [training.max_steps]
    if training.epochs is not None:
        wanted.append(max(1, round(training.epochs * an_epoch)))
    return min(wanted)


def training_arguments(settings: TuneSettings, steps: int, folder: Path, device: torch.device) -> TrainingArguments:
    """The settings as the Trainer takes them; also sets up the process group under torchrun.

    Args:
        settings: settings of the run, resolved.
        steps: optimiser steps.
        folder: where checkpoints go.
        device: where the model is.

    Raises:
        RecipeError: the Trainer refuses a value of ``settings.trainer``.
    """
    training = settings.training
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": training.batch,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "learning_rate": training.learning_rate,
        "warmup_steps": training.warmup,
        "lr_scheduler_type": _SCHEDULES[str(training.schedule)],
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "bf16": training.autocast,
        "save_strategy": "steps",
        "save_steps": training.save_steps,
        "save_total_limit": 2,
        "logging_strategy": "steps",
        # Every step, so that an interruption leaves no trace in the loss curve.
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
        "use_cpu": device.type == "cpu",
        "seed": settings.seed,
        "data_seed": settings.seed,
    }
    if training.patience is not None:
        values |= {
            "eval_strategy": "steps",
            "eval_steps": training.save_steps,
            "per_device_eval_batch_size": training.batch,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "restore_callback_states_from_checkpoint": True,
        }
    if training.schedule == "cosine":
        values["lr_scheduler_kwargs"] = {"min_lr_rate": training.final_rate}
    try:
        return TrainingArguments(**(values | settings.trainer))
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        why = textwrap.shorten(str(error), 300)
        raise RecipeError(f"trainer: transformers refuses these settings: {why}") from error


def train(
    student: Student,
    prepared: Prepared,
    data: TuneData,
    training: Training,
    arguments: TrainingArguments,
    reporter: Reporter,
) -> Trained:
    """Trains the student's model, from the last checkpoint on if an earlier call was interrupted.

    Args:
        student: computes the loss.
        prepared: what the mode said of the model.
        data: what is trained on.
        training: when it stops: after ``minutes``, those before an interruption included, or out of ``patience``.
        arguments: of the Trainer, from these settings; checkpoints are in ``output_dir``.
        reporter: shows progress.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
        ResumeError: the last checkpoint is damaged.
    """
    _hold_in_float32(student.model)
    with quiet():
        _meet(arguments)
        steps, last = arguments.max_steps, last_checkpoint(Path(str(arguments.output_dir)))
        begun = 0 if last is None else last.step
        if last is not None:
            reporter.say(f"training: {begun} of {steps} steps are done already")
        with reporter.stage("train", steps - begun) as tick:
            trainer = TuneTrainer(
                student,
                prepared,
                training,
                tick,
                args=arguments,
                train_dataset=data.train,
                eval_dataset=None if training.patience is None else data.evaluation,
                data_collator=data.collate,
            )
            out_of_time = last is not None and trainer.out_of_time(last.path) and begun < steps
            if last is not None and (begun >= steps or out_of_time or out_of_patience(last.state, training)):
                # Interrupted between the last checkpoint and the end of the stage.
                load_trained(student.model, Path(last.state.get("best_model_checkpoint") or last.path) / TRAINED)
                state = last.state
            else:
                trainer.train(resume_from_checkpoint=None if last is None else str(last.path))
                state, out_of_time = vars(trainer.state), trainer.watch.out_of_time
    return Trained(
        steps=int(state["global_step"]),
        of_steps=steps,
        out_of_time=out_of_time,
        best_step=None if training.patience is None else state["best_global_step"],
        curve=loss_curve(state["log_history"]),
    )


def loss_curve(history: list[dict[str, Any]]) -> list[CurvePoint]:
    """The loss over the steps, from the Trainer's log of every step.

    It has at most :data:`CURVE` points; each is the mean of the steps after the point before.
    """
    points = [(int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry]
    size = math.ceil(len(points) / CURVE) or 1
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [CurvePoint(step=run[-1][0], loss=sum(loss for _, loss in run) / len(run)) for run in runs]


def out_of_patience(state: dict[str, Any], training: Training) -> bool:
    """Whether training had looked in vain for a lower loss often enough when the Trainer's state was saved."""
    known = state.get("stateful_callbacks", {}).get(EarlyStoppingCallback.__name__)
    if training.patience is None or known is None:
        return False
    return int(known["attributes"]["early_stopping_patience_counter"]) >= training.patience


def save_trained(model: nn.Module, file: Path) -> None:
    """Writes the parameters that require a gradient, by name; the file appears whole or not at all."""
    save_tensors(file, {name: p for name, p in model.named_parameters() if p.requires_grad})


def load_trained(model: nn.Module, file: Path) -> None:
    """Loads what :func:`save_trained` wrote into a model that was prepared in the same way, in float32.

    Raises:
        ResumeError: the file is damaged, or of a model prepared in another way.
    """
    _hold_in_float32(model)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = load_tensors(file)
    try:
        if state.keys() != wanted.keys():
            raise ValueError("other parameters than those that are trained")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(state[name])
    except Exception as error:
        raise ResumeError(f"{file}: damaged ({error}); delete the work folder to start anew") from error


def _hold_in_float32(model: nn.Module) -> None:
    """Converts what is trained: steps of training can be smaller than half precision resolves."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The latest complete checkpoint in a folder; one whose writing was interrupted is passed over."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda p: -int(p.name.rpartition("-")[2])):
        # The Trainer writes this file last, and then checksums are written.
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if (path / _SUMS).is_file():
            _check_sums(path)
            return Checkpoint(path, state)
    return None


def _sums_of(folder: Path) -> dict[str, int]:
    """Of the files of a checkpoint; states of random numbers are written by each process for itself."""
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(("rng_state", _SUMS))]
    return {file.name: checksum(file) for file in sorted(files)}


def _check_sums(folder: Path) -> None:
    """Raises ResumeError if a file of a checkpoint is not as it was written."""
    try:
        known = json.loads((folder / _SUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known != _sums_of(folder):
        raise ResumeError(f"{folder}: a checkpoint that is damaged; delete this folder and run again")


def _meet(arguments: TrainingArguments) -> None:
    """Waits until all processes of torchrun have come this far, so that they find the same checkpoint."""
    _ = arguments.device  # sets up the process group if that has not been done
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _agreed(value: float, device: torch.device) -> float:
    """The first process's value, in all processes: one clock decides for all."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    shared = torch.tensor(value, device=device)
    dist.broadcast(shared, 0)
    return float(shared)


def _seconds(file: Path) -> float:
    """Seconds that training had taken when a checkpoint was written.

    Raises:
        ResumeError: the file is missing or damaged.
    """
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{file}: damaged ({error}); delete the work folder to start anew") from error


class _Clock:
    """Time spent on training, that before an interruption included.

    Args:
        minutes: how many may be spent; None is no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self.budget = None if minutes is None else 60 * minutes
        self.earlier, self.start = 0.0, time.monotonic()

    def begin(self, earlier: float = 0.0) -> None:
        """Starts, ``earlier`` seconds having been spent before."""
        self.earlier, self.start = earlier, time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds."""
        return self.earlier + time.monotonic() - self.start

    def share(self, device: torch.device) -> float:
        """The share of the limit that is spent, the same number in all processes; always 0 without a limit."""
        return 0.0 if self.budget is None else _agreed(self.spent / self.budget, device)


class TuneTrainer(Trainer):
    """Trains a :class:`Student`; its checkpoints hold what is trained instead of the whole model."""

    model: Student

    def __init__(self, student: Student, prepared: Prepared, training: Training, tick: Tick, **more: Any) -> None:
        self.clock = _Clock(training.minutes)
        self.watch = _Watch(prepared, self.clock, tick)
        callbacks: list[TrainerCallback] = [self.watch]
        if training.patience is not None:
            callbacks.append(EarlyStoppingCallback(training.patience))
        super().__init__(model=student, callbacks=callbacks, **more)
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: Any = None) -> Any:
        """transformers' optimizer, with the moments that the mode begins with."""
        optimizer = super().create_optimizer(model)
        moments = self.watch.prepared.moments
        if moments is not None:
            begin_with(optimizer, dict(self.model.model.named_parameters()), moments)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' learning-rate schedule, but by the clock where that is ahead of the steps.

        Each step has the schedule's value at its middle. At its beginning, the first step of a warm-up would have a
        rate of zero; at its end, the last step of a linear schedule would. A short run has no step to waste.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, LambdaLR):
            steps, shapes = num_training_steps, scheduler.lr_lambdas

            def timed(shape: Any) -> Any:
                return lambda step: shape(min(steps, max(step + 0.5, self.clock.share(self.args.device) * steps)))

            scheduler.lr_lambdas = [timed(shape) for shape in shapes]
            # The first step's rate was set when the schedule was made, before the change.
            for group, rate, shape in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = rate * shape(0)
        return scheduler

    def out_of_time(self, checkpoint: Path) -> bool:
        """Whether all the time was spent when this checkpoint was written."""
        return self.clock.budget is not None and _seconds(checkpoint / _CLOCK) >= self.clock.budget

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CLOCK).write_text(json.dumps({"seconds": self.clock.spent}), encoding="utf-8")
        save_trained(self.model.model, folder / TRAINED)

    def _load_best_model(self) -> None:
        load_trained(self.model.model, Path(str(self.state.best_model_checkpoint)) / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_trained(self.model.model, folder / TRAINED)
        self.clock.begin(_seconds(folder / _CLOCK))


class _Watch(TrainerCallback):
    """Reports progress, tells the mode of each step, ends training when time is spent, and looks at the loss."""

    def __init__(self, prepared: Prepared, clock: _Clock, tick: Tick) -> None:
        self.prepared, self.clock, self.tick = prepared, clock, tick
        self.out_of_time = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.prepared.on_step is not None:
            step = int(self.clock.share(args.device) * state.max_steps)
            self.prepared.on_step(max(state.global_step, step), state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.clock.share(args.device) >= 1:
            self.out_of_time = state.global_step < state.max_steps
            control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_text(folder / _SUMS, json.dumps(_sums_of(folder)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"step {state.global_step}: the loss is {loss}; lower training.learning_rate, or try "
                "--set training.autocast=false"
            )
        self.tick(1, f"loss {loss:.4f}")
