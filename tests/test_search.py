"""Proposals, validation sequences and the ledger of the search."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from botorch.utils.sampling import get_polytope_samples

from bolaco.allocate.allocators.hand import hand_keeps
from bolaco.allocate.search import proposal as proposal_module
from bolaco.allocate.search.ledger import LedgerTrial as Trial
from bolaco.allocate.search.ledger import best, open_ledger, search
from bolaco.allocate.search.proposal import Proposer
from bolaco.allocate.search.selection import select_sequences
from bolaco.allocate.space import SearchSpace, make_space
from bolaco.errors import ResumeError
from bolaco.evaluation.objective import Scores
from bolaco.storage.budget import Budget
from tests.models import slow
from tests.test_allocate import LLAMA2, TWO_FACTOR, decoder, replace_limit, small_space

# --- proposals

both = pytest.mark.parametrize("surrogate", ["fitted", "paper"])


def hurry(patch: pytest.MonkeyPatch) -> None:
    for name, value in {"_RAW_SAMPLES": 24, "_RESTARTS": 2, "_STEPS": 8}.items():
        patch.setattr(proposal_module, name, value)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer samples and starts of the optimiser: the same code, a fraction of the time."""
    hurry(monkeypatch)


def damage(keeps: Sequence[float]) -> float:
    """A smooth objective: every dimension has its own price, and they add up in the exponent as in a perplexity."""
    return 8 * math.exp(sum((0.4 + 0.5 * (i % 5)) * (1 - keep) ** 2 for i, keep in enumerate(keeps)))


