"""What each gain brings, alone and in the whole, beside the published recipes, over keep ratios.

    python benchmarks/frontier.py --data DATA --keep 0.8
    python benchmarks/frontier.py --data DATA --keep 0.9 0.7 0.6 --only dense base all

Gains over feature PCA at one ratio for all matrices ("base"): the two-sided metric, ranks in closed form, pivoted
storage, error-aware fitting, block refinement and training on next tokens. Every variant sees the same calibration
text and keeps the same number of parameters up to the rank step. Results are remembered in --cache, so a run that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace

import torch

from allocation import PARTS, run_search
from bolaco.allocate.allocators.hand import hand_keeps
from bolaco.allocate.allocators.spectral import spectral_ranks
from bolaco.allocate.search.ledger import best
from bolaco.allocate.space import make_space
from bolaco.data.settings import Calibration
from bolaco.evaluation.objective import Head, score
from bolaco.factorize import METHODS
from bolaco.models.load import load_tokenizer
from bolaco.progress import Reporter
from bolaco.refine.run import Refiner, stored_block
from bolaco.refine.settings import Refinement
from bolaco.storage.block import compressed_block
from bolaco.storage.budget import Budget, Ranks
from bolaco.storage.storage import STORAGES
from bolaco.work.blockstore import BlockStore
from common import (
    Ledger,
    PeakMemory,
    Prepared,
    arguments,
    chosen,
    gap,
    prepare,
    print_table,
    protocol_texts,
    with_blocks,
)


@dataclass(frozen=True)
class Variant:
    """One way to compress."""

    method: str = "afm"
    ranks: str = "uniform"
    storage: str = "two-factor"
    drift: float | None = None
    steps: bool = False
    end: bool = False


BASE = Variant()
ALL = Variant("kfac", "spectral", "pivoted", steps=True, end=True)
VARIANTS = {
    "base: feature PCA, uniform": BASE,
    "base + two-sided metric": replace(BASE, method="kfac"),
    "base + closed-form ranks": replace(BASE, ranks="spectral"),
    "base + pivoted storage": replace(BASE, storage="pivoted"),
    "base + error-aware fit": replace(BASE, drift=1.0),
    "base + block refinement": replace(BASE, steps=True),
    "all (the default)": ALL,
    "all - two-sided metric": replace(ALL, method="afm"),
    "all - closed-form ranks": replace(ALL, ranks="uniform"),
    "all - pivoted storage": replace(ALL, storage="two-factor"),
    "all - training on next tokens": replace(ALL, end=False),
    "all - block refinement": replace(ALL, steps=False),
    "all - both": replace(ALL, steps=False, end=False),
    "all + error-aware fit": replace(ALL, drift=1.0),
    "all + fit to a quarter of the drift": replace(ALL, drift=0.25),
    "SVD-LLM": Variant("svd-llm"),
    "K-FAC SVD, closed-form ranks": Variant("kfac", "spectral"),
    "AA-SVD": Variant("svd-llm", drift=1.0, steps=True),
    "MPIFA": Variant("svd-llm", storage="pivoted", drift=0.25),
    "Bolaco, hand allocation": Variant(ranks="hand"),
    "Bolaco, 5x1 search": Variant(ranks="5x1"),
    "Bolaco, 5x4 search": Variant(ranks="5x4"),
}


class Bench:
    """The factors of each method, computed once, and what is measured with them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        tokenizer = load_tokenizer(args.model)
        self.texts = protocol_texts(args.data, tokenizer, args.calibration, args.length, 16, 512, args.windows)
        self.heldout = self.texts.heldout[: args.windows // 2]
        self.factors: dict[str, Prepared] = {}

    def prepared(self, method: str) -> Prepared:
        """Factors of a method, up to the ranks of pivoted storage, which serve both."""
        if method not in self.factors:
            gradients = self.args.gradients if METHODS.get(method).gradients else 0
            self.factors[method] = prepare(self.args, self.texts.calibration, method, 32, gradients, "pivoted")
        return self.factors[method]

    def ranks(self, variant: Variant, keep: float) -> tuple[Ranks, float]:
        """The allocation, and the keep ratio it comes to."""
        prepared = self.prepared(variant.method)
        structure = prepared.structure
        budget = Budget(structure.sites, keep, STORAGES.get(variant.storage))
        if variant.ranks == "spectral":
            relative = not METHODS.get(variant.method).comparable
            spectra = prepared.store.spectra(structure.num_layers)
            found = spectral_ranks(structure.sites, spectra, budget, 8, relative)
        elif variant.ranks in PARTS:
            space = make_space(structure, budget, PARTS[variant.ranks])
            journal = self.args.cache / f"trials-{variant.ranks}-{keep}-{self.args.calibration}.journal"
            torch.manual_seed(0)
            trials = run_search(prepared, space, self.texts.validation, self.args.trials, 8, journal, "fitted", 0)
            found = space.ranks(best(trials).levels)
        else:
            dense_types = ("v",) if variant.ranks == "hand" else ()
            space = make_space(structure, budget, dense_types=dense_types)
            keeps = hand_keeps(space) if variant.ranks == "hand" else [keep] * len(space.names)
            found = space.ranks(space.settle(keeps))
        return found, budget.ratio(found)

    def run(self, name: str, variant: Variant, keep: float) -> dict[str, float]:
        """Compresses, measures, and gives the model back as it was."""
        prepared = self.prepared(variant.method)
        memory = PeakMemory()
        start = time.perf_counter()
        structure, model = prepared.structure, prepared.model
        ranks, ratio = self.ranks(variant, keep)
        layers = range(structure.num_layers)
        if variant.drift is None and not variant.steps and not variant.end:
            made = [compressed_block(prepared.subject, n, prepared.store.load(n), ranks) for n in layers]
        else:
            made = self._refined(name, variant, keep, ranks)
        seconds = time.perf_counter() - start
        with with_blocks(model, structure, made):
            found = self.perplexities(prepared)
        return {"keep": ratio, "seconds": seconds, "peak": memory.bytes() / 1e6, **found}

    def _refined(self, name: str, variant: Variant, keep: float, ranks: Ranks) -> list[torch.nn.Module]:
        prepared, method = self.prepared(variant.method), chosen(variant.method)
        steps = self.args.steps if variant.steps else 0
        settings = Refinement(
            fit=variant.drift is not None,
            drift=variant.drift or 0.0,
            steps=steps,
            logit_steps=self.args.logit_steps if variant.end else 0,
            sequences=self.args.refine_sequences,
        )
        sizes = (self.args.calibration, self.args.length, self.args.gradients, self.args.refine_sequences, steps)
        sizes = (*sizes, settings.end_steps)
        key = f"{name}-{keep}-{'-'.join(map(str, sizes))}"
        store = BlockStore(self.args.cache / ("refined-" + "".join(c if c.isalnum() else "-" for c in key)))
        subject, tokens = prepared.subject, self.texts.calibration
        refiner = Refiner(subject, prepared.store, ranks, tokens, method, settings, Calibration(), prepared.statistics)
        refiner.run(store, Reporter())
        return [stored_block(store, subject, layer) for layer in range(subject.structure.num_layers)]

    def perplexities(self, prepared: Prepared) -> dict[str, float]:
        head = Head(prepared.model)
        return {
            "wikitext": score(prepared.model, head, self.texts.wikitext).perplexity,
            "c4": score(prepared.model, head, self.heldout).perplexity,
        }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--only", nargs="+", help="variants whose names begin so")
    parser.add_argument("--calibration", type=int, default=64, help="sequences of --length tokens")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--gradients", type=int, default=64, help="of these, sequences for the loss gradients")
    parser.add_argument("--steps", type=int, default=Refinement().steps)
    parser.add_argument("--logit-steps", type=int, default=Refinement().end_steps)
    parser.add_argument("--refine-sequences", type=int, help="of these, sequences fitted and trained on (all)")
    parser.add_argument("--trials", type=int, default=30, help="of the searches")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--measured", action="store_true", help="print what has been measured, compute nothing")
    args = parser.parse_args()
    sizes = (f"{args.calibration}x{args.length}", args.gradients, args.refine_sequences, args.steps, args.windows)
    sizes = (*sizes, args.logit_steps)
    name = f"frontier-{'-'.join(map(str, sizes))}.json"
    ledger = Ledger(args.cache / name)
    wanted = {n: v for n, v in VARIANTS.items() if not args.only or n.startswith(tuple(args.only))}
    bench = None if args.measured else Bench(args)
    if bench is not None:
        first = next(iter(wanted.values())).method
        ledger.get("dense", lambda: bench.perplexities(bench.prepared(first)))
    dense = ledger.values["dense"]["value"]
    header = ["variant", "keep (linears)", "WikiText-2", "gap", "C4 held out", "gap", "seconds", "peak, MB"]
    for keep in args.keep:
        rows: list[list[object]] = [["dense", 1.0, dense["wikitext"], 0.0, dense["c4"], 0.0, "", ""]]
        for label, variant in wanted.items():
            if bench is None and f"{keep} {label}" not in ledger.values:
                continue
            found = ledger.get(f"{keep} {label}", lambda v=variant, n=label, k=keep: bench.run(n, v, k))
            measured = [
                value for text in ("wikitext", "c4") for value in (found[text], round(gap(found[text], dense[text]), 3))
            ]
            rows.append([label, round(found["keep"], 4), *measured, round(found["seconds"]), round(found["peak"])])
        print(f"\nkeep {keep}\n")
        print_table(header, rows)


if __name__ == "__main__":
    main()
