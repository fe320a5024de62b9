"""One recipe at several keep ratios: the model, its statistics and its factors once, then a result for each.

Every result is an artefact of the common work folder, so a run that was killed goes on with the next one. The output
folder appears when all of them are there: ``keep-0.9``, ``keep-0.8``, .. and a table of quality against size.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from bolaco.checkpoint.info import CompressedInfo, read_info
from bolaco.checkpoint.result import Result
from bolaco.data.memory import InMemory
from bolaco.data.sources import fingerprint
from bolaco.data.texts import Texts
from bolaco.errors import RecipeError
from bolaco.models.structure import Structure
from bolaco.parallel import team
from bolaco.progress import Reporter
from bolaco.recipe.recipe import BaseRecipe, LowRankRecipe, Recipe
from bolaco.report.tables import sizes_markdown
from bolaco.runs.chop import chop_loaded, kept_blocks
from bolaco.runs.compress import compress_loaded
from bolaco.runs.dry_run import preview_task
from bolaco.runs.session import Loaded, Session, begin, load, open_source, texts_for, work_folder
from bolaco.runs.written import with_own_text
from bolaco.work.folder import Clock
from bolaco.work.output import link_or_copy

R = TypeVar("R", bound=BaseRecipe)


class Several(BaseModel):
    """What such a run depends on: a recipe for each keep ratio, by the name of its folder."""

    model_config = ConfigDict(frozen=True)

    recipes: dict[str, Recipe]


@dataclass(frozen=True)
class SeveralResults:
    """The folder that was written, and the results in it by name."""

    path: Path
    results: Mapping[str, Result[CompressedInfo]]


def at_ratios(recipe: R, keep: Sequence[float]) -> dict[str, R]:
    """The recipe at several keep ratios, by the names of their folders.

    Raises:
        RecipeError: a ratio is out of range, or the result is to be tuned.
    """
    if recipe.tuning is not None:
        raise RecipeError("tuning: it is of one result; give one --keep, or tune the results one by one")
    for ratio in keep:
        if not 0 < ratio <= 1:
            raise RecipeError(f"keep: must be above 0 and at most 1 (got {ratio:g})")
    return {f"keep-{ratio}".removesuffix(".0"): recipe.model_copy(update={"keep": ratio}) for ratio in keep}


def compress_several(
    recipes: Mapping[str, Recipe],
    out: Path,
    reporter: Reporter,
    work: Path | None = None,
    keep_work: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    given: Mapping[str, InMemory] | None = None,
) -> SeveralResults:
    """Runs recipes that differ in their size only, and writes ``out`` with a folder for each.

    ``model``, ``tokenizer`` and ``given`` are as for :func:`bolaco.runs.compress.compress`.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    run, first = Several(recipes=dict(recipes)), next(iter(recipes.values()))
    # Which model it was that an earlier call was given is not known.
    with work_folder(run, out, work, model is None, first.device, reporter) as (folder, reporter):
        if folder.taken_up(reporter, keep_work):
            return SeveralResults(out, {name: Result(out / name, read_info(out / name)) for name in recipes})
        session = begin(folder, run, reporter)
        with session.clock.timed("load"):
            if model is None:
                reporter.say(f"loading {first.model}")
            source = team.each(lambda: open_source(first.model, model, tokenizer, given))
        source = with_own_text([first], source, session)
        with session.clock.timed("load"):
            texts = team.each(lambda: texts_for(first, source))
            loaded = team.each(
                lambda: load(source, first.dtype, first.device, texts.calibration, first.stream, session)
            )
        for recipe in recipes.values():
            check_budget(recipe, loaded.structure, loaded.dtype)
        places = {name: _result(name, recipe, loaded, texts, session) for name, recipe in recipes.items()}
        infos = {name: read_info(place) for name, place in places.items()}

        def put_together() -> None:
            with folder.output(out) as partial:
                (partial / "table.md").write_text(sizes_markdown(infos), encoding="utf-8")
                for name, place in places.items():
                    shutil.copytree(place, partial / name, copy_function=link_or_copy)

        team.first(put_together)
        folder.close(keep_work)
    return SeveralResults(out, {name: Result(out / name, info) for name, info in infos.items()})


def check_budget(recipe: Recipe, structure: Structure, dtype: torch.dtype) -> None:
    """Stops before anything takes long if the size of a recipe cannot be met.

    Raises:
        BudgetError: it cannot.
    """
    if isinstance(recipe, LowRankRecipe):
        recipe.allocator.preview(preview_task(recipe, structure, dtype), recipe.allocator_options)
    else:
        kept_blocks(recipe, structure)


def _result(name: str, recipe: Recipe, loaded: Loaded, texts: Texts, session: Session) -> Path:
    """Where the result of one recipe is, in the work folder; it is made if it is not there yet."""
    candidates = None if texts.candidates is None else fingerprint(texts.candidates)
    artefact = session.folder.artefact(
        "result",
        model=loaded.identity,
        recipe=recipe,
        text=[fingerprint(texts.calibration), texts.measured, candidates],
    )
    place = artefact.path / name
    if team.agreed(place.exists()):
        session.reporter.say(f"{name}: is there already")
        return place
    session.reporter.say(f"{name}:")
    clock = Clock(session.folder.path, {"several": recipe}, session.reporter.detail)
    own = replace(session, clock=clock)
    if isinstance(recipe, LowRankRecipe):
        compress_loaded(recipe, place, loaded, texts, own)
    else:
        chop_loaded(recipe, place, loaded, texts, own)
    # What only this result needed.
    session.folder.discard("subject", "search", "refined", "quantized")
    return place
