"""A run that makes a smaller model without factors, top to bottom.

load -> blocks that stay -> checkpoint -> evaluation of what was written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bolaco.checkpoint.info import CompressedInfo, Curves, versions
from bolaco.checkpoint.result import Result
from bolaco.checkpoint.write import check_savable
from bolaco.data.texts import Texts
from bolaco.evaluation.objective import check_tokens
from bolaco.models.load import resolve_device
from bolaco.models.quiet import quiet
from bolaco.models.structure import Structure, parameter_limit
from bolaco.progress import Reporter
from bolaco.recipe.recipe import TransformRecipe
from bolaco.report.curves import matrix_curves
from bolaco.runs.measure import common_values, dense_perplexity, finish, perplexities_of
from bolaco.runs.session import Loaded, Session, load, open_source, texts_for
from bolaco.work.files import require_space
from bolaco.work.folder import Clock, WorkFolder
from bolaco.work.output import work_beside


def chop(
    recipe: TransformRecipe,
    out: Path,
    reporter: Reporter,
    work: Path | None = None,
    keep_work: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
) -> Result[CompressedInfo]:
    """Runs ``recipe`` and writes ``out``; arguments as for :func:`bolaco.runs.compress.compress`.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    work = work_beside(out, work)
    resolve_device(recipe.device)
    with WorkFolder(work, recipe) as folder:
        session = Session(folder, Clock(folder.path, recipe), reporter)
        with session.clock.timed("load"):
            if model is None:
                reporter.say(f"loading {recipe.model}")
            source = open_source(recipe.model, model, tokenizer)
            texts = texts_for(recipe, source)
            loaded = load(source, recipe.dtype, recipe.device)
        result = chop_loaded(recipe, out, loaded, texts, session)
        if not keep_work:
            folder.remove()
    return result


def kept_blocks(recipe: TransformRecipe, structure: Structure) -> tuple[int, ...]:
    """The decoder blocks that stay.

    Raises:
        BudgetError: the budget is too small for any.
    """
    total = sum(site.size for site in structure.sites)
    return recipe.transform.plan(structure, recipe.keep, parameter_limit(recipe.keep, total), recipe.options)


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
    kept = kept_blocks(recipe, structure)
    require_space([(out, loaded.parameters * loaded.itemsize)], "the checkpoint")
    with session.clock.timed("dense evaluation"):
        dense = dense_perplexity(loaded, texts, recipe.validation.batch, session)

    def write(folder: Path) -> None:
        smaller = recipe.transform.apply(loaded.model, structure, kept)
        with quiet():
            smaller.save_pretrained(folder)

    def measure(folder: Path) -> tuple[CompressedInfo, Curves]:
        found, parameters = perplexities_of(folder, dense, loaded, texts, recipe.validation.batch, session)
        total = sum(site.size for site in structure.sites)
        linears = sum(site.size for site in structure.sites if site.layer in kept)
        info = CompressedInfo.model_validate(
            common_values(loaded, folder)
            | {
                "method": recipe.method.name,
                "storage": None,
                "keep": recipe.keep,
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
                "recipe": recipe.model_dump(mode="json"),
                "versions": versions(),
            }
        )
        return info, Curves(matrices=matrix_curves(structure.sites, {}, {}), refinement={})

    return finish(out, loaded, session, write, measure)
