"""What each part of refinement brings, and what it costs: steps, text, the metric of the loss, windows, logits.

    python benchmarks/refinement.py --data DATA --keep 0.8
    python benchmarks/refinement.py --data DATA --layers 10 --only "20 steps" "160 steps"

The default's factors and ranks, refined in several ways, measured on text that no reported number is from: validation
blocks of C4 and of WikiText-2, perplexity and KL(model || original). ``--layers`` compresses the first blocks only and
leaves the others as they are, which takes less time and keeps the order. Results are remembered in --cache.
"""

from __future__ import annotations

import argparse
import shutil
import time

import torch

from bolaco.allocate.allocators.spectral import spectral_ranks
from bolaco.data.settings import Calibration
from bolaco.data.sources import TokenStream
from bolaco.evaluation.objective import Head, hidden_states, score
from bolaco.models.load import load_tokenizer
from bolaco.progress import Reporter
from bolaco.refine.run import Refiner, stored_block
from bolaco.refine.settings import Refinement
from bolaco.storage.block import compressed_block
from bolaco.storage.budget import Budget, Ranks
from bolaco.storage.storage import STORAGES
from bolaco.work.blockstore import BlockStore
from common import Ledger, arguments, chosen, gap, prepare, print_table, protocol_texts, with_blocks

# Blocks alone, on so many sequences.
_BLOCKS: dict[str, float | None] = {"sequences": 32, "held_out": 0, "logit_steps": 0}
_LONG = _BLOCKS | {"steps": 160, "sequences": 64, "held_out": 8}
_HALF = _LONG | {"steps": 80}
_ALL: dict[str, float | None] = _BLOCKS | {"sequences": None, "held_out": 16, "steps": 20}
VARIANTS: dict[str, dict[str, float | None]] = {
    "not refined": _BLOCKS | {"steps": 0},
    "the default": {},
    "20 steps": _BLOCKS | {"steps": 20},
    "80 steps": _HALF,
    "80 steps, 32 sequences": _HALF | {"sequences": 32, "held_out": 4},
    "80 steps, rate 1e-3": _HALF | {"learning_rate": 1e-3},
    "80 steps, half of the loss in nats": _HALF | {"curvature": 0.5},
    "80 steps, all of the loss in nats": _HALF | {"curvature": 1.0},
    "80 steps, windows of two, 40 each": _HALF | {"steps": 40, "window": 2},
    "80 steps, windows of two, 40 each, half in nats": _HALF | {"steps": 40, "window": 2, "curvature": 0.5},
    "160 steps": _LONG,
    "160 steps, half of the loss in nats": _LONG | {"curvature": 0.5},
    "320 steps": _LONG | {"steps": 320},
    "640 steps": _LONG | {"steps": 640},
    "20 steps, 96 sequences": _ALL | {"sequences": 96},
    "20 steps, all text": _ALL,
    "60 steps, all text": _ALL | {"steps": 60},
    "0 steps, 96 sequences; all blocks on logits": _ALL | {"steps": 0, "sequences": 96, "logit_steps": 60},
    "20 steps, all text; last block on logits": _ALL | {"logit_steps": 60, "logits": 1},
    "20 steps, all text; all blocks on logits": _ALL | {"logit_steps": 60},
    "20 steps, all text; all blocks on logits, rate 1e-4": _ALL | {"logit_steps": 60, "logit_rate": 1e-4},
    "20 steps, all text; scales": _ALL | {"scale_steps": 60},
}
# What is done after the blocks, which variants that have the rest in common share.
_END = {"logit_steps", "logits", "logit_rate", "scale_steps", "scale_rate"}


