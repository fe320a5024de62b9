"""Which text to calibrate on: C4, text that the model has written itself, or half of each, at equal tokens.

    python benchmarks/calibration_text.py --data DATA
    python benchmarks/calibration_text.py --data DATA --calibration 16 --length 256 --layers 6 --windows 8

The default recipe (K-FAC factors, pivoted storage, closed-form ranks, 20 refinement steps) at --keep, with statistics,
gradients and refinement on each text; measured on text that no reported number is from: validation blocks of C4 and of
WikiText-2, perplexity and KL(model || original). --report measures on WikiText-2 test and held-out C4 instead.
``--layers`` compresses the first blocks only and leaves the others as they are. Batches of written text and results are
remembered in --cache.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from bolaco.allocate.allocators.spectral import spectral_ranks
from bolaco.data.memory import InMemory
from bolaco.data.settings import Calibration
from bolaco.data.sources import TokenStream, fingerprint
from bolaco.data.written import Writer, Writing
from bolaco.evaluation.objective import Head, hidden_states, score
from bolaco.models.load import load_model, load_tokenizer
from bolaco.progress import Reporter
from bolaco.refine.run import Refiner, stored_block
from bolaco.refine.settings import Refinement
from bolaco.storage.budget import Budget
from bolaco.storage.storage import STORAGES
from bolaco.work.blockstore import BlockStore
from common import Ledger, Prepared, arguments, chosen, gap, prepare, print_table, protocol_texts, with_blocks

# How the model writes; the name of the text -> what differs from the defaults.
WRITTEN: dict[str, dict[str, float]] = {"self": {}, "self, all tokens": {"top_p": 1.0}}


class Bench:
    """The texts, and what a model compressed on one of them is measured by."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.tokenizer = args, load_tokenizer(args.model)
        texts = protocol_texts(args.data, self.tokenizer, args.calibration, args.length, 16, 512, 64)
        wiki = TokenStream(str(args.data / "wikitext2_raw_validation.txt"), self.tokenizer)
        self.c4 = texts.calibration
        self.measured = {"wiki": wiki.take(args.windows, 512, "wiki"), "c4": texts.validation[: args.windows]}
        if args.report:
            self.measured = {"wiki": texts.wikitext[: args.windows], "c4": texts.heldout[: args.windows]}
        model = load_model(args.model)
        self.dense = {name: score(model, Head(model), text).perplexity for name, text in self.measured.items()}
        self.references = {name: hidden_states(model, text, 4) for name, text in self.measured.items()}

    def written(self, name: str) -> Tensor:
        """As many blocks of the model's own text as there are of C4."""
        count, length = self.c4.shape
        settings = Writing(length=length, batch=self.args.batch, **WRITTEN[name])
        place = self.args.cache / f"written-{''.join(c if c.isalnum() else '-' for c in name)}-{length}"

        def enough(texts: list[str]) -> bool:
            read = self.tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []
            print(f"{name}: {sum(map(len, read))} of {count * length} tokens", flush=True)
            return sum(map(len, read)) >= count * length

        model = load_model(self.args.model)
        documents = Writer(model, self.tokenizer, settings, place / str(self.args.batch)).until(enough)
        return TokenStream(InMemory(name, tuple(documents)), self.tokenizer).take(count, length, name)

    def text(self, name: str) -> Tensor:
        """The blocks of a text ``[sequences, length]``, as many for each."""
        if name == "C4":
            return self.c4
        if name in WRITTEN:
            return self.written(name)
        # In turn, so that the first sequences, which gradients are estimated on, are of both too.
        half = len(self.c4) // 2
        return torch.stack([self.c4[:half], self.written("self")[:half]], dim=1).flatten(0, 1)

    def run(self, name: str) -> dict[str, float]:
        """Compresses on one text, and measures."""
        args, blocks = self.args, self.text(name)
        start, used = time.perf_counter(), time.process_time()
        prepared = prepare(args, blocks, "kfac", 32, args.gradients, "pivoted")
        structure = prepared.structure
        budget = Budget(structure.sites, args.keep, STORAGES.get("pivoted"))
        ranks = spectral_ranks(structure.sites, prepared.store.spectra(structure.num_layers), budget, 8)
        layers = args.layers or structure.num_layers
        store = BlockStore(args.cache / f"refined-{fingerprint(blocks)}-{args.keep}-{args.gradients}-{layers}")
        refiner = Refiner(
            prepared.subject,
            prepared.store,
            ranks,
            blocks,
            chosen("kfac"),
            Refinement(steps=args.steps),
            Calibration(),
            prepared.statistics,
        )
        refiner.layers = layers
        refiner.run(store, Reporter())
        made = [stored_block(store, prepared.subject, n) for n in range(layers)]
        seconds = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used}
        with with_blocks(prepared.model, structure, made):
            return self.scores(prepared) | seconds

    def scores(self, prepared: Prepared) -> dict[str, float]:
        """Gap to dense, and nats a token of the divergence, on each text."""
        found = {}
        for name, text in self.measured.items():
            scores = score(prepared.model, Head(prepared.model), text, reference=self.references[name])
            found |= {
                name: gap(scores.perplexity, self.dense[name]),
                f"{name} kl": scores.mean_kl / text.shape[1],
            }
        return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--layers", type=int, help="compress so many blocks from the first on; default: all")
    parser.add_argument("--only", nargs="+", help="texts of these names")
    parser.add_argument("--calibration", type=int, default=64, help="sequences of --length tokens")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--gradients", type=int, default=24, help="of these, sequences for the loss gradients")
    parser.add_argument("--steps", type=int, default=20, help="of the refinement of a block")
    parser.add_argument("--windows", type=int, default=16, help="blocks of 512 tokens that are measured, of each text")
    parser.add_argument("--batch", type=int, default=32, help="texts that are written at once")
    parser.add_argument("--report", action="store_true", help="measure on the texts of reported numbers")
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = f"{args.calibration}x{args.length}-{args.gradients}-{args.steps}-{args.layers or 'all'}-{args.windows}"
    ledger = Ledger(args.cache / f"calibration-text-{sizes}-{args.keep}{'-report' if args.report else ''}.json")
    bench = Bench(args)
    rows = []
    for name in ("C4", *WRITTEN, "half C4, half self"):
        if args.only and name not in args.only:
            continue
        found = ledger.get(name, lambda n=name: bench.run(n))
        numbers = [round(found[key], 4) for key in ("wiki", "c4", "wiki kl", "c4 kl")]
        rows.append([name, *numbers, round(found["seconds"]), round(found["cpu"])])
        print(rows[-1], flush=True)
    print_table(
        ["calibrated on", "WikiText-2, gap", "C4, gap", "WikiText-2, KL", "C4, KL", "seconds", "CPU seconds"], rows
    )


if __name__ == "__main__":
    main()
