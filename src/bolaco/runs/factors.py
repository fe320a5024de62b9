"""The stages from a model to factors of its matrices: subject, statistics, factors.

A :class:`FactorPlan` says what one recipe needs; :func:`carry_out` does it for several at once, in one pass over the
text for all that share one. What is finished is found again by what it depends on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from bolaco.data.settings import Calibration
from bolaco.data.sources import fingerprint
from bolaco.data.texts import Texts
from bolaco.errors import ResumeError
from bolaco.factorize.method import ChosenMethod
from bolaco.factorize.run import FactorJob, factorize
from bolaco.factorize.store import FactorStore
from bolaco.models.structure import Site, hidden_size
from bolaco.models.subject import Subject
from bolaco.models.walk import in_files
from bolaco.parallel import team
from bolaco.recipe.recipe import LowRankRecipe
from bolaco.runs.session import Loaded, Session
from bolaco.statistics.statistic import GradientStatistic, StoredStatistic
from bolaco.statistics.stored import StatisticStore, estimate_gradients, stored_bytes
from bolaco.storage.budget import Ranks
from bolaco.transform.subject import SubjectTask
from bolaco.work.files import write_text
from bolaco.work.folder import TOP_FILE, Artefact, digest


@dataclass(frozen=True)
class Place:
    """Where a statistic is on disk, and a key that changes with everything it depends on."""

    path: Path
    key: str


@dataclass(frozen=True)
class FactorPlan:
    """What one recipe needs of statistics and factors.

    Attributes:
        method: with its options.
        subject: what is factored.
        tokens: ``[sequences, length]``, the calibration text.
        settings: how it is read.
        seed: of sampled labels.
        top: largest rank of each matrix that may be factored, by site name.
        statistics: what the method needs that is on disk, and where that is.
        artefact: of the factors; it does not depend on ``top``, so that recipes with other largest ranks share it.
    """

    method: ChosenMethod
    subject: Subject
    tokens: Tensor
    settings: Calibration
    seed: int
    top: Mapping[str, int]
    statistics: Mapping[StoredStatistic, Place]
    artefact: Artefact

    def taking(self, ranks: Ranks) -> FactorPlan:
        """The plan with the stacks that an allocation took in the place of their matrices."""
        subject = self.subject
        return replace(self, subject=replace(subject, structure=subject.structure.taken(ranks)))

    @property
    def pass_key(self) -> str:
        """The same for plans that one pass over the text can serve."""
        return digest([id(self.subject.model), fingerprint(self.tokens), self.settings])

    @property
    def stores(self) -> list[StatisticStore]:
        """The statistics on disk."""
        return [StatisticStore(place.path, kind) for kind, place in self.statistics.items()]


def top_ranks(recipe: LowRankRecipe, sites: Sequence[Site]) -> dict[str, int]:
    """Largest rank a recipe can give each matrix that it may factor, by site name."""
    storage, multiple, dense = recipe.form, recipe.search.rank_multiple, recipe.dense_types
    return {site.name: storage.top(site, multiple) for site in sites if site.type not in dense}


def subject_artefact(recipe: LowRankRecipe, loaded: Loaded, texts: Texts, session: Session) -> Artefact | None:
    """Where the subject is made, if the method does not factor the model's own matrices."""
    chosen = recipe.chosen
    if chosen.method.subject is None:
        return None
    return session.folder.artefact(
        "subject",
        model=loaded.identity,
        method=chosen.method.name,
        options=chosen.options,
        text=fingerprint(texts.calibration),
        keep=recipe.share,
        seed=recipe.seed,
    )


def make_subject(
    recipe: LowRankRecipe, loaded: Loaded, texts: Texts, session: Session, artefact: Artefact | None
) -> Subject:
    """What the recipe factors: the matrices of the model, in units of its storage, or what its method makes of them."""
    subject = Subject(loaded.working, recipe.units(loaded.structure))
    chosen = recipe.chosen
    if chosen.method.subject is None or artefact is None:
        return subject
    task = SubjectTask(
        subject, texts.calibration, recipe.share, chosen.options, recipe.seed, artefact.path, session.reporter
    )
    with session.clock.timed("prune"):
        return chosen.method.subject(task)