class Bench:
    """The model with its factors, and the texts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        tokenizer = load_tokenizer(args.model)
        self.texts = protocol_texts(args.data, tokenizer, args.calibration, args.length, 16, 512, 1)
        wiki = TokenStream(str(args.data / "wikitext2_raw_validation.txt"), tokenizer)
        self.measured = {"c4": self.texts.validation[: args.windows], "wiki": wiki.take(args.windows, 512, "wiki")}
        self.prepared = prepare(args, self.texts.calibration, "kfac", 32, args.gradients, "pivoted")
        model = self.prepared.model
        self.head = Head(model)
        self.references = {name: hidden_states(model, text, 4) for name, text in self.measured.items()}

    def run(self, name: str, values: dict[str, float | None], keep: float) -> dict[str, float]:
        """Refines in one way, measures, and gives the model back as it was."""
        prepared, args = self.prepared, self.args
        structure, model = prepared.structure, prepared.model
        budget = Budget(structure.sites, keep, STORAGES.get("pivoted"))
        ranks = spectral_ranks(structure.sites, prepared.store.spectra(structure.num_layers), budget, 8)
        settings = Refinement(**values)
        layers = args.layers or structure.num_layers
        start, used = time.perf_counter(), time.process_time()
        if settings.active:
            store = self._place(values, keep)
            blocks = {key: value for key, value in values.items() if key not in _END}
            if blocks != values:
                self._refine(blocks, ranks, self._place(blocks, keep))
                if not store.folder.exists():
                    shutil.copytree(self._place(blocks, keep).folder, store.folder)
                start, used = time.perf_counter(), time.process_time()  # of the end alone
            self._refine(values, ranks, store)
            made = [stored_block(store, prepared.subject, n) for n in range(layers)]
        else:
            made = [compressed_block(prepared.subject, n, prepared.store.load(n), ranks) for n in range(layers)]
        seconds = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used}
        with with_blocks(model, structure, made):
            return self.scores() | seconds

    def _place(self, values: dict[str, float | None], keep: float) -> BlockStore:
        name = "-".join(f"{key}{value}" for key, value in values.items())
        layers = self.args.layers or "all"
        return BlockStore(self.args.cache / f"refinement-{name}-{keep}-{layers}-{self.args.calibration}")

    def _refine(self, values: dict[str, float | None], ranks: Ranks, store: BlockStore) -> None:
        refiner = Refiner(
            self.prepared.subject,
            self.prepared.store,
            ranks,
            self.texts.calibration,
            chosen("kfac"),
            Refinement.model_validate(values),
            Calibration(),
            self.prepared.statistics,
        )
        refiner.layers = self.args.layers or refiner.layers
        refiner.run(store, Reporter())

    def scores(self) -> dict[str, float]:
        """Perplexity, and nats a token of the divergence, on each text."""
        found = {}
        for name, text in self.measured.items():
            scores = score(self.prepared.model, self.head, text, reference=self.references[name])
            found |= {name: scores.perplexity, f"{name} kl": scores.mean_kl / text.shape[1]}
        return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--layers", type=int, help="compress so many blocks from the first on; default: all")
    parser.add_argument("--only", nargs="+", help="variants of these names")
    parser.add_argument("--calibration", type=int, default=64, help="sequences of --length tokens")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--gradients", type=int, default=64, help="of these, sequences for the loss gradients")
    parser.add_argument("--windows", type=int, default=16, help="blocks of 512 tokens that are measured, of each text")
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = f"{args.calibration}x{args.length}-{args.gradients}-{args.layers or 'all'}-{args.windows}"
    ledger = Ledger(args.cache / f"refinement-{sizes}.json")
    bench = Bench(args)
    dense = ledger.get("dense", bench.scores)
    rows = []
    for label, values in VARIANTS.items():
        if args.only and label not in args.only:
            continue
        found = ledger.get(f"{args.keep} {label}", lambda n=label, v=values: bench.run(n, v, args.keep))
        measured = [round(gap(found[text], dense[text]), 4) for text in ("wiki", "c4")]
        divergences = [round(found[f"{text} kl"], 4) for text in ("wiki", "c4")]
        rows.append([label, *measured, *divergences, round(found["seconds"]), round(found["cpu"])])
        print(rows[-1], flush=True)
    print_table(
        ["refinement", "WikiText-2, gap", "C4, gap", "WikiText-2, KL", "C4, KL", "seconds", "CPU seconds"], rows
    )


if __name__ == "__main__":
    main()
