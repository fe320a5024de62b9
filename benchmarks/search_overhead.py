"""What a trial of the search costs beyond the forward pass it cannot avoid.

    python benchmarks/search_overhead.py --data DATA

For the same allocations and tokens, in one run, side by side: a whole trial (ask, propose, settle, slice, score,
tell); the bare forward pass and objective of the same compressed model made of plain two-Linear layers; and the same
trial written the naive way (copy the model, project every matrix, replace modules, score).
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from bolaco.allocate.allocators.hand import hand_keeps
from bolaco.allocate.search.elastic import ElasticModel
from bolaco.allocate.search.ledger import open_ledger, search
from bolaco.allocate.search.proposal import Proposer
from bolaco.allocate.space import make_space
from bolaco.evaluation.objective import Head, hidden_states, score
from bolaco.layers import LowRankLinear
from bolaco.models.load import load_tokenizer
from bolaco.storage.budget import Budget
from bolaco.storage.storage import STORAGES
from common import arguments, median, prepare, print_table, protocol_texts


def plain_model(prepared, ranks):
    """A copy of the model with ordinary two-Linear layers, as it is loaded from a checkpoint."""
    model = copy.deepcopy(prepared.model)
    for layer in range(prepared.structure.num_layers):
        factors = prepared.store.load(layer)
        for site in prepared.structure.of_layer(layer):
            rank = ranks[site.name]
            if rank is None:
                continue
            item = factors[site.name]
            new = LowRankLinear(site.in_features, site.out_features, rank, bias=True)
            new.reduce.weight.data = item.reduce[:rank].clone()
            new.expand.weight.data = item.expand_t[:rank].T.contiguous()
            new.expand.bias.data = item.bias(rank, None).clone()
            replace(model, site.module, new)
    return model


def naive_model(prepared, ranks, bases):
    """What a trial does without factors computed once: copy, multiply, replace."""
    model = copy.deepcopy(prepared.model)
    for site in prepared.structure.sites:
        rank = ranks[site.name]
        if rank is None:
            continue
        basis_t, offset = bases[site.name]
        basis = basis_t[:rank].T.contiguous()
        weight = prepared.subject.weight(site)
        first = nn.Linear(site.in_features, rank, bias=False)
        second = nn.Linear(rank, site.out_features, bias=True)
        first.weight.data = basis.T @ weight
        second.weight.data = basis
        second.bias.data = offset - basis @ (basis.T @ offset)
        replace(model, site.module, nn.Sequential(first, second))
    return model


def replace(model, name, new):
    parent, _, attribute = name.rpartition(".")
    setattr(model.base_model.get_submodule(parent), attribute, new)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=6, help="trials timed, after two that are not")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    texts = protocol_texts(args.data, tokenizer, 16, 512, args.sequences, args.length, 1)
    prepared = prepare(args, texts.calibration)
    model, structure, store = prepared.model, prepared.structure, prepared.store
    space = make_space(structure, Budget(structure.sites, 0.8, STORAGES.get("two-factor")))
    proposer = Proposer(space, 0.02, "fitted", 0)
    first = [hand_keeps(space), *proposer.random(1, stream=1)]
    blocks = texts.validation
    head = Head(model)
    reference = hidden_states(model, blocks, 4)
    bases = {n: (f.expand_t, f.offset) for i in range(structure.num_layers) for n, f in store.load(i).items()}

    whole, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        study = open_ledger(Path(folder) / "journal")
        for number in range(args.trials + 2):
            with ElasticModel(prepared.subject, store) as elastic:

                def evaluate(levels, elastic=elastic):
                    elastic.set_ranks(space.ranks(levels))
                    return score(model, head, blocks, reference=reference)

                start = time.perf_counter()
                trials = search(study, proposer, first, number + 1, evaluate, 1e-3)
                whole.append(time.perf_counter() - start)
            ranks = space.ranks(trials[-1].levels)
            plain = plain_model(prepared, ranks)
            plain_head = Head(plain)
            start = time.perf_counter()
            bare = score(plain, plain_head, blocks, reference=reference)
            bare_seconds = time.perf_counter() - start
            del plain
            start = time.perf_counter()
            naive = naive_model(prepared, ranks, bases)
            result = score(naive, Head(naive), blocks, reference=reference)
            naive_seconds = time.perf_counter() - start
            del naive
            drift = max(abs(s.objective(1e-3) / trials[-1].objective - 1) for s in (bare, result))
            rows.append(
                [
                    number,
                    whole[-1],
                    bare_seconds,
                    naive_seconds,
                    whole[-1] / bare_seconds,
                    naive_seconds / bare_seconds,
                    drift,
                ]
            )
    print(f"{args.sequences} x {args.length} tokens per trial, {torch.get_num_threads()} threads; seconds")
    print_table(
        ["trial", "elastic trial", "bare", "naive trial", "elastic / bare", "naive / bare", "objective differs by"],
        rows,
    )
    timed = rows[2:]
    print(
        f"median over trials 2-{len(rows) - 1}: elastic / bare {median([r[4] for r in timed]):.3f}, "
        f"naive / bare {median([r[5] for r in timed]):.3f}"
    )


if __name__ == "__main__":
    main()
