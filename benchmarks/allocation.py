"""Does the search earn its time? Bayesian 5x1 allocation against the hand allocation of arXiv 2405.10616.

    python benchmarks/allocation.py --data DATA

Two comparisons: at keep 0.8, the hand allocation being filled up to the same budget; and at the exact number of
parameters of the hand allocation as published (not filled). Ranks are chosen on C4, the table is WikiText-2 test and
held-out C4.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bolaco.allocate.allocators.hand import hand_keeps
from bolaco.allocate.search.elastic import ElasticModel
from bolaco.allocate.search.ledger import best, open_ledger, search
from bolaco.allocate.search.proposal import Proposer
from bolaco.allocate.search.selection import select_sequences
from bolaco.allocate.space import SearchSpace, make_space
from bolaco.evaluation.objective import Head, Scores, hidden_states, score
from bolaco.models.load import load_tokenizer
from bolaco.progress import Reporter
from bolaco.storage.budget import Budget
from bolaco.storage.storage import STORAGES
from common import Ledger, arguments, gap, prepare, print_table, protocol_texts

# Search -> into how many runs of layers it cuts the depth.
PARTS = {"5x1": 1, "5x4": 4}


def run_search(prepared, space: SearchSpace, blocks, trials: int, count: int, journal: Path, surrogate: str, seed: int):
    """The search of `bolaco compress` on a prepared model; returns its trials."""
    model = prepared.model
    with ElasticModel(prepared.subject, prepared.store) as elastic:
        head = Head(model)
        proposer = Proposer(space, 0.02, surrogate, seed)
        reporter = Reporter()

        def evaluate_all(keeps):
            elastic.set_ranks(space.ranks(space.settle(keeps)))
            return score(model, head, blocks).perplexities

        chosen = select_sequences(evaluate_all, proposer.random(4, stream=2), count, len(blocks))
        selected = blocks[chosen]
        elastic.set_ranks({})
        reference = hidden_states(model, selected, 4)

        def evaluate(levels) -> Scores:
            elastic.set_ranks(space.ranks(levels))
            return score(model, head, selected, reference=reference)

        first = [hand_keeps(space), *proposer.random(5, stream=1)]
        with reporter.stage("search", trials) as tick:
            return search(
                open_ledger(journal),
                proposer,
                first,
                trials,
                evaluate,
                1e-3,
                lambda t, b: tick(1, f"{t.objective:.2f}, best {b.objective:.2f}"),
            )


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--calibration", type=int, default=128, help="sequences of 1024 tokens")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=8, help="validation sequences of 512, of twice as many")
    parser.add_argument("--layout", choices=PARTS, default="5x1")
    parser.add_argument("--surrogate", default="fitted")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    texts = protocol_texts(args.data, tokenizer, args.calibration, 1024, 2 * args.sequences, 512, args.windows)
    heldout = texts.heldout[: args.windows // 4]
    prepared = prepare(args, texts.calibration)
    ledger = Ledger(args.cache / f"allocation-{args.layout}-{args.surrogate}-{args.calibration}-{args.trials}.json")
    structure, two_factor, parts = prepared.structure, STORAGES.get("two-factor"), PARTS[args.layout]
    dense = {
        n: ledger.get(f"dense {n}", lambda b=b: prepared.perplexity({}, b))
        for n, b in (("wikitext", texts.wikitext), ("c4", heldout))
    }
    rows = [["dense", 1.0, dense["wikitext"], 0.0, dense["c4"], 0.0]]

    def report(name: str, ranks) -> None:
        ratio = Budget(structure.sites, 1.0, two_factor).ratio(ranks)
        values = [
            ledger.get(f"{name} {n}", lambda b=b: prepared.perplexity(ranks, b))
            for n, b in (("wikitext", texts.wikitext), ("c4", heldout))
        ]
        rows.append([name, ratio, values[0], gap(values[0], dense["wikitext"]), values[1], gap(values[1], dense["c4"])])

    wide = make_space(structure, Budget(structure.sites, 0.8, two_factor), parts)
    hand = wide.settle(hand_keeps(wide), fill=False)
    exact = wide.budget.cost(wide.ranks(hand)) / wide.budget.total
    tight = make_space(structure, Budget(structure.sites, exact, two_factor), parts)
    report("hand allocation, as published", wide.ranks(hand))
    report("hand allocation, filled to keep 0.8", wide.ranks(wide.settle(hand_keeps(wide))))
    for name, space in (("keep 0.8", wide), ("the hand allocation's parameters", tight)):
        journal = args.cache / f"trials-{args.layout}-{args.surrogate}-{args.calibration}-{space.budget.limit}.journal"
        torch.manual_seed(0)
        trials = run_search(prepared, space, texts.validation, args.trials, args.sequences, journal, args.surrogate, 0)
        winner = best(trials)
        print(
            f"{args.layout} at {name}: best trial {winner.number} of {len(trials)}, keep ratios "
            + ", ".join(f"{n} {k:.3f}" for n, k in zip(space.names, winner.keeps)),
            flush=True,
        )
        report(f"{args.layout} search, {args.trials} trials, at {name}", space.ranks(winner.levels))
    print_table(["allocation", "keep (linears)", "WikiText-2", "gap", "C4 held out", "gap"], rows)


if __name__ == "__main__":
    main()
