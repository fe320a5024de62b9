"""The search: proposals, their evaluation, and a ledger that survives being killed.

Optuna keeps the ledger (a journal file), a :class:`~bolaco.allocate.search.proposal.Proposer` proposes. The Gaussian
process learns from the ratios a trial came to after rounding and repair, not from those proposed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from bolaco.allocate.search.proposal import Proposer
from bolaco.allocate.space import SearchSpace
from bolaco.errors import ResumeError
from bolaco.evaluation.objective import Scores

_STUDY = "bolaco"


@dataclass(frozen=True)
class LedgerTrial:
    """One evaluated allocation, as levels of the search space."""

    number: int
    levels: tuple[int, ...]
    keeps: tuple[float, ...]
    objective: float
    perplexity: float
    kl: float
    seconds: float


class _Sampler(BaseSampler):
    """Optuna's view of :class:`Proposer`: fixed first points, then suggestions from the finished trials."""

    def __init__(self, proposer: Proposer, first: Sequence[Sequence[float]]) -> None:
        self.proposer, self.first = proposer, first
        self._independent = RandomSampler(seed=proposer.seed % 2**32)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        bounds = self.proposer.bounds
        return {name: FloatDistribution(float(bounds[0, i]), 1.0) for i, name in enumerate(self.proposer.space.names)}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        # Finished trials, not trial numbers: a killed trial leaves a number behind but must not change what follows.
        done = _finished(study)
        if len(done) < len(self.first):
            keeps: Sequence[float] = self.first[len(done)]
        else:
            keeps = self.proposer.suggest([list(t.keeps) for t in done], [t.objective for t in done])
        low = self.proposer.bounds[0].tolist()
        return {
            name: min(max(value, a), 1.0) for name, value, a in zip(self.proposer.space.names, keeps, low, strict=True)
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)


def _finished(study: Study) -> list[LedgerTrial]:
    return [
        LedgerTrial(
            number=i,
            levels=tuple(t.user_attrs["levels"]),
            keeps=tuple(t.user_attrs["keeps"]),
            objective=t.user_attrs["objective"],
            perplexity=t.user_attrs["perplexity"],
            kl=t.user_attrs["kl"],
            seconds=t.user_attrs["seconds"],
        )
        for i, t in enumerate(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    ]


def open_ledger(path: Path) -> Study:
    """Opens or starts the journal at ``path``; trials that a killed run left unfinished are closed as failed.

    The caller holds the work folder's lock, so nobody else is writing.

    Raises:
        ResumeError: the journal is damaged.
    """
    # What a killed writer can leave: half a last line, and the journal's own lock.
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(storage=storage, study_name=_STUDY, direction="minimize", load_if_exists=True)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
        _finished(study)
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise ResumeError(f"{path}: the trial journal is damaged ({error}); delete it to search anew") from error
    return study


def search(
    study: Study,
    proposer: Proposer,
    first: Sequence[Sequence[float]],
    trials: int,
    evaluate: Callable[[tuple[int, ...]], Scores],
    kl_weight: float,
    on_trial: Callable[[LedgerTrial, LedgerTrial], Any] | None = None,
) -> list[LedgerTrial]:
    """Runs until ``trials`` are finished, earlier runs' included; returns all of them in order.

    Args:
        study: from :func:`open_ledger`.
        proposer: proposes after the first points.
        first: keep ratios tried first, in order (the hand allocation, random ones).
        trials: number of trials in all.
        evaluate: losses of the allocation at these levels.
        kl_weight: weight of the KL term in the objective.
        on_trial: called with each new trial and the best so far.
    """
    study.sampler = _Sampler(proposer, first)
    space: SearchSpace = proposer.space
    done = _finished(study)
    while len(done) < trials:
        start = time.perf_counter()
        trial = study.ask()
        proposed = [trial.suggest_float(n, float(proposer.bounds[0, i]), 1.0) for i, n in enumerate(space.names)]
        levels = space.settle(proposed)
        scores = evaluate(levels)
        objective = scores.objective(kl_weight)
        record = {
            "levels": list(levels),
            "keeps": space.keeps(levels),
            "objective": objective,
            "perplexity": scores.perplexity,
            "kl": scores.mean_kl,
            "seconds": time.perf_counter() - start,
        }
        for name, value in record.items():
            trial.set_user_attr(name, value)
        # An allocation that breaks the model altogether is a finished trial with a very bad value.
        study.tell(trial, objective if math.isfinite(objective) else 1e300)
        done = _finished(study)
        if on_trial:
            on_trial(done[-1], best(done))
    return done


def best(trials: Sequence[LedgerTrial]) -> LedgerTrial:
    """The trial with the lowest objective; the earlier one of equals."""
    return min(trials, key=lambda trial: (trial.objective, trial.number))
