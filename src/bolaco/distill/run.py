"""A distillation, from a teacher and labelled texts to a student with its store, top to bottom.

prompt -> reinforce -> store -> student -> accuracy. Each stage leaves its result in the work folder, under a name that
changes with what it depends on, so a run that was ended goes on, and a stage that is asked for alone is found by the
next run with the same work folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from bolaco.checkpoint.info import versions
from bolaco.data.written import Writing, check_length
from bolaco.distill.measure import measured
from bolaco.distill.page import distilled_page
from bolaco.distill.predict import STORE
from bolaco.distill.prompt import Learned, Prompts, learn_to_classify, learn_to_generate
from bolaco.distill.record import FILE, DistilledInfo, read_distilled
from bolaco.distill.reinforce import Reinforced, Reinforcement
from bolaco.distill.settings import Distillation
from bolaco.distill.store import Kept, Store, build_store, judged, read_store
from bolaco.distill.student import student_config
from bolaco.distill.study import study
from bolaco.distill.task import Task, read_task
from bolaco.distill.teacher import Teacher, answers, save_prompt
from bolaco.errors import DataError
from bolaco.models.load import (
    check_finite,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    weights_fingerprint,
)
from bolaco.progress import Reporter
from bolaco.report.html import REPORT_FILE
from bolaco.runs.session import Session, begin
from bolaco.settings import json_text
from bolaco.work.files import whole
from bolaco.work.folder import LOG_FILE, WorkFolder, work_beside
from bolaco.work.tensors import load_tensors, save_tensors

STAGES = ("prompt", "reinforce", "store", "student")


class _Run(BaseModel):
    """What a run does: the settings, and the last stage."""

    model_config = ConfigDict(frozen=True)

    settings: Distillation
    until: str


@dataclass(frozen=True)
class Distilled:
    """What a run wrote: its folder, and the record of it; None where it stopped before the student."""

    path: Path
    info: DistilledInfo | None


@dataclass(frozen=True)
class Texts:
    """The labelled texts of a run.

    Attributes:
        learn: what prompts are learned from.
        held_out: what prompts are chosen on.
        known: the labelled texts of the store, which the student learns from.
        reported: what accuracy is reported on.
    """

    learn: Task
    held_out: Task
    known: Task
    reported: Task


def task_texts(settings: Distillation) -> Texts:
    """Reads the task, and divides it.

    With texts to report on given apart, the student learns from all of the task; without them, from those that prompts
    are learned from.

    Raises:
        DataError: see :func:`bolaco.distill.task.read_task`; or there would be nothing to report on.
    """
    task = read_task(settings.task, settings.labels)
    learn, held_out = task.divided(settings.prompt.held_out, settings.seed)
    if settings.evaluation is not None:
        return Texts(learn, held_out, task, read_task(settings.evaluation, task.labels, known=True))
    if not held_out.texts:
        raise DataError(f"{settings.task}: has one text of each label; give two of one, or texts to report on (--eval)")
    return Texts(learn, held_out, learn, held_out)


def distill(
    settings: Distillation,
    out: Path,
    reporter: Reporter,
    work: Path | None = None,
    keep_work: bool = False,
    until: str = STAGES[-1],
) -> Distilled:
    """Runs the stages up to one of :data:`STAGES`, and writes ``out``.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    run = _Run(settings=settings, until=until)
    work = work_beside(out, work, run)
    resolve_device(settings.device)
    whole_run = until == STAGES[-1]
    with WorkFolder(work, run, out) as folder, reporter.logged(folder.path / LOG_FILE):
        if folder.taken_up(reporter, keep_work or not whole_run):
            return Distilled(out, read_distilled(out) if whole_run else None)
        session = begin(folder, run, reporter)
        # In order of cost: what is wrong with the options or the texts shows before any weight is read.
        texts = task_texts(settings)
        student_config(settings.student.config, texts.known.labels, settings.student.vocabulary)
        with session.clock.timed("load"):
            reporter.say(f"loading {settings.teacher}")
            config, tokenizer = load_config(settings.teacher), load_tokenizer(settings.teacher)
            _, words = answers(tokenizer, texts.known.labels)
            check_length(Writing(length=settings.reinforce.length), config, 2 * settings.prompt.vectors)
            model = load_model(settings.teacher, settings.dtype, settings.device)
            check_finite(model)
        if not words:
            reporter.say("labels begin with the same token: the teacher answers with letters (A, B, ..)")
        stages = Stages(settings, texts, Teacher(model, tokenizer), session)
        prompts = stages.reinforced[0] if until != STAGES[0] else stages.prompts[0]
        if whole_run:
            info = stages.finish(out)
        else:
            store = stages.store[0] if until == STORE else None
            with folder.output(out) as partial:
                stages.save_prompts(partial, prompts)
                if store is not None:
                    store.save(partial / STORE)
            info = None
        folder.close(keep_work or not whole_run)
    return Distilled(out, info)