def history(space: SearchSpace, points: Sequence[Sequence[float]]) -> tuple[list[list[float]], list[float]]:
    keeps = [space.keeps(space.settle(p)) for p in points]
    return keeps, [damage(k) for k in keeps]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("slack", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("keep", [0.35, 0.8, 1.0])
def test_random_points_satisfy_the_box_and_the_budget(parts: int, slack: float, keep: float) -> None:
    space = small_space(keep, parts=parts)
    points = torch.tensor(Proposer(space, slack, "fitted", 0).random(40), dtype=torch.float64)
    assert (points >= min(space.min_keep, min(d.levels[0].keep for d in space.dimensions)) - 1e-9).all()
    assert (points <= 1 + 1e-9).all()
    sizes = torch.tensor([d.size for d in space.dimensions], dtype=torch.float64)
    spent = (points @ sizes + space.fixed) / space.budget.total
    limit = space.budget.limit / space.budget.total
    assert (spent <= limit + 1e-9).all()
    assert (spent >= limit - max(slack, 1e-4) - 1e-9).all()
    assert spent.max() - spent.min() > 0.8 * min(slack, limit - float(spent.min()))
    # Spread over the box from the first points on, however close the two planes are.
    if keep == 0.8:
        assert points[:6].std(dim=0).mean() > 0.08
        assert (points.std(dim=0) > 0.08).all()
        assert (points.amax(dim=0) - points.amin(dim=0) > 0.3).all()


@pytest.mark.parametrize(("parts", "slack"), [(4, 0.02), slow(1, 0.1), slow(1, 0.02), slow(4, 0.1)])
def test_random_points_are_close_to_uniform_ones(parts: int, slack: float) -> None:
    # The same mean and spread as BoTorch's Markov chain after far more steps than a search could wait for.
    space = make_space(LLAMA2, Budget(LLAMA2.sites, 0.8, TWO_FACTOR), parts)
    proposer = Proposer(space, slack, "fitted", 0)
    points = torch.tensor(proposer.random(2000), dtype=torch.float64)
    chain = get_polytope_samples(
        200, proposer.bounds, inequality_constraints=proposer.constraints, seed=1, n_burnin=4000, n_thinning=50
    )
    assert (points.mean(dim=0) - chain.mean(dim=0)).abs().max() < 0.15
    assert (points.std(dim=0) / chain.std(dim=0)).mean() == pytest.approx(1, abs=0.15)


def test_random_points_follow_the_seed_and_the_stream() -> None:
    space = small_space()
    first = Proposer(space, 0.02, "fitted", 0)
    assert first.random(3) == Proposer(space, 0.02, "paper", 0).random(3)
    assert first.random(3) != first.random(3, stream=1)
    assert first.random(3) != Proposer(space, 0.02, "fitted", 1).random(3)
    assert first.random(3) != Proposer(space, 0.02, "fitted", -1).random(3)


@both
def test_suggestions_depend_on_seed_and_history_only(surrogate: str, quick: None) -> None:
    space = small_space()
    keeps, values = history(space, Proposer(space, 0.02, surrogate, 7).random(5))

    def suggest(seed: int = 0, value: float = values[-1]) -> list[float]:
        return Proposer(space, 0.02, surrogate, seed).suggest(keeps, [*values[:-1], value])

    expected = suggest()
    state = torch.get_rng_state()
    assert suggest() == expected
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    torch.rand(5)
    assert suggest() == expected
    assert suggest(value=min(values) / 2) != expected
    assert suggest(seed=1) != expected
    used = Proposer(space, 0.02, surrogate, 0)
    used.suggest(keeps[:3], values[:3])
    assert used.suggest(keeps, values) == expected


@pytest.mark.parametrize(("surrogate", "parts"), [("fitted", 1), ("fitted", 4), ("paper", 4), slow("paper", 1)])
def test_suggestions_are_new_and_within_the_budget(surrogate: str, parts: int, quick: None) -> None:
    space = small_space(parts=parts)
    proposer = Proposer(space, 0.02, surrogate, 3)
    keeps, values = history(space, [hand_keeps(space)])
    tried = {space.settle(k) for k in keeps}
    for _ in range(6 if parts == 1 else 3):
        levels = space.settle(proposer.suggest(keeps, values))
        assert levels not in tried
        tried.add(levels)
        assert space.budget.cost(space.ranks(levels)) <= space.budget.limit
        keeps.append(space.keeps(levels))
        values.append(damage(keeps[-1]))


@both
def test_a_space_with_nothing_left_to_try_still_answers(surrogate: str, quick: None) -> None:
    structure = decoder(1, 16, 16, 16, gate=False)
    space = make_space(structure, Budget(structure.sites, 0.9, TWO_FACTOR), dense_types=("v", "q", "k"), multiple=4)
    proposer = Proposer(space, 0.02, surrogate, 0)
    every = {space.settle(p) for p in proposer.random(400)}
    keeps, values = history(space, [space.keeps(levels) for levels in every])
    assert space.settle(proposer.suggest(keeps, values)) in every


def test_the_last_untried_allocations_are_found(quick: None) -> None:
    structure = decoder(1, 16, 16, 16, gate=False)
    space = make_space(structure, Budget(structure.sites, 0.9, TWO_FACTOR), dense_types=("v", "q", "k"), multiple=4)
    proposer = Proposer(space, 0.02, "fitted", 0)
    every = {space.settle(p) for p in proposer.random(400)}
    for left in sorted(every):
        keeps, values = history(space, [space.keeps(levels) for levels in sorted(every - {left})])
        assert space.settle(proposer.suggest(keeps, values)) == left


@both
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([1e300, math.inf], id="1e300 and inf"),
        pytest.param([math.inf] * 4, id="all inf"),
        pytest.param([1e300] * 4, id="all 1e300"),
        pytest.param([math.nan], id="nan"),
        slow([math.inf], id="inf"),
        slow([1e30], id="1e30"),
    ],
)
def test_useless_allocations_do_not_break_the_surrogate(surrogate: str, bad: list[float], quick: None) -> None:
    space = small_space()
    proposer = Proposer(space, 0.02, surrogate, 0)
    keeps, values = history(space, proposer.random(4))
    suggestion = proposer.suggest(keeps, [*bad, *values[len(bad) :]])
    assert all(math.isfinite(value) for value in suggestion)
    levels = space.settle(suggestion)
    assert space.budget.cost(space.ranks(levels)) <= space.budget.limit
    if len(bad) < 4:  # how bad a useless one is does not matter
        assert suggestion == proposer.suggest(keeps, [*(1e9 for _ in bad), *values[len(bad) :]])


@both
def test_the_unit_of_the_objective_does_not_matter(surrogate: str, quick: None) -> None:
    space = small_space()
    proposer = Proposer(space, 0.02, surrogate, 0)
    keeps, values = history(space, proposer.random(6))
    expected = proposer.suggest(keeps, values)
    assert proposer.suggest(keeps, [1024 * v for v in values]) == pytest.approx(expected, abs=1e-3)