def plan_factors(
    recipe: LowRankRecipe,
    loaded: Loaded,
    texts: Texts,
    session: Session,
    subject: Subject,
    made: Artefact | None = None,
) -> FactorPlan:
    """What a recipe needs; ``made`` is where its subject was made, if it was."""
    chosen, settings, tokens = recipe.chosen, recipe.calibration, texts.calibration
    model = {"model": loaded.identity, "subject": made}
    statistics: dict[StoredStatistic, Place] = {}
    for kind in chosen.method.stored:
        if isinstance(kind, GradientStatistic):
            artefact = session.folder.artefact(
                kind.name,
                **model,
                text=fingerprint(tokens[: settings.gradient_sequences]),
                batch=settings.batch,
                seed=recipe.seed if kind.labels == "sampled" else None,
            )
            statistics[kind] = Place(artefact.path, artefact.key)
        else:
            assert made is not None  # what is found while a subject is made belongs to it
            statistics[kind] = Place(made.path / kind.name, made.key)
    inputs: dict[str, Any] = {"text": fingerprint(tokens), "batch": settings.batch, "groups": settings.groups}
    artefact = session.folder.artefact(
        "factors",
        **model,
        method=chosen.method.name,
        options=chosen.options,
        units=[site.name for site in subject.structure.units],
        statistics=[statistics[kind].key for kind in chosen.method.stored],
        inputs=inputs if chosen.method.inputs else None,
    )
    top = top_ranks(recipe, subject.structure.units)
    return FactorPlan(chosen, subject, tokens, settings, recipe.seed, top, statistics, artefact)


def factor_store(plan: FactorPlan, session: Session) -> FactorStore:
    """The place of a plan's factors: one with ranks as high as the plan's, perhaps higher ones, or a new one."""
    for artefact in (plan.artefact, session.folder.artefact("factors", of=plan.artefact, top=dict(plan.top))):
        known = _known_top(artefact)
        if known is None or all(rank <= known.get(name, 0) for name, rank in plan.top.items()):
            store = FactorStore(artefact.path)
            if known is None and team.is_first():
                write_text(artefact.path / TOP_FILE, json.dumps(dict(plan.top)))
            return store
    raise AssertionError("the second place is for these very ranks")


def _known_top(artefact: Artefact) -> dict[str, int] | None:
    """The ranks up to which the factors in a folder go; None if there are none yet.

    Raises:
        ResumeError: damaged; names the file.
    """
    file = artefact.path / TOP_FILE
    if not file.exists():
        return None
    try:
        return TypeAdapter(dict[str, int]).validate_json(file.read_bytes())
    except ValueError as error:
        why = str(error).splitlines()[0]
        raise ResumeError(f"{file}: damaged ({why}); delete the folder {artefact.path} and run again") from error


def carry_out(plans: Sequence[FactorPlan], session: Session) -> list[FactorStore]:
    """Statistics and factors of every plan, as far as they are not there yet; one pass over the text for all.

    The plans have one model and one text (:attr:`FactorPlan.pass_key`).

    Raises:
        NonFiniteError: naming the block and the input, or the matrix.
    """
    stores = [factor_store(plan, session) for plan in plans]
    layers = plans[0].subject.structure.num_layers
    waiting = [(plan, store) for plan, store in zip(plans, stores, strict=True) if not store.complete(layers)]
    for plan, _ in waiting:
        estimate_statistics(plan, session)
    if waiting:
        jobs = [FactorJob(plan.method, plan.subject, store, plan.top, plan.stores) for plan, store in waiting]
        plan = waiting[0][0]
        on_disk = in_files(plan.settings.cache, plan.subject.model, plan.tokens, 1)
        cache = session.folder.path / "hidden.cache" if on_disk else None
        factorize(plan.tokens, jobs, plan.settings, session.reporter, cache)
    return stores


def estimate_statistics(plan: FactorPlan, session: Session) -> None:
    """Everything a plan needs that is kept on disk, as far as it is not there yet."""
    for kind, place in plan.statistics.items():
        if isinstance(kind, GradientStatistic):
            estimate_gradients(
                StatisticStore(place.path, kind),
                kind,
                plan.subject.model,
                plan.subject.structure,
                plan.tokens[: plan.settings.gradient_sequences],
                plan.settings,
                session.reporter,
                plan.seed,
            )


def factor_bytes(plans: Sequence[FactorPlan], session: Session) -> int:
    """Bytes that statistics and factors of these plans will still take, at most."""
    size = 0
    counted: set[str] = set()
    for plan in plans:
        model, structure = plan.subject.model, plan.subject.structure
        itemsize = model.dtype.itemsize
        store = factor_store(plan, session)
        if store.complete(structure.num_layers):
            continue
        for site in structure.units:
            size += plan.top.get(site.name, 0) * (site.out_features + site.in_features) * itemsize
        for kind, place in plan.statistics.items():
            if place.key + kind.name not in counted:
                counted.add(place.key + kind.name)
                size += stored_bytes([kind], model, structure, plan.tokens, plan.settings)
        on_disk = in_files(plan.settings.cache, model, plan.tokens, 1)
        if on_disk and plan.pass_key not in counted:
            counted.add(plan.pass_key)
            size += plan.tokens.numel() * hidden_size(model) * itemsize
    return size
