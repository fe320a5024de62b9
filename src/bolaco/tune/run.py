"""A tuning run from folder to folder, readable top to bottom.

load -> perplexity before -> the mode prepares the model -> training, with checkpoints in the work folder -> the mode
folds -> the result is written -> perplexity after, of the folder as loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from bolaco.checkpoint.info import INFO_FILE, read_info, versions, weight_bytes, write_info
from bolaco.checkpoint.write import new_folder, refuse_existing, refuse_nested
from bolaco.errors import CheckpointError, RecipeError, UnsupportedModelError
from bolaco.layers import SketchLinear
from bolaco.models.load import check_finite, load_config, load_model, load_tokenizer, quiet, resolve, resolve_device
from bolaco.pipeline import Result
from bolaco.progress import Reporter
from bolaco.report.card import tuned_card
from bolaco.report.html import REPORT_FILE, tuned_page
from bolaco.tune.data import prepare_data
from bolaco.tune.factored import growth
from bolaco.tune.loss import Student, mean_loss
from bolaco.tune.mode import Context, Mode, Prepared, is_coded
from bolaco.tune.registry import get_mode
from bolaco.tune.settings import TuneSettings
from bolaco.tune.settings import resolve as resolve_settings
from bolaco.tune.trainer import (
    TRAINED,
    TuneTrainer,
    last_checkpoint,
    load_trained,
    total_steps,
    trained_state,
    training_arguments,
)
from bolaco.work import WorkFolder, require_space, weights_fingerprint

# Points of the loss curve that bolaco.json keeps.
CURVE = 200


def tune(
    settings: TuneSettings, out: Path, reporter: Reporter, work: Path | None = None, keep_work: bool = False
) -> Result | None:
    """Tunes ``settings.model`` and writes ``out``; None in the processes of torchrun that are not the first.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    refuse_existing(out)
    work = work or out.with_name(out.name + ".work")
    refuse_nested(out, work)
    mode = get_mode(settings.mode)
    settings, options = resolve_settings(settings, mode)
    resolve_device(settings.device)
    if int(os.environ.get("RANK", "0")) > 0:
        _Run(settings, mode, options, work, None, Reporter(quiet=True)).train()
        return None
    with WorkFolder(work, settings) as folder:
        run = _Run(settings, mode, options, work, folder, reporter)
        before = run.before()
        training = run.train()
        with new_folder(out) as partial, folder.unfinished(partial):
            with folder.timed("write"):
                run.write(partial)
            with folder.timed("evaluation"):
                info = run.measure(partial, before, training)
            info["tuning"]["seconds"] = dict(folder.seconds)
            write_info(partial, info)
            (partial / REPORT_FILE).write_text(tuned_page(info, out.name), encoding="utf-8")
            (partial / "README.md").write_text(tuned_card(info, out.name), encoding="utf-8")
        if not keep_work:
            folder.remove()
    return Result(out, info)


