"""A search from task to allocation: the hand allocation first, a few random ones, then what is proposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from bolaco.allocate.allocator import Allocation, AllocationTask, Trial, Trials
from bolaco.allocate.allocators.hand import hand_keeps
from bolaco.allocate.search.elastic import ElasticModel
from bolaco.allocate.search.ledger import LedgerTrial, best, open_ledger, search
from bolaco.allocate.search.options import BolacoOptions
from bolaco.allocate.search.proposal import Proposer
from bolaco.allocate.search.selection import select_sequences
from bolaco.allocate.space import SearchSpace, space_of
from bolaco.errors import ResumeError
from bolaco.evaluation.objective import Head, Scores, hidden_states, score
from bolaco.parallel import team
from bolaco.work.files import write_text


class Evaluator:
    """Losses of allocations on the validation sequences, which ranks share.

    Args:
        elastic: the model, whose ranks can be changed.
        space: the search space.
        trials: the text, and where the selection is kept.
        options: of the search.
        proposer: draws the random allocations of the selection.
    """

    def __init__(
        self, elastic: ElasticModel, space: SearchSpace, trials: Trials, options: BolacoOptions, proposer: Proposer
    ) -> None:
        self.elastic, self.space, self.trials, self.proposer = elastic, space, trials, proposer
        self.head = Head(elastic.model)
        chosen = team.first(self._selection)
        team.enough(len(chosen), "validation sequences")
        own = team.share(len(chosen))
        self.blocks = trials.candidates[torch.tensor(chosen)][own]
        self.elastic.set_ranks({})
        self.reference: Tensor | None = None
        if options.objective == "ppl+kl":
            with trials.reporter.stage("reference", len(self.blocks)) as tick:
                self.reference = hidden_states(elastic.model, self.blocks, trials.settings.batch, tick)

    def _selection(self) -> list[int]:
        """Which candidates are used; remembered in the folder."""
        file, count = self.trials.folder / "selection.json", len(self.trials.candidates)
        if not file.exists():
            write_text(file, str(self.select()))
        try:
            selected = TypeAdapter(list[int]).validate_json(file.read_bytes())
        except ValidationError:
            selected = []
        if not selected or any(i not in range(count) for i in selected):
            raise ResumeError(f"{file}: damaged (not the numbers of candidate sequences); delete it and run again")
        return selected

    def select(self) -> list[int]:
        """Chooses the sequences on which random allocations differ most."""
        settings, candidates = self.trials.settings, self.trials.candidates
        allocations: list[list[float]] = []
        if settings.allocations > 1 and settings.sequences < len(candidates):
            allocations = self.proposer.random(settings.allocations, stream=2)
        total = len(allocations) * len(candidates)
        with self.trials.reporter.stage("select validation text", total) as tick:

            def evaluate(keeps: Sequence[float]) -> Tensor:
                self.elastic.set_ranks(self.space.ranks(self.space.settle(keeps)))
                return score(self.elastic.model, self.head, candidates, settings.batch, tick=tick).perplexities

            chosen = select_sequences(evaluate, allocations, settings.sequences, len(candidates))
        return [int(i) for i in chosen]

    def scores(self, levels: Sequence[int]) -> Scores:
        """Losses of the allocation at these levels, on the sequences of all ranks, which meet here."""

        def own() -> Scores:
            self.elastic.set_ranks(self.space.ranks(levels))
            return score(self.elastic.model, self.head, self.blocks, self.trials.settings.batch, self.reference)

        scores = team.each(own)
        if team.count() == 1:
            return scores
        parts = team.gather([scores.nll.tolist(), scores.kl.tolist()])
        nll, kl = (torch.tensor([x for part in parts for x in part[i]], dtype=torch.float64) for i in (0, 1))
        return Scores(nll, kl, scores.predicted)


def allocate_in(task: AllocationTask, options: BolacoOptions, parts: int) -> Allocation:
    """Searches the space with a ratio for each type in each of ``parts`` runs of layers."""
    trials = task.trials
    assert trials is not None  # an allocator that searches gets them
    space = space_of(task, options, parts)
    proposer = Proposer(space, options.slack, options.surrogate, task.seed)
    trials.folder.mkdir(parents=True, exist_ok=True)
    with ElasticModel(trials.subject, trials.factors) as elastic:
        with trials.timed("validation"):
            evaluator = Evaluator(elastic, space, trials, options, proposer)
        with trials.timed("search"):
            done = _search(evaluator, task, options)
    ranks = space.ranks(best(done).levels)
    return Allocation(ranks, tuple(space.names), tuple(_record(space, trial) for trial in done))


def _search(evaluator: Evaluator, task: AllocationTask, options: BolacoOptions) -> list[LedgerTrial]:
    """All trials; the first rank proposes, and all of them evaluate."""
    kind = TypeAdapter(list[LedgerTrial])

    def work(evaluate: Callable[[Sequence[int]], Scores]) -> Any:
        return kind.dump_python(_searched(evaluator, task, options, evaluate), mode="json")

    return kind.validate_python(team.lead(work, evaluator.scores))


def _searched(
    evaluator: Evaluator,
    task: AllocationTask,
    options: BolacoOptions,
    evaluate: Callable[[Sequence[int]], Scores],
) -> list[LedgerTrial]:
    trials, space, proposer = evaluator.trials, evaluator.space, evaluator.proposer
    study = open_ledger(trials.folder / "trials.journal")
    first = [hand_keeps(space), *(proposer.random(options.initial, stream=1) if options.initial else [])]
    if task.warm is not None:
        first.insert(0, space.keeps_of(task.warm))
    before = len([t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"])
    if before:
        trials.reporter.say(f"search: {before} trials are in the ledger already")
    with trials.reporter.stage("search", max(options.trials - before, 0)) as tick:

        def on_trial(trial: LedgerTrial, leader: LedgerTrial) -> None:
            tick(1, f"objective {trial.objective:.2f}, best {leader.objective:.2f} (trial {leader.number})")

        weight = options.kl_weight if options.objective == "ppl+kl" else 0.0
        found = search(study, proposer, first, options.trials, evaluate, weight, on_trial)
    return found[: options.trials]


def _record(space: SearchSpace, trial: LedgerTrial) -> Trial:
    """A trial by the names of the dimensions; ranks in the order of its matrix types, which repeat over layers."""
    ranks = {}
    for dimension, level in zip(space.dimensions, trial.levels, strict=True):
        by_type = {s.type: r for s, r in zip(dimension.sites, dimension.levels[level].ranks, strict=True)}
        ranks[dimension.name] = list(by_type.values())
    keep = dict(zip(space.names, trial.keeps, strict=True))
    return Trial(keep, ranks, trial.objective, trial.perplexity, trial.kl, trial.seconds)