@both
def test_a_budget_that_leaves_no_choice_still_proposes(surrogate: str, quick: None) -> None:
    wide = small_space(0.9)
    lowest = wide.fixed + sum(d.levels[0].cost for d in wide.dimensions)
    for extra in (0, 1, 5000):
        space = replace_limit(wide, lowest + extra)
        proposer = Proposer(space, 0.02, surrogate, 0)
        keeps, values = history(space, proposer.random(2))
        levels = space.settle(proposer.suggest(keeps, values))
        assert space.budget.cost(space.ranks(levels)) <= lowest + extra


def test_everything_dense_is_a_valid_search(quick: None) -> None:
    space = small_space(1.0)
    proposer = Proposer(space, 0.02, "fitted", 0)
    keeps, values = history(space, proposer.random(2))
    assert space.budget.ratio(space.ranks(space.settle(proposer.suggest(keeps, values)))) == 1


@pytest.mark.parametrize("trials", [15, slow(25)])
def test_trials_beat_random_points(trials: int, quick: None) -> None:
    space = make_space(LLAMA2, Budget(LLAMA2.sites, 0.8, TWO_FACTOR))
    proposer = Proposer(space, 0.02, "fitted", 0)
    _, guesses = history(space, proposer.random(trials, stream=50))
    keeps, values = history(space, [hand_keeps(space), *proposer.random(4, stream=1)])
    while len(values) < trials:
        keeps.append(space.keeps(space.settle(proposer.suggest(keeps, values))))
        values.append(damage(keeps[-1]))
    assert min(values) < min(guesses)
    # Not by luck: a hundred times as many random points hardly do better.
    _, many = history(space, proposer.random(100 * trials, stream=51))
    assert min(values) < 1.005 * min(many)


# --- validation sequences


def test_the_sequences_that_vary_most_are_selected() -> None:
    table = torch.tensor([[1.0, 5.0, 3.0, 9.0], [2.0, 5.0, 9.0, 9.5], [1.0, 5.1, 1.0, 8.0]], dtype=torch.float64)
    seen: list[Sequence[float]] = []

    def evaluate(keeps: Sequence[float]) -> torch.Tensor:
        seen.append(keeps)
        return table[len(seen) - 1]

    chosen = select_sequences(evaluate, [[0.1], [0.2], [0.3]], 2, 4)
    assert chosen.tolist() == [2, 3]
    assert seen == [[0.1], [0.2], [0.3]]
    unused = select_sequences(evaluate, [[0.1]], 2, 4), select_sequences(evaluate, [[0.1], [0.2]], 9, 4)
    assert [u.tolist() for u in unused] == [[0, 1], [0, 1, 2, 3]]
    assert len(seen) == 3


def test_infinite_perplexities_do_not_break_the_selection() -> None:
    table = torch.tensor([[1.0, 2.0, torch.inf, 4.0], [1.0, 3.0, 5.0, torch.inf]], dtype=torch.float64)
    rows = iter(table)
    assert select_sequences(lambda _: next(rows), [[0.1], [0.2]], 3, 4).tolist() == [1, 2, 3]


# --- the ledger

TRIALS = 8


class Bench:
    """A search over a small space with a cheap objective, that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "trials.journal"
        self.space = small_space()
        self.proposer = Proposer(self.space, 0.02, "fitted", 5)
        self.first = [hand_keeps(self.space), *self.proposer.random(1, stream=1)]
        self.evaluated = 0

    def evaluate(self, levels: tuple[int, ...]) -> Scores:
        self.evaluated += 1
        loss = math.log(damage(self.space.keeps(levels)))
        return Scores(torch.tensor([loss * 7], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64), 7)

    def run(self, trials: int = TRIALS, evaluate: Callable[[tuple[int, ...]], Scores] | None = None) -> list[Trial]:
        study = open_ledger(self.path)
        return search(study, self.proposer, self.first, trials, evaluate or self.evaluate, 1e-3)

    def run_until_killed(self, evaluations: int) -> None:
        def evaluate(levels: tuple[int, ...]) -> Scores:
            if self.evaluated >= evaluations:
                raise KeyboardInterrupt
            return self.evaluate(levels)

        with pytest.raises(KeyboardInterrupt):
            self.run(evaluate=evaluate)


def without_seconds(trials: Sequence[Trial]) -> list[Trial]:
    return [replace(trial, seconds=0.0) for trial in trials]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trial], bytes]:
    """A whole run's trials, and its journal."""
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        bench = Bench(tmp_path_factory.mktemp("ledger"))
        return bench.run(), bench.path.read_bytes()


