"""A run that makes a smaller model without factors, top to bottom.

load -> blocks that stay -> checkpoint -> evaluation of what was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bolaco.checkpoint.info import CompressedInfo, Curves, read_info, versions
from bolaco.checkpoint.result import Result
from bolaco.checkpoint.write import check_savable
from bolaco.data.memory import InMemory
from bolaco.data.texts import Texts
from bolaco.errors import RankError
from bolaco.evaluation.objective import check_tokens
from bolaco.models.find import meta_model
from bolaco.models.load import resolve_device
from bolaco.models.quiet import quiet
from bolaco.models.structure import Structure, parameter_limit
from bolaco.parallel.launch import launched
from bolaco.progress import Reporter
from bolaco.recipe.line import recipe_line
from bolaco.recipe.recipe import TransformRecipe
from bolaco.report.curves import matrix_curves
from bolaco.runs.measure import common_values, dense_perplexity, finish, perplexities_of
from bolaco.runs.session import Loaded, Session, begin, load, open_source, texts_for
from bolaco.runs.size import refused_as_asked, saved_tensors, settled
from bolaco.work.files import require_space
from bolaco.work.folder import LOG_FILE, WorkFolder, work_beside


def chop(
    recipe: TransformRecipe,
    out: Path,
    reporter: Reporter,
    work: Path | None = None,
    keep_work: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    given: Mapping[str, InMemory] | None = None,
) -> Result[CompressedInfo]:
    """Runs ``recipe`` and writes ``out``; arguments as for :func:`bolaco.runs.compress.compress`.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    if launched() > 1:
        raise RankError(f"method {recipe.method.name} is done by one process; start it without torchrun")
    # Which model it was that an earlier call was given is not known.
    work = work_beside(out, work, recipe if model is None else None)
    resolve_device(recipe.device)
    with WorkFolder(work, recipe, out) as folder, reporter.logged(folder.path / LOG_FILE):
        if folder.taken_up(reporter, keep_work):
            return Result(out, read_info(out))
        session = begin(folder, recipe, reporter)
        with session.clock.timed("load"):
            if model is None:
                reporter.say(f"loading {recipe.model}")
            reporter.say(recipe_line(recipe))
            source = open_source(recipe.model, model, tokenizer, given)
            texts = texts_for(recipe, source)
            loaded = load(source, recipe.dtype, recipe.device, None, recipe.stream, session)
        result = chop_loaded(recipe, out, loaded, texts, session)
        folder.close(keep_work)
    return result


def kept_blocks(recipe: TransformRecipe, structure: Structure) -> tuple[int, ...]:
    """The decoder blocks that stay.

    Raises:
        BudgetError: the budget is too small for any.
    """
    total = sum(site.size for site in structure.sites)
    return recipe.transform.plan(structure, recipe.share, parameter_limit(recipe.share, total), recipe.options)


def chop_loaded(
    recipe: TransformRecipe, out: Path, loaded: Loaded, texts: Texts, session: Session
) -> Result[CompressedInfo]:
    """The run from where model and texts are there.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    check_tokens(loaded.model, texts.evaluation)
    check_savable(loaded.model, loaded.tokenizer, compressed=False)
    structure = loaded.structure
    asked, recipe = recipe, settled(recipe, loaded.shapes)
    with refused_as_asked(asked, loaded.shapes):
        kept = kept_blocks(recipe, structure)
    require_space([(out, loaded.parameters * loaded.dtype.itemsize)], "the checkpoint")
    with session.clock.timed("dense evaluation"):
        dense = dense_perplexity(loaded, texts, recipe.validation.batch, session)

    def write(folder: Path) -> None:
        smaller = recipe.transform.apply(loaded.model, structure, kept)
        skeleton: Any = smaller
        if loaded.dtype != smaller.dtype:
            # Only its tensors are in memory; what is loaded is not to be changed.
            skeleton = meta_model(smaller.config)
            skeleton.to(loaded.dtype)
            skeleton.generation_config = smaller.generation_config
        with quiet():
            skeleton.save_pretrained(folder, state_dict=saved_tensors(smaller, loaded.dtype))

    def measure(folder: Path) -> tuple[CompressedInfo, Curves]:
        found, parameters = perplexities_of(folder, dense, loaded, texts, recipe.validation.batch, session)
        total = sum(site.size for site in structure.sites)
        linears = sum(site.size for site in structure.sites if site.layer in kept)
        info = CompressedInfo.model_validate(
            common_values(loaded, folder)
            | {
                "method": recipe.method.name,
                "storage": None,
                "keep": recipe.share,
                "keep_linears": linears / total,
                "keep_model": parameters / loaded.parameters,
                "parameters": parameters,
                "parameters_linears": linears,
                "parameters_linears_dense": total,
                "layers": list(kept),
                "ranks": {},
                "perplexity": found,
                "trials": [],
                "seconds": {},
                "recipe": asked.model_dump(mode="json"),
                "versions": versions(),
            }
        )
        return info, Curves(matrices=matrix_curves(structure.sites, {}, {}), refinement={})

    return finish(out, loaded, session, write, measure)
