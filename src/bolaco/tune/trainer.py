"""transformers' Trainer, saving only what is trained and reporting where bolaco reports."""

from __future__ import annotations

import json
import math
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from bolaco.errors import NonFiniteError, RecipeError, ResumeError
from bolaco.progress import Tick
from bolaco.tune.loss import Student
from bolaco.tune.mode import Prepared
from bolaco.tune.settings import TuneSettings

TRAINED = "trained.safetensors"
_CLOCK = "clock.json"
_SCHEDULES = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}


def total_steps(settings: TuneSettings, examples: int, world: int) -> int:
    """Optimiser steps of a run on so many examples in so many processes."""
    training = settings.training
    an_epoch = math.ceil(math.ceil(examples / (training.batch * world)) / training.gradient_accumulation)
    wanted = [] if training.max_steps is None else [training.max_steps]
    if training.epochs is not None:
        wanted.append(max(1, round(training.epochs * an_epoch)))
    return min(wanted)


def training_arguments(settings: TuneSettings, steps: int, folder: Path, device: torch.device) -> TrainingArguments:
    """What the settings mean to the Trainer.

    Raises:
        RecipeError: it refuses one of ``trainer.*``.
    """
    training = settings.training
    # Settings are resolved by now: nothing is open.
    assert training.schedule is not None
    assert training.learning_rate is not None
    assert training.warmup is not None
    assert training.weight_decay is not None
    more: dict[str, Any] = {"report_to": "none", "dataloader_pin_memory": device.type == "cuda", "save_total_limit": 2}
    if training.schedule == "cosine":
        more["lr_scheduler_kwargs"] = {"min_lr_rate": training.final_rate}
    try:
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=training.batch,
            gradient_accumulation_steps=training.gradient_accumulation,
            learning_rate=training.learning_rate,
            warmup_steps=training.warmup,
            lr_scheduler_type=_SCHEDULES[training.schedule],
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            bf16=training.autocast,
            save_strategy="steps",
            save_steps=training.save_steps,
            logging_strategy="steps",
            # Every step, so that the curve of a run that was interrupted has no seam.
            logging_steps=1,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            seed=settings.seed,
            data_seed=settings.seed,
            **(more | settings.trainer),
        )
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        why = textwrap.shorten(str(error), 300)
        raise RecipeError(f"trainer: transformers refuses these settings: {why}") from error


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained, by name."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, file: Path) -> None:
    """Puts what :func:`trained_state` saved back into a model that was prepared in the same way.

    Raises:
        ResumeError: the file is damaged, or of another model.
    """
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        state = load_file(file)
        if state.keys() != wanted.keys():
            raise ValueError("other parameters than those that are trained")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(state[name])
    except Exception as error:
        raise ResumeError(f"{file}: damaged ({error}); delete the work folder to start anew") from error


def last_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The latest whole checkpoint of the Trainer and its state; it writes the state last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda p: -int(p.name.rpartition("-")[2])):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path, state
    return None


def _agreed(value: float, device: torch.device) -> float:
    """The first process's value, in all of them: one clock decides."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    shared = torch.tensor(value, device=device)
    dist.broadcast(shared, 0)
    return float(shared)


def _seconds(file: Path) -> float:
    """What :class:`TuneTrainer` wrote of its clock.

    Raises:
        ResumeError: missing or damaged.
    """
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{file}: damaged ({error}); delete the work folder to start anew") from error


class _Clock:
    """Time spent on training, of a budget; what was spent before an interruption counts.

    Args:
        minutes: the budget; None is without end.
    """

    def __init__(self, minutes: float | None) -> None:
        self.budget = None if minutes is None else 60 * minutes
        self.earlier, self.start = 0.0, time.monotonic()

    def begin(self, earlier: float = 0.0) -> None:
        """Starts, with so many seconds spent before."""
        self.earlier, self.start = earlier, time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds."""
        return self.earlier + time.monotonic() - self.start

    def share(self, device: torch.device) -> float:
        """What is spent of the budget, from 0, the same in all processes; always 0 without one."""
        return 0.0 if self.budget is None else _agreed(self.spent / self.budget, device)


class TuneTrainer(Trainer):
    """Trains a :class:`Student`; its checkpoints hold what is trained, not the whole model."""

    model: Student

    def __init__(self, student: Student, prepared: Prepared, minutes: float | None, tick: Tick, **more: Any) -> None:
        self.clock = _Clock(minutes)
        self.watch = _Watch(prepared, self.clock, tick)
        super().__init__(model=student, callbacks=[self.watch], **more)
        self.remove_callback(PrinterCallback)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' schedule, run by the clock where time ends before the steps do.

        It is asked for the middle of each step: at their beginnings a warm-up has a learning rate of zero, at their
        ends a linear schedule has, and a short run has no step to give away.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, LambdaLR):
            steps, shapes = num_training_steps, scheduler.lr_lambdas

            def timed(shape: Any) -> Any:
                return lambda step: shape(min(steps, max(step + 0.5, self.clock.share(self.args.device) * steps)))

            scheduler.lr_lambdas = [timed(shape) for shape in shapes]
            # The first step's rate was set when the schedule was made.
            for group, rate, shape in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = rate * shape(0)
        return scheduler

    def out_of_time(self, checkpoint: Path) -> bool:
        """Whether training stopped at this checkpoint because its time was spent."""
        return self.clock.budget is not None and _seconds(checkpoint / _CLOCK) >= self.clock.budget

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CLOCK).write_text(json.dumps({"seconds": self.clock.spent}), encoding="utf-8")
        save_file(trained_state(self.model.model), folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_trained(self.model.model, folder / TRAINED)
        self.clock.begin(_seconds(folder / _CLOCK))


class _Watch(TrainerCallback):
    """Progress, the mode's schedule, the budget of time, and a look at the loss."""

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