def test_a_search_records_what_was_realised(uninterrupted: tuple[list[Trial], bytes], tmp_path: Path) -> None:
    trials, _ = uninterrupted
    space = Bench(tmp_path).space
    assert [t.number for t in trials] == list(range(TRIALS))
    assert trials[0].levels == space.settle(hand_keeps(space))
    for trial in trials:
        assert list(trial.keeps) == space.keeps(trial.levels)
        assert trial.perplexity == pytest.approx(damage(trial.keeps))
        assert trial.kl == 3.0
        assert trial.objective == pytest.approx(trial.perplexity + 3e-3)
    assert len({t.levels for t in trials}) == TRIALS
    assert best(trials).objective == min(t.objective for t in trials)


def test_best_takes_the_earlier_of_equals() -> None:
    trials = [Trial(i, (i,), (0.5,), value, value, 0, 0) for i, value in enumerate([3.0, 1.0, 1.0, math.inf])]
    assert best(trials).number == 1
    assert best(trials[::-1]).number == 1


@pytest.mark.parametrize("points", [(0, 2, 5, 7), slow((1, 3, 4, 6))])
def test_a_killed_search_ends_as_if_it_had_not_been(
    points: tuple[int, ...], uninterrupted: tuple[list[Trial], bytes], tmp_path: Path, quick: None
) -> None:
    bench = Bench(tmp_path)
    for point in points:
        bench.run_until_killed(point)
    assert without_seconds(bench.run()) == without_seconds(uninterrupted[0])
    assert bench.evaluated == TRIALS


def journal_after(journal: bytes, finished: int) -> bytes:
    """The journal up to the line that finishes that many trials."""
    lines = journal.splitlines(keepends=True)
    ends = [i for i, line in enumerate(lines) if json.loads(line).get("state") == 1]
    return b"".join(lines[: ends[finished - 1] + 1])