class Stages:
    """The stages of a run; each is made when it is asked for, from the stages before it.

    Args:
        settings: of the run.
        texts: its labelled texts.
        teacher: the frozen model.
        session: where results are kept.
    """

    def __init__(self, settings: Distillation, texts: Texts, teacher: Teacher, session: Session) -> None:
        self.settings, self.texts, self.teacher, self.session = settings, texts, teacher, session
        self.identity = f"{weights_fingerprint(teacher.model)} {teacher.model.device.type}"
        folder = session.folder
        self._prompt = folder.artefact(
            "prompt",
            teacher=self.identity,
            texts=[texts.learn.digest, texts.held_out.digest],
            settings=settings.prompt,
            seed=settings.seed,
        )
        self._reinforce = folder.artefact("reinforce", prompts=self._prompt, settings=settings.reinforce)
        self._store = folder.artefact(
            "store", prompts=self._reinforce, texts=texts.known.digest, settings=settings.store
        )
        self._student = folder.artefact(
            "student", store=self._store, settings=settings.student, held_out=settings.store.held_out
        )
        self._prompts: tuple[Prompts, Learned, Learned] | None = None
        self._reinforced: tuple[Prompts, Reinforced] | None = None
        self._made: tuple[Store, Kept] | None = None

    @property
    def prompts(self) -> tuple[Prompts, Learned, Learned]:
        """The supervised prompts, and how the one that classifies and those that generate were learned."""
        if self._prompts is None:
            settings, texts, place = self.settings.prompt, self.texts, self._prompt.path
            given = (self.teacher, texts.learn, texts.held_out, settings, self.settings.seed)
            with self.session.clock.timed("prompt"):
                tokens, _ = answers(self.teacher.tokenizer, texts.learn.labels)
                with self.session.reporter.stage("prompt that classifies", settings.steps) as tick:
                    classify, how = learn_to_classify(*given, place / "classify.safetensors", tick)
                with self.session.reporter.stage("prompts that generate", settings.generate_steps) as tick:
                    generate, other = learn_to_generate(*given, place / "generate.safetensors", tick)
            self._prompts = Prompts(classify, generate, tokens), how, other
        return self._prompts

    @property
    def center(self) -> Tensor:
        """``[width]``, mean embedding of the labelled texts."""

        def compute() -> Tensor:
            found = judged(self.teacher, self.prompts[0], self.texts.learn.texts, self.settings, self.texts.learn.name)
            return found.embeddings.mean(0)

        return _kept(self._prompt.path / "center.safetensors", compute)

    @property
    def reinforced(self) -> tuple[Prompts, Reinforced]:
        """The prompts after the policy gradient, and how that went."""
        if self._reinforced is None:
            settings = self.settings
            prompts, center = self.prompts[0], self.center
            labels = self.texts.learn.labels
            with self.session.clock.timed("reinforce"):
                given = (settings.prompt, settings.reinforce, settings.seed)
                work = Reinforcement(self.teacher, prompts, labels, center, *given)
                with self.session.reporter.stage("reinforce", work.total) as tick:
                    self._reinforced = work.run(self._reinforce.path / "policy.safetensors", tick)
        return self._reinforced

    @property
    def store(self) -> tuple[Store, Kept]:
        """The store of the teacher, and what became of the texts that were drawn for it."""
        if self._made is None:
            place, labels = self._store.path / STORE, self.texts.known.labels
            kept = self._store.read(Kept)
            if kept is not None and place.is_dir():
                self._made = read_store(place, labels), kept
                return self._made
            prompts, center = self.reinforced[0], self.center
            with (
                self.session.clock.timed("store"),
                self.session.reporter.stage("store", self.settings.store.samples) as tick,
            ):
                given = (self.teacher, prompts, self.texts.known, center, self.settings)
                store, kept = build_store(*given, self._store.path, tick)
                if not place.is_dir():
                    with whole(place) as partial:
                        shutil.rmtree(partial, ignore_errors=True)  # of a run that was ended
                        store.save(partial)
                self._store.write(asdict(kept))
            self._made = store, kept
            for label, count in kept.kept.items():
                if not count:
                    self.session.reporter.say(f"store: no text of {label} was kept, of {kept.drawn[label]} drawn")
        return self._made

    def save_prompts(self, folder: Path, prompts: Prompts) -> None:
        """Writes soft prompts as PEFT reads them: ``prompts/classify``, and ``prompts/generate-N`` for each label."""
        model, name = self.teacher.model, self.settings.teacher
        save_prompt(prompts.classify, folder / "prompts" / "classify", model, name)
        for number, prompt in enumerate(prompts.generate):
            save_prompt(prompt, folder / "prompts" / f"generate-{number}", model, name)
        words = self.teacher.tokenizer.batch_decode(prompts.tokens[:, None])
        record = {
            "labels": list(self.texts.known.labels),
            "answers": words,
            "template": self.settings.prompt.template,
        }
        (folder / "prompts" / "prompts.json").write_text(json_text(record), encoding="utf-8")

    def finish(self, out: Path) -> DistilledInfo:
        """Trains the student, measures it and writes the folder."""
        settings, session = self.settings, self.session
        store, kept = self.store
        with session.clock.timed("student"), session.reporter.stage("student", settings.student.steps) as tick:
            file = self._student.path / "student.safetensors"
            studied = study(store, settings.student, settings.store.held_out, settings.seed, file, tick)
        with session.clock.timed("accuracy"):
            reported = self.texts.reported
            teacher = judged(self.teacher, self.prompts[0], reported.texts, settings, reported.name)
            accuracy = measured(studied, teacher, reported, settings.seed)
        (_, classify, generate), (prompts, reinforced) = self.prompts, self.reinforced
        info = DistilledInfo.model_validate(
            {
                "teacher": settings.teacher,
                "labels": store.labels,
                "length": settings.student.length,
                "index": settings.student.index,
                "retrieval": studied.retrieval.model_dump(),
                "parameters": studied.student.parameters,
                "parameters_teacher": sum(p.numel() for p in self.teacher.model.parameters()),
                "classify": asdict(classify),
                "generate": asdict(generate),
                "reinforced": asdict(reinforced),
                "store": asdict(kept),
                "losses": studied.losses,
                "accuracy": accuracy.model_dump(),
                "settings": settings.model_dump(mode="json"),
                "seconds": session.clock.seconds,
                "versions": versions(),
            }
        )
        with session.folder.output(out) as partial:
            studied.student.save(partial)
            studied.store.save(partial / STORE)
            self.save_prompts(partial, prompts)
            (partial / FILE).write_text(json_text(info), encoding="utf-8")
            (partial / REPORT_FILE).write_text(distilled_page(info, out.name), encoding="utf-8")
        return info


def _kept(file: Path, compute: Callable[[], Tensor]) -> Tensor:
    """A tensor that is computed once.

    Raises:
        ResumeError: its file is damaged.
    """
    if not file.exists():
        found = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, {"tensor": found})
    return load_tensors(file)["tensor"]
