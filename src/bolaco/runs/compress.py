"""A run that factors matrices, from model to checkpoint, top to bottom.

load -> subject -> statistics and factors, block by block -> ranks -> blocks refined -> quantized, if that is asked for
-> checkpoint -> evaluation of what was written. Each stage leaves its result in the work folder, under a name that
changes with what it depends on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import nn
from transformers import PreTrainedModel

from bolaco.allocate.allocator import ALLOCATORS, Allocation, AllocationTask, Trials
from bolaco.checkpoint.info import CompressedInfo, Curves, EndCurve, TrialRecord, read_info, versions
from bolaco.checkpoint.result import Result
from bolaco.checkpoint.write import CompressedState, check_savable, compressed_state, write_model
from bolaco.data.memory import InMemory
from bolaco.data.sources import fingerprint
from bolaco.data.texts import Texts
from bolaco.evaluation.objective import check_tokens
from bolaco.factorize.method import METHODS
from bolaco.factorize.noise import Noise
from bolaco.factorize.store import FactorStore
from bolaco.parallel import team
from bolaco.progress import Reporter
from bolaco.recipe.line import recipe_line
from bolaco.recipe.recipe import LowRankRecipe
from bolaco.refine.run import Refiner, stored_block
from bolaco.refine.train import Training
from bolaco.report.curves import matrix_curves, thinned
from bolaco.runs.dry_run import check_quantizable, preview_task
from bolaco.runs.factors import FactorPlan, carry_out, factor_bytes, make_subject, plan_factors, subject_artefact
from bolaco.runs.forecast import Machine, amounts_of, forecast, takes_long
from bolaco.runs.measure import common_values, dense_perplexity, finish, perplexities_of
from bolaco.runs.quantized import (
    BlockMaker,
    bits_of,
    block_maker,
    make_noise,
    quantization_artefact,
    quantize,
)
from bolaco.runs.session import Loaded, Session, begin, load, open_source, texts_for, work_folder
from bolaco.runs.size import refused_as_asked, settled
from bolaco.runs.warm import warm_ranks
from bolaco.runs.written import with_own_text
from bolaco.storage.block import compressed_block
from bolaco.storage.budget import Budget, Ranks
from bolaco.storage.storage import STORAGES
from bolaco.work.blockstore import BlockStore
from bolaco.work.files import require_space
from bolaco.work.folder import Artefact

# Where in an unfinished result its blocks are before they are put together.
_PARTS = "parts"


def compress(
    recipe: LowRankRecipe,
    out: Path,
    reporter: Reporter,
    work: Path | None = None,
    keep_work: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    given: Mapping[str, InMemory] | None = None,
) -> Result[CompressedInfo]:
    """Runs ``recipe`` and writes ``out``.

    ``model`` and ``tokenizer`` stand in for loading ``recipe.model``; they are not changed. ``given`` are texts in
    memory by the names that the recipe has for them.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    # Which model it was that an earlier call was given is not known.
    with work_folder(recipe, out, work, model is None, recipe.device, reporter) as (folder, reporter):
        if folder.taken_up(reporter, keep_work):
            return Result(out, read_info(out))
        session = begin(folder, recipe, reporter)
        with session.clock.timed("load"):
            if model is None:
                reporter.say(f"loading {recipe.model}")
            reporter.say(recipe_line(recipe))
            # In order of cost: what is wrong with the options or the text shows before any weight is read.
            source = team.each(lambda: open_source(recipe.model, model, tokenizer, given))
        source = with_own_text([recipe], source, session)
        with session.clock.timed("load"):
            texts = team.each(lambda: texts_for(recipe, source))
            loaded = team.each(
                lambda: load(source, recipe.dtype, recipe.device, texts.calibration, recipe.stream, session)
            )
        result = compress_loaded(recipe, out, loaded, texts, session)
        folder.close(keep_work)
    return result