@pytest.mark.parametrize(
    ("finished", "leftover"),
    [
        (6, "half a line"),
        (4, "all of it"),
        slow(6, "asked"),
        slow(6, "half the result"),
        slow(6, "lock"),
        slow(1, "all of it"),
    ],
)
def test_what_a_killed_process_leaves_is_cleaned_up(
    finished: int,
    leftover: str,
    uninterrupted: tuple[list[Trial], bytes],
    tmp_path: Path,
    quick: None,
) -> None:
    trials, journal = uninterrupted
    bench = Bench(tmp_path)
    kept = journal_after(journal, finished)
    rest = journal[len(kept) :].splitlines(keepends=True)
    bench.path.write_bytes(kept)
    if leftover in ("asked", "all of it"):
        open_ledger(bench.path).ask()
    if leftover in ("half a line", "all of it"):
        with bench.path.open("ab") as file:
            file.write(rest[0][: len(rest[0]) // 2])
    if leftover == "half the result":
        end = next(i for i, line in enumerate(rest) if json.loads(line).get("state") == 1)
        bench.path.write_bytes(kept + b"".join(rest[:end]) + rest[end][:20])
    if leftover in ("lock", "all of it"):
        bench.path.with_name(bench.path.name + ".lock").symlink_to(bench.path)
    start = time.monotonic()
    study = open_ledger(bench.path)
    assert time.monotonic() - start < 20  # Optuna waits half a minute for the owner of a lock
    assert {t.state.name for t in study.get_trials()} <= {"COMPLETE", "FAIL"}
    assert without_seconds(bench.run()) == without_seconds(trials)
    assert bench.evaluated == TRIALS - finished
    assert all(json.loads(line) for line in bench.path.read_text().splitlines())


def test_a_finished_search_is_not_repeated_and_can_be_extended(
    uninterrupted: tuple[list[Trial], bytes], tmp_path: Path, quick: None
) -> None:
    trials, journal = uninterrupted
    bench = Bench(tmp_path)
    bench.path.write_bytes(journal)
    assert bench.run() == trials  # seconds too: they come from the ledger
    assert bench.evaluated == 0
    longer = bench.run(TRIALS + 1)
    assert longer[:TRIALS] == trials
    assert bench.evaluated == 1


def test_useless_trials_survive_the_ledger(tmp_path: Path, quick: None) -> None:
    bench = Bench(tmp_path)
    broken = Scores(torch.tensor([1e9], dtype=torch.float64), torch.tensor([1e12], dtype=torch.float64), 1)

    def evaluate(levels: tuple[int, ...]) -> Scores:
        return broken if bench.evaluated == 0 and bench.evaluate(levels) else bench.evaluate(levels)

    trials = bench.run(4, evaluate)
    assert trials[0].objective == trials[0].perplexity == math.inf
    assert all(math.isfinite(t.objective) for t in trials[1:])
    assert best(trials).number > 0
    assert Bench(tmp_path).run(4) == trials


@pytest.mark.parametrize(
    "harm",
    [
        "broken line",
        "broken last line",
        "broken new line",
        "zeros",
        "not utf-8",
        "no object",
        "no result",
        "wrong type",
        "other file",
    ],
)
def test_a_damaged_journal_is_refused_by_name(
    harm: str, uninterrupted: tuple[list[Trial], bytes], tmp_path: Path
) -> None:
    _, journal = uninterrupted
    lines = journal.splitlines(keepends=True)
    attribute = next(i for i, line in enumerate(lines) if b'"objective"' in line)
    match harm:
        case "broken line":
            lines[7] = lines[7][:10] + b"\n"
        case "broken last line":
            lines[-1] = lines[-1][:10] + b"\n"
        case "broken new line":
            lines.append(b'{"op_code":4,"worker\n')
        case "zeros":
            lines[5] = b"\0" * 40 + b"\n"
        case "not utf-8":
            lines[3] = b"\xff\xfe\xfa\n"
        case "no object":
            lines[4] = b"17\n"
        case "no result":
            del lines[attribute]
        case "wrong type":
            lines[attribute] = lines[attribute].replace(b'"user_attr":{', b'"user_attr":[[{').replace(b"}}", b"}]]}")
        case "other file":
            lines = [b"# Notes\n", b"\n", b"nothing like a journal\n"]
    path = tmp_path / "trials.journal"
    path.write_bytes(b"".join(lines))
    with pytest.raises(ResumeError, match=r"trials\.journal.*damaged"):
        open_ledger(path)


@pytest.mark.parametrize("seed", [-1, 2**40])
def test_any_whole_number_is_a_seed(seed: int, tmp_path: Path, quick: None) -> None:
    bench = Bench(tmp_path)
    bench.proposer = Proposer(bench.space, 0.02, "fitted", seed)
    assert len(bench.run(3)) == 3


def test_an_empty_journal_is_a_new_one(tmp_path: Path, quick: None) -> None:
    bench = Bench(tmp_path)
    bench.path.write_bytes(b'{"op_code":0,"stu')  # killed while writing the very first line
    assert len(bench.run(2)) == 2


def test_on_trial_hears_of_every_new_trial_and_the_best(tmp_path: Path, quick: None) -> None:
    bench = Bench(tmp_path)
    heard: list[tuple[Trial, Trial]] = []
    trials = search(
        open_ledger(bench.path), bench.proposer, bench.first, 3, bench.evaluate, 0.0, lambda *a: heard.append(a)
    )
    assert [trial for trial, _ in heard] == trials
    assert [leader for _, leader in heard] == [best(trials[: i + 1]) for i in range(3)]
    assert trials[0].objective == trials[0].perplexity  # the KL term is off


@pytest.mark.parametrize("point", [[0.0, 0.5, 1.5, 0.7, 0.6], [-1.0] * 5, [2.0] * 5])
def test_first_points_outside_the_box_are_clipped_into_it(tmp_path: Path, point: list[float]) -> None:
    bench = Bench(tmp_path)
    bench.first = [point]
    (trial,) = bench.run(1)
    low = bench.proposer.bounds[0].tolist()
    clipped = [min(max(value, a), 1.0) for value, a in zip(bench.first[0], low, strict=True)]
    assert trial.levels == bench.space.settle(clipped)