class _Run:
    """The stages, with what they share. Loads everything, in order of cost."""

    def __init__(
        self,
        settings: TuneSettings,
        mode: Mode,
        options: Any,
        work: Path,
        folder: WorkFolder | None,
        reporter: Reporter,
    ) -> None:
        self.settings, self.mode = settings, mode
        self.work, self.folder, self.reporter = work, folder, reporter
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        with self._timed("load"):
            reporter.say(f"loading {settings.model}")
            self.info = _info(settings.model)
            config = load_config(settings.model)
            self.tokenizer = load_tokenizer(settings.model)
            self.data = prepare_data(settings, self.tokenizer, config, self.world)
            self._check_teacher(config)
            self.model = load_model(settings.model, device=settings.device, adapters="refuse")
            self.dtype = self.model.dtype
            self._as_trained(self.model)
            check_finite(self.model)
            self.context = Context(
                self.model,
                settings,
                options,
                self.info,
                self.data.tokens,
                self._original,
                None if folder is None else work,
                reporter,
            )
            if is_coded(self.model) and not mode.coded:
                raise UnsupportedModelError(
                    f"{settings.model}: its weights are coded into tables, and mode {mode.name!r} would lose that; "
                    "use --mode sketch, or make it dense with `bolaco export --dense`"
                )
            if mode.check is not None:
                mode.check(self.context)
            steps = total_steps(settings, len(self.data.train), self.world)
            with quiet():
                self.arguments = training_arguments(settings, steps, work / "checkpoints", self.model.device)
            if folder is not None:
                folder.same("model", weights_fingerprint(self.model), "the model's weights have changed")
                folder.same("texts", self.data.fingerprint, "the data or its tokens have changed")
        self.model.requires_grad_(False)
        # Without gradients; the mode has not touched anything yet.
        self.digests = _digests(self.model) if folder is not None else {}
        self.prepared: Prepared | None = None
        self.frozen = self.frozen_after = ""
        self.trainable = 0

    def _timed(self, stage: str) -> AbstractContextManager[None]:
        return nullcontext() if self.folder is None else self.folder.timed(stage)

    def _as_trained(self, model: PreTrainedModel) -> None:
        if self.settings.dtype == "float32":
            model.float()
        elif model.dtype != torch.float32 and not self.settings.training.autocast:
            raise RecipeError(
                f"dtype auto: {self.settings.model} is stored in {str(model.dtype).removeprefix('torch.')}, and what "
                "is trained is in float32; they meet with training.autocast only"
            )

    @property
    def _teacher_name(self) -> str:
        name = self.settings.distillation.teacher or self.info.get("model")
        if name is None:
            raise RecipeError(
                f"distillation.teacher is missing: {self.settings.model} has no {INFO_FILE} that names its original; "
                "--teacher MODEL"
            )
        return str(name)

    def _check_teacher(self, config: Any) -> None:
        """Raises RecipeError or UnsupportedModelError if a teacher is needed and none of this vocabulary is there."""
        if self.settings.distillation.weight == 0:
            return
        name = self._teacher_name
        theirs = load_config(name)
        if theirs.vocab_size != config.vocab_size:
            raise RecipeError(
                f"distillation.teacher: {name} has a vocabulary of {theirs.vocab_size} tokens, {self.settings.model} "
                f"one of {config.vocab_size}"
            )
        if load_tokenizer(name).get_vocab() != self.tokenizer.get_vocab():
            raise RecipeError(
                f"distillation.teacher: {name} has another vocabulary than {self.settings.model}; its probabilities "
                "are of other tokens"
            )

    def _other(self, name: str) -> PreTrainedModel:
        """Another model, beside the one that is tuned."""
        model = load_model(name, device=self.settings.device)
        self._as_trained(model)
        return model.requires_grad_(False)

    def _original(self, name: str | None = None) -> PreTrainedModel:
        name = name or self.info.get("model")
        if name is None:
            raise UnsupportedModelError(
                f"{self.settings.model}: mode {self.mode.name!r} needs the model that was compressed, and there is no "
                f"{INFO_FILE} that names it"
            )
        return self._other(str(name))

    def before(self) -> dict[str, Any]:
        """Loss of the input on the evaluation text."""
        assert self.folder is not None
        known: dict[str, Any] | None = self.folder.read("before", dict)
        if known is None:
            with self.folder.timed("evaluation"):
                known = self._measured(self.model, "evaluate the input")
            self.folder.write("before", known)
        return known

    def _measured(self, model: PreTrainedModel, title: str) -> dict[str, Any]:
        data, settings = self.data, self.settings
        with self.reporter.stage(title, len(data.evaluation)) as tick:
            loss, tokens = mean_loss(
                model, data.evaluation, data.collate, settings.training.batch, settings.chunk, tick
            )
        return {"loss": loss, "tokens": tokens}

    def train(self) -> dict[str, Any]:
        """Trains, or takes what an earlier call has trained; returns steps, curve and whether time ran out."""
        done: dict[str, Any] | None = None if self.folder is None else self.folder.read("trained", dict)
        with self._timed("prepare"):
            student = self._student(distils=self.settings.distillation.weight > 0 and done is None)
        if done is not None:
            load_trained(self.model, self.work / TRAINED)
            return done
        with self._timed("train"):
            done = self._trained(student)
        if self.folder is not None:
            partial = self.work / f"{TRAINED}.partial"
            save_file(trained_state(self.model), partial)
            partial.replace(self.work / TRAINED)
            self.folder.write("trained", done)
        return done

    def _student(self, distils: bool) -> Student:
        """The model as the mode prepares it, with its teacher."""
        settings = self.settings
        set_seed(settings.seed)
        self.prepared = self.mode.prepare(self.context)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.trainable = sum(p.numel() for p in trained.values())
        if self.trainable == 0:
            raise RecipeError(f"mode {self.mode.name!r} with these options trains no parameter")
        if self.folder is not None:
            # Two checkpoints stay while a third is written; each has the parameters and both of Adam's moments.
            size = sum(p.numel() for p in self.model.parameters()) * self.dtype.itemsize
            needs = [(self.work, 3 * 3 * 4 * self.trainable), (self.work.parent, size)]
            require_space(needs, "checkpoints and the result")
        teacher = self._other(self._teacher_name) if distils else None
        student = Student(self.model, settings.distillation.weight, teacher, settings.chunk)
        for parameter in trained.values():
            parameter.data = parameter.data.float()
        self.frozen = _frozen_digest(self.model)
        return student

    def _trained(self, student: Student) -> dict[str, Any]:
        assert self.prepared is not None
        settings, data = self.settings, self.data
        with quiet():
            _wait(self.arguments)
            steps = self.arguments.max_steps
            last = last_checkpoint(self.work / "checkpoints")
            begun = 0 if last is None else int(last[1]["global_step"])
            if last is not None:
                self.reporter.say(f"training: {begun} of {steps} steps are done already")
            with self.reporter.stage("train", steps - begun) as tick:
                trainer = TuneTrainer(
                    student,
                    self.prepared,
                    settings.training.minutes,
                    tick,
                    args=self.arguments,
                    train_dataset=data.train,
                    data_collator=data.collate,
                )
                out_of_time = last is not None and trainer.out_of_time(last[0]) and begun < steps
                finished = last is not None and (begun >= steps or out_of_time)
                if last is not None and finished:
                    load_trained(self.model, last[0] / TRAINED)
                else:
                    trainer.train(resume_from_checkpoint=None if last is None else str(last[0]))
                    out_of_time = trainer.watch.out_of_time
        state = last[1] if last is not None and finished else vars(trainer.state)
        return {
            "steps": int(state["global_step"]),
            "of_steps": steps,
            "out_of_time": out_of_time,
            "curve": _curve(state["log_history"]),
        }

    def write(self, folder: Path) -> None:
        """Folds, and writes the model with its tokenizer."""
        assert self.prepared is not None
        self.frozen_after = _frozen_digest(self.model)
        if self.frozen_after != self.frozen:
            raise CheckpointError(
                f"mode {self.mode.name!r}: frozen weights have changed during training; nothing is kept"
            )
        self.model.eval()
        with torch.no_grad():
            model: Any = self.prepared.finish()
        check_finite(model)
        model.requires_grad_(False).to(self.dtype)
        with quiet():
            model.save_pretrained(folder)
            if self.prepared.save_extra is not None:
                self.prepared.save_extra(folder)
            self.tokenizer.save_pretrained(folder)

    def measure(self, folder: Path, before: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
        """Loads what was written, compares and measures it, and returns the content of ``bolaco.json``."""
        assert self.prepared is not None
        model = load_model(str(folder), device=str(self.model.device), adapters="leave")
        self._as_trained(model)
        unchanged = self._unchanged(model, self.prepared.touched)
        parameters = weights_in(model)
        pivots = growth(model)
        if self.mode.attach is not None:
            self.mode.attach(model, folder)
        after = self._measured(model, "evaluate the result")
        record = {
            "mode": self.mode.name,
            "paper": self.mode.paper,
            "model": self.settings.model,
            "result_type": model.config.model_type,
            "trainable_parameters": self.trainable,
            "parameters": parameters,
            "bytes": weight_bytes(folder),
            "frozen_sha256": {"before": self.frozen, "after": self.frozen_after},
            "unchanged": unchanged,
            "steps": training["steps"],
            "of_steps": training["of_steps"],
            "out_of_time": training["out_of_time"],
            "examples": len(self.data.train),
            "kind": self.data.kind,
            "note": self.prepared.note,
            "perplexity": {
                "before": _exp(before["loss"]),
                "after": _exp(after["loss"]),
                "data": self.data.evaluation_source,
                "windows": len(self.data.evaluation),
                "tokens": after["tokens"],
            },
            "curve": training["curve"],
            "seconds": {},
            "settings": self.settings.model_dump(mode="json"),
            "versions": versions(),
        }
        info = {key: value for key, value in self.info.items() if key != "tuning"}
        if "tuning" in self.info:
            record["earlier"] = self.info["tuning"]
        if info:
            info |= {"parameters": parameters, "bytes": weight_bytes(folder)} | (
                {"pivot_growth": pivots} if pivots else {}
            )
        return {"format": 1, "model_type": self.model.config.model_type} | info | {"tuning": record}

    def _unchanged(self, model: PreTrainedModel, touched: frozenset[str]) -> dict[str, Any]:
        """What of the input is in the result bit by bit: all that the mode did not mean to touch."""
        kept = {
            name: digest
            for name, digest in self.digests.items()
            if not any(name == other or name.startswith(f"{other}.") for other in touched)
        }
        found = _digests(model, kept.keys())
        for name, digest in kept.items():
            if found.get(name) != digest:
                raise CheckpointError(f"{name}: changed by mode {self.mode.name!r}, which does not train it")
        return {"tensors": len(kept), "sha256": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()}


def _info(model: str) -> dict[str, Any]:
    """``bolaco.json`` of a folder, empty if it has none."""
    folder = Path(resolve(model).path)
    return read_info(folder, compressed=False) if (folder / INFO_FILE).is_file() else {}


def weights_in(model: nn.Module) -> int:
    """Parameters of a model; what is coded into tables counts as the weights it stands for."""
    coded = [module for module in model.modules() if isinstance(module, SketchLinear)]
    more = sum(module.in_features * module.out_features - module.lut.numel() for module in coded)
    return sum(p.numel() for p in model.parameters()) + more


def _hash(digest: Any, tensor: Tensor) -> None:
    digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _digests(model: nn.Module, names: Any = None) -> dict[str, str]:
    """SHA-256 of each tensor of a state dict, or of those of these names."""
    found = {}
    for name, tensor in model.state_dict().items():
        if names is None or name in names:
            digest = hashlib.sha256()
            _hash(digest, tensor)
            found[name] = digest.hexdigest()
    return found


def _frozen_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters that are not trained, and of the buffers that a checkpoint holds."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.requires_grad:
            digest.update(name.encode())
            _hash(digest, tensor)
    return digest.hexdigest()


def _curve(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Loss over steps, in at most :data:`CURVE` points; each is the mean of the steps up to it."""
    points = [(int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry]
    size = math.ceil(len(points) / CURVE) or 1
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [{"step": run[-1][0], "loss": sum(loss for _, loss in run) / len(run)} for run in runs]


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _wait(arguments: Any) -> None:
    """Until every process has come this far; the arguments have set up the group, if there is one."""
    _ = arguments.device
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