def compress_loaded(
    recipe: LowRankRecipe, out: Path, loaded: Loaded, texts: Texts, session: Session
) -> Result[CompressedInfo]:
    """The run from where model and texts are there; what is in the session's folder already is not made again.

    Raises:
        BolacoError: anything the user can mend, in one line.
    """
    for tokens in (texts.calibration, texts.evaluation):
        check_tokens(loaded.model, tokens)
    check_savable(loaded.model, loaded.tokenizer)
    asked, recipe = recipe, settled(recipe, loaded.shapes)
    if loaded.streamed:
        # What the gradients' walk keeps of every block grows with the layers too.
        on_disk = recipe.calibration.model_copy(update={"cache": "disk"})
        recipe = recipe.model_copy(update={"calibration": on_disk})
    made = subject_artefact(recipe, loaded, texts, session)
    if recipe.quantization is not None:
        check_quantizable(loaded.structure)
    preview = preview_task(recipe, loaded.structure, loaded.dtype)
    budget = preview.budget
    # Called for what it raises: a budget that cannot be met shows before anything that takes long.
    with refused_as_asked(asked, loaded.shapes):
        first = recipe.allocator.preview(preview, recipe.allocator_options)
    amounts = amounts_of(recipe, texts)
    if team.is_first() and takes_long(loaded.shapes, amounts):
        speed = Machine(loaded.model.device)
        found = forecast(recipe, loaded.shapes, preview, first, amounts, speed, loaded.streamed)
        session.reporter.say(f"{found.line}, what is there already not counted")
    warm = warm_ranks(recipe, budget)
    if made is not None and team.count() > 1:
        team.first(lambda: make_subject(recipe, loaded, texts, session, made) is None)  # read from its place by all
    subject = make_subject(recipe, loaded, texts, session, made)
    plan = plan_factors(recipe, loaded, texts, session, subject, made)
    team.first(lambda: _require_space(recipe, plan, loaded, session, out))
    with session.clock.timed("factorize"):
        (factors,) = carry_out([plan], session)
    with session.clock.timed("dense evaluation"):
        dense = dense_perplexity(loaded, texts, recipe.validation.batch, session)
    # Ranks share the validation text of a search; all else is done in a moment.
    once = _together if recipe.searches else _of_first
    allocation = once(lambda: _allocate(recipe, plan, factors, budget, warm, texts, session))
    plan = plan.taking(allocation.ranks)
    subject, units = plan.subject, plan.subject.structure
    budget = Budget(units.sites, recipe.share, recipe.form)
    refined = _refined(recipe, plan, allocation.ranks, session)
    if recipe.refinement.active and refined is None:
        session.reporter.say(f"blocks are not refined, they cannot be run alone: {subject.structure.walk.hooks}")
    if refined is not None:
        with session.clock.timed("refine"):
            _refine(recipe, plan, factors, allocation.ranks, refined, session)
    settings = recipe.quantization
    bits = {} if settings is None else bits_of(settings, allocation.bits, allocation.ranks)

    def made_block() -> BlockMaker:
        if settings is None:
            return _blocks(plan, factors, allocation.ranks, refined)
        make = block_maker(plan, factors, allocation.ranks, refined)
        coded = quantization_artefact(settings, plan, allocation.ranks, bits, refined, recipe.seed, session)
        with session.clock.timed("quantize"):
            return quantize(settings, plan, make, bits, coded, recipe.seed, session)

    states: list[CompressedState] = []

    def measure(folder: Path) -> tuple[CompressedInfo, Curves]:
        found, parameters = perplexities_of(folder, dense, loaded, texts, recipe.validation.batch, session)
        linears, ranks = budget.cost(allocation.ranks), allocation.ranks
        costs = {name: budget.storage.parameters(site, ranks.get(name)) for name, site in budget.sites.items()}
        sizes = {name: site.size for name, site in budget.sites.items()}
        info = CompressedInfo.model_validate(
            common_values(loaded, folder)
            | {
                "method": recipe.method.name,
                "storage": recipe.storage,
                "keep": recipe.share,
                "keep_linears": linears / budget.total,
                "keep_model": parameters / loaded.parameters,
                "parameters": parameters,
                "parameters_active": parameters - units.idle(costs),
                "parameters_active_dense": loaded.parameters - units.idle(sizes),
                "parameters_linears": linears,
                "parameters_linears_dense": budget.total,
                "layers": list(range(units.num_layers)),
                "ranks": {member.name: ranks[site.name] for site in units.sites for member in site.members},
                "stacks": [
                    [member.name for member in site.members]
                    for site in units.sites
                    if len(site.members) > 1 and ranks[site.name] is not None
                ],
                "kept": [{"name": kept.name, "parameters": kept.size, "reason": kept.reason} for kept in units.kept],
                "walk": units.walk.hooks,
                "tokens_per_expert": factors.tokens(units.num_layers),
                "pivot_growth": states[-1].growth,
                "perplexity": found,
                "dimensions": list(allocation.dimensions),
                "trials": [TrialRecord(**asdict(trial)) for trial in allocation.trials],
                "allocation": dict(allocation.notes),
                "bits": {member.name: bits[site.name] for site in units.sites for member in site.members if bits},
                "bits_group": None if settings is None else settings.group,
                "seconds": {},
                "recipe": asked.model_dump(mode="json"),
                "versions": versions(
                    METHODS.package(recipe.method.name),
                    STORAGES.package(recipe.storage),
                    ALLOCATORS.package(recipe.search.name),
                ),
            }
        )
        return info, _curves(plan, factors, ranks, refined)

    def rest() -> str:
        block = made_block()

        def write(folder: Path) -> None:
            blocks = (block(layer) for layer in range(units.num_layers))
            parts = BlockStore(folder / _PARTS) if loaded.streamed else None
            states.append(compressed_state(subject.model, subject.structure, blocks, recipe.form, parts))
            write_model(folder, subject.model, states[-1], loaded.dtype)
            if parts is not None:
                shutil.rmtree(parts.folder)
            subject.save_extra(folder)

        return finish(out, loaded, session, write, measure).path.name

    team.first(rest)  # one process writes
    return Result(out, read_info(out))


