"""``bolaco generate-text``: texts that a model writes itself, of its own kind or like others.

Like others means behind a soft prompt that is trained on these: that of stage ``prompt``, with one label.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from torch import Tensor

from bolaco.data.sources import read_documents
from bolaco.data.written import Writer, Writing, check_length
from bolaco.distill.prompt import learn_to_generate
from bolaco.distill.settings import Prompting
from bolaco.distill.task import Task
from bolaco.distill.teacher import Teacher
from bolaco.errors import DataError, RecipeError
from bolaco.models.load import (
    check_finite,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    weights_fingerprint,
)
from bolaco.progress import Reporter
from bolaco.runs.session import begin
from bolaco.settings import Section, Values, problems
from bolaco.work.folder import LOG_FILE, WorkFolder, work_beside

# Texts that a prompt is trained on at most, and tokens of their beginnings.
_TEXTS, _TOKENS = 500, 128


class Generation(Section):
    """What ``bolaco generate-text`` depends on."""

    model: str
    sequences: int = Field(gt=0, description="texts to write")
    like: str | None = Field(None, description="text source whose texts they are to be like")
    prompt: Prompting = Prompting(generate_steps=100, batch=8)
    writing: Writing = Writing()
    dtype: str = "auto"
    device: str = "auto"


def make_generation(
    model: str, sequences: int, like: str | None, dtype: str, device: str, writing: Values
) -> Generation:
    """The settings of a run.

    Raises:
        RecipeError: one is unknown or out of range.
    """
    values = {"model": model, "sequences": sequences, "like": like, "dtype": dtype, "device": device}
    values["writing"] = writing
    try:
        return Generation.model_validate(values)
    except ValidationError as error:
        raise RecipeError(problems(error, section=Generation).replace("writing.", "")) from None


@dataclass(frozen=True)
class WrittenTexts:
    """A file of texts, one JSON object ``{"text": ...}`` a line, and how much is in it.

    Attributes:
        path: of the file.
        texts, tokens: how many.
        losses: of held-out texts that it is like, in nats a token, behind the prompt untrained and trained; None
            where there is no prompt, or no text was held out.
    """

    path: Path
    texts: int
    tokens: int
    losses: tuple[float, float] | None = None


def generate_text(
    settings: Generation, out: Path, reporter: Reporter, work: Path | None = None, keep_work: bool = False
) -> WrittenTexts:
    """Lets a model write texts, and writes them to the file ``out``.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    work, losses = work_beside(out, work, settings), None
    resolve_device(settings.device)
    with WorkFolder(work, settings, out) as folder, reporter.logged(folder.path / LOG_FILE):
        tokenizer = load_tokenizer(settings.model)
        if not folder.taken_up(reporter, keep_work):
            session = begin(folder, settings, reporter)
            vectors = 0 if settings.like is None else 2 * settings.prompt.vectors
            check_length(settings.writing, load_config(settings.model), vectors)
            task = None if settings.like is None else examples(settings.like, tokenizer, settings.writing.length)
            reporter.say(f"loading {settings.model}")
            model = load_model(settings.model, settings.dtype, settings.device)
            check_finite(model)
            identity = f"{weights_fingerprint(model)} {model.device.type}"
            depends: dict[str, Any] = {"model": identity}
            prompt = None
            if task is not None:
                depends |= {"text": task.digest, "prompt": settings.prompt, "seed": settings.writing.seed}
                file = folder.artefact("prompt", **depends).path / "generate.safetensors"
                teacher = Teacher(model, tokenizer)
                prompt, losses = _prompt(teacher, task, settings, file, reporter)
            place = folder.artefact("written", **depends, writing=settings.writing).path
            writer = Writer(model, tokenizer, settings.writing, place, prompt)
            with session.reporter.stage("write", settings.sequences) as tick:
                texts = writer.until(lambda found: len(found) >= settings.sequences, tick)[: settings.sequences]
            with folder.output_file(out) as partial:
                partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
            folder.close(keep_work)
    written = [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]
    tokens = sum(len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in written)
    return WrittenTexts(out, len(written), tokens, losses)


def examples(source: str, tokenizer: Any, length: int) -> Task:
    """The beginnings of the texts of a source, as a task with one label.

    Raises:
        DataError: the source cannot be read, or has no text.
    """

    def beginnings() -> Iterator[str]:
        for document in itertools.islice(read_documents(source), _TEXTS):
            ids = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
            yield tokenizer.decode(ids[: min(length, _TOKENS)])

    texts = tuple(text for text in beginnings() if text.strip())
    if not texts:
        raise DataError(f"{source}: there is no text in it")
    return Task(source, ("text",), texts, (0,) * len(texts))


def _prompt(
    teacher: Teacher, task: Task, settings: Generation, file: Path, reporter: Reporter
) -> tuple[Tensor, tuple[float, float] | None]:
    """A prompt ``[2 vectors, width]`` trained on a task of one label, and :attr:`WrittenTexts.losses`."""
    learn, held_out = task.divided(settings.prompt.held_out, settings.writing.seed)
    with reporter.stage("prompt", settings.prompt.generate_steps) as tick:
        found, how = learn_to_generate(teacher, learn, held_out, settings.prompt, settings.writing.seed, file, tick)
    losses = (how.held_out[0], min(how.held_out.values())) if how.held_out else None
    return found[0], losses
