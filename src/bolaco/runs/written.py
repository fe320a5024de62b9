"""Texts that the model writes itself: the stage of a run that calibrates on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bolaco.data.memory import InMemory
from bolaco.data.sources import SELF, is_self
from bolaco.data.written import Writer, Writing
from bolaco.models.load import (
    check_finite,
    load_model,
    weights_fingerprint,
)
from bolaco.models.weights import stored_weights
from bolaco.parallel import team
from bolaco.recipe.recipe import Recipe
from bolaco.runs.session import Session, Source, texts_for


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
    if team.count() > 1:
        team.first(lambda: _written(readers, source, session) is None)
    # What is written already is read.
    return _written(readers, source, session)


def _written(readers: Sequence[Recipe], source: Source, session: Session) -> Source:
    """The source with the text, which is written as far as it is not there."""
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