def _require_space(recipe: LowRankRecipe, plan: FactorPlan, loaded: Loaded, session: Session, out: Path) -> None:
    """Stops if what is still to be written (estimated from above) does not fit."""
    size = factor_bytes([plan], session)
    if recipe.refinement.active:
        size += sum(site.size for site in plan.subject.structure.sites) * loaded.itemsize
    # Streamed blocks are written beside the files that they are put together in.
    times = 2 if loaded.streamed else 1
    needs = [(session.folder.path, size), (out, times * loaded.parameters * loaded.dtype.itemsize)]
    require_space(needs, "the factors and the checkpoint")


def _together(allocate: Callable[[], Allocation]) -> Allocation:
    return allocate()


def _of_first(allocate: Callable[[], Allocation]) -> Allocation:
    """The allocation that the first process makes, on all."""
    if team.count() == 1:
        return allocate()
    kind = TypeAdapter(Allocation)
    found: Allocation = kind.validate_python(team.first(lambda: kind.dump_python(allocate(), mode="json")))
    return found


def _allocate(
    recipe: LowRankRecipe,
    plan: FactorPlan,
    factors: FactorStore,
    budget: Budget,
    warm: Ranks | None,
    texts: Texts,
    session: Session,
) -> Allocation:
    """The ranks, and what led to them."""
    trials = None
    options = recipe.allocator_options
    if texts.candidates is not None:
        ledger = session.folder.artefact(
            "search",
            factors=plan.artefact,
            top=dict(plan.top),
            keep=recipe.share,
            storage=recipe.storage,
            # More trials go on with the ledger of fewer.
            search=recipe.search.model_dump(mode="json") | {"trials": None, "warm_start": warm},
            validation=recipe.validation,
            text=fingerprint(texts.candidates),
            seed=recipe.seed,
        )
        trials = Trials(
            plan.subject,
            factors,
            texts.candidates,
            recipe.validation,
            ledger.path,
            session.reporter,
            session.clock.timed,
        )
    structure, top = plan.subject.structure, plan.top
    settings, noise = recipe.quantization, None
    if settings is not None and settings.bits is None:
        chosen = settings

        def noise() -> Mapping[int, Mapping[str, Noise]]:
            return make_noise(chosen, plan, factors, session)

    task = AllocationTask(
        structure,
        budget,
        recipe.search.rank_multiple,
        recipe.dense_types,
        lambda: {name: s for name, s in factors.spectra(structure.num_layers).items() if name in top},
        plan.method.method.comparable,
        recipe.seed,
        warm,
        trials,
        noise,
    )
    return recipe.allocator.allocate(task, options)


def _refined(recipe: LowRankRecipe, plan: FactorPlan, ranks: Ranks, session: Session) -> Artefact | None:
    """Where the refined blocks are, if they are refined."""
    settings = recipe.refinement
    if not settings.active or plan.subject.structure.walk.hooks:
        return None
    return session.folder.artefact(
        "refined",
        factors=plan.artefact,
        ranks=ranks,
        refinement=settings,
        text=fingerprint(plan.tokens[: settings.sequences]),
        batch=plan.settings.batch,
        groups=plan.settings.groups,
        seed=recipe.seed,
    )


def _refine(
    recipe: LowRankRecipe,
    plan: FactorPlan,
    factors: FactorStore,
    ranks: Ranks,
    artefact: Artefact | None,
    session: Session,
) -> None:
    """Every block as it will be, and the losses of its training, in the work folder."""
    assert artefact is not None  # it is when there is something to refine
    refiner = Refiner(
        plan.subject,
        factors,
        ranks,
        plan.tokens,
        plan.method,
        recipe.refinement,
        plan.settings,
        plan.stores,
        recipe.seed,
    )
    curves = artefact.read(dict[str, EndCurve]) or {}

    def on_block(name: str, found: Training) -> None:
        curves[name] = EndCurve(losses=thinned(found.losses), held_out=found.held_out)
        artefact.write(curves)

    refiner.run(BlockStore(artefact.path), session.reporter, on_block)


def _blocks(plan: FactorPlan, factors: FactorStore, ranks: Ranks, refined: Artefact | None) -> BlockMaker:
    """Makes the decoder blocks of the result, in the form in which they are trained."""

    def make(layer: int) -> nn.Module:
        if refined is not None:
            return stored_block(BlockStore(refined.path), plan.subject, layer)
        return compressed_block(plan.subject, layer, factors.load(layer) if factors.has(layer) else {}, ranks)

    return make


def _curves(plan: FactorPlan, factors: FactorStore, ranks: Ranks, refined: Artefact | None) -> Curves:
    """What the report draws."""
    structure = plan.subject.structure
    spectra = {name: s for name, s in factors.spectra(structure.num_layers).items() if name in plan.top}
    trained = {} if refined is None else refined.read(dict[str, EndCurve]) or {}
    return Curves(
        matrices=matrix_curves(structure.sites, spectra, ranks),
        refinement={name: curve.losses for name, curve in trained.items() if name.isdecimal()},
        ends={name: curve for name, curve in trained.items() if not name.isdecimal()} or None,
    )
