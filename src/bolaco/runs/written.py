"""Texts that the model writes itself: the stage of a run that calibrates on them, and the run that is nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field, ValidationError

from bolaco.data.memory import InMemory
from bolaco.data.sources import SELF, is_self
from bolaco.data.written import Writer, Writing, check_length
from bolaco.errors import RecipeError
from bolaco.models.load import (
    check_finite,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    weights_fingerprint,
)
from bolaco.models.weights import stored_weights
from bolaco.progress import Reporter
from bolaco.recipe.recipe import Recipe
from bolaco.runs.session import Session, Source, begin, texts_for
from bolaco.settings import Section, Values, problems
from bolaco.work.folder import LOG_FILE, WorkFolder, work_beside


def with_own_text(recipes: Iterable[Recipe], source: Source, session: Session, more: tuple[str, ...] = ()) -> Source:
    """The source, with what the model has written itself where recipes calibrate on that (``--calibration self``).

    It is written with the defaults of :class:`Writing`, in texts of the length of the calibration sequences. The model
    is read for it before the run reads it: what comes after looks at the text first.

    Args:
        recipes: of the run; the text is long enough for each.
        source: the model, before its weights are read.
        session: where the text is kept, under a name that changes with the model and the settings.
        more: sources of further texts to report on.

    Raises:
        BolacoError: the model cannot be read or cannot write as much, or another text of a recipe is not as it should
            be.
    """
    readers = [recipe for recipe in recipes if is_self(recipe.calibration.source) and recipe.calibrates]
    if not readers:
        return source
    for recipe in readers:
        # Called for what it raises: writing takes long.
        texts_for(recipe, source, more=more, local=True)
    first = readers[0]
    length = max(recipe.calibration.seq_len for recipe in readers)
    needed = max(map(_tokens, readers))
    writing = Writing(length=length, seed=first.seed)
    with session.clock.timed("own text"):
        model = source.model
        if model is None:
            stored = stored_weights(source.name)
            in_memory = "auto" if stored is not None and stored.gguf else first.dtype
            model = load_model(source.name, in_memory, first.device, "refuse")
        check_finite(model)
        identity = f"{weights_fingerprint(model)} {model.device.type}"
        place = session.folder.artefact("written", model=identity, writing=writing).path
        writer = Writer(model, source.tokenizer, writing, place)
        tokens = _Counted(source)
        with session.reporter.stage("own text", needed) as tick:
            said = 0

            def enough(texts: Sequence[str]) -> bool:
                nonlocal said
                now = min(tokens.of(texts), needed)
                if now > said:
                    tick(now - said)
                    said = now
                return now >= needed

            documents = writer.until(enough)
    return replace(source, given={**source.given, SELF: InMemory(SELF, tuple(documents))})


def _tokens(recipe: Recipe) -> int:
    """How many tokens a recipe takes of the text."""
    calibration, validation = recipe.calibration, recipe.validation
    count = calibration.sequences * calibration.seq_len
    if recipe.searches and (validation.source is None or is_self(validation.source)):
        count += validation.candidates * (validation.seq_len or calibration.seq_len)
    return count


class _Counted:
    """The number of tokens of texts that become more, as they will be when they are read."""

    def __init__(self, source: Source) -> None:
        self._tokenizer, self._texts, self._sum = source.tokenizer, 0, 0

    def of(self, texts: Sequence[str]) -> int:
        for text in texts[self._texts :]:
            self._sum += len(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        self._texts = len(texts)
        return self._sum


class Generation(Section):
    """What ``bolaco generate-text`` depends on."""

    model: str
    sequences: int = Field(gt=0, description="texts to write")
    writing: Writing = Writing()
    dtype: str = "auto"
    device: str = "auto"


def make_generation(model: str, sequences: int, dtype: str, device: str, writing: Values) -> Generation:
    """The settings of a run.

    Raises:
        RecipeError: one is unknown or out of range.
    """
    values = {"model": model, "sequences": sequences, "writing": writing, "dtype": dtype, "device": device}
    try:
        return Generation.model_validate(values)
    except ValidationError as error:
        raise RecipeError(problems(error, section=Generation).replace("writing.", "")) from None


@dataclass(frozen=True)
class WrittenTexts:
    """A file of texts, one JSON object ``{"text": ...}`` a line, and how much is in it."""

    path: Path
    texts: int
    tokens: int


def generate_text(
    settings: Generation, out: Path, reporter: Reporter, work: Path | None = None, keep_work: bool = False
) -> WrittenTexts:
    """Lets a model write texts, and writes them to the file ``out``.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    work = work_beside(out, work, settings)
    resolve_device(settings.device)
    with WorkFolder(work, settings, out) as folder, reporter.logged(folder.path / LOG_FILE):
        tokenizer = load_tokenizer(settings.model)
        if not folder.taken_up(reporter, keep_work):
            session = begin(folder, settings, reporter)
            check_length(settings.writing, load_config(settings.model))
            reporter.say(f"loading {settings.model}")
            model = load_model(settings.model, settings.dtype, settings.device)
            check_finite(model)
            identity = f"{weights_fingerprint(model)} {model.device.type}"
            place = folder.artefact("written", model=identity, writing=settings.writing).path
            writer = Writer(model, tokenizer, settings.writing, place)
            with session.reporter.stage("write", settings.sequences) as tick:
                texts = writer.until(lambda found: len(found) >= settings.sequences, tick)[: settings.sequences]
            with folder.output_file(out) as partial:
                partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
            folder.close(keep_work)
    written = [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]
    tokens = sum(len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in written)
    return WrittenTexts(out, len(written), tokens)
