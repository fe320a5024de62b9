"""Loss against bytes: the dense model in few bits beside low rank in few bits, by one rule for the codes of both.

    python benchmarks/bytes.py --data DATA --calibration 256 --gradients 256

Rows: `int4` and the like are the dense model, every matrix of the decoder rounded to nearest with scales of least
squared error; `gptq` the same with error feedback; `mixed 55` with bits for each matrix, by the closed form for so many
MB of linears; `auto 55` ranks and bits by it; `keep 0.8 int4` the default's factors in two factors, ranks by the closed
form. `, trained` is with the steps on scales, norms and biases afterwards (--steps). Blocks are not refined before.
Groups of 32 numbers with 16-bit scales.
MB are 10^6 bytes: of the linears with scales and biases, and of all weights, where embedding and vectors have 16 bits.
Gaps are in nats to the dense model as it is read, on text that nothing was chosen by. The source of the default model
is a Q4_1 file: its weights are on a grid of four bits in groups of 32, so from four bits on plain rows say little.
Results are remembered in --cache, by row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from bolaco.allocate.allocators.spectral import coded_ranks, spectral_ranks
from bolaco.data.settings import Calibration
from bolaco.evaluation.objective import Head, score
from bolaco.factorize.noise import Noise, NoiseStore, NoiseTask
from bolaco.models.load import load_tokenizer
from bolaco.progress import Reporter
from bolaco.quantize.settings import WHOLE, Quantization
from bolaco.refine.quantize import Quantizer, quantized_block
from bolaco.refine.rounding import BlockRounding
from bolaco.statistics.forward import collect, input_walk
from bolaco.statistics.moments import MOMENTS, Moments
from bolaco.statistics.statistic import SiteStatistics
from bolaco.storage.block import compressed_block, trainable_copy
from bolaco.storage.budget import Budget, Ranks, ratio_of
from bolaco.storage.coded import CodedStorage
from bolaco.storage.storage import STORAGES
from bolaco.work.blockstore import BlockStore
from common import Ledger, arguments, gap, prepare, print_table, protocol_texts, with_blocks

GROUP, CHOICES = 32, (2, 3, 4, 5, 6, 8, WHOLE)
ROWS = [
    *(f"int{bits}{how}" for how in ("", " gptq") for bits in (8, 6, 5, 4, 3, 2)),
    *(f"keep {keep} int{bits}" for keep in (0.8, 0.6) for bits in (8, 6, 4, 3)),
    *(f"mixed {size}" for size in (55, 48, 40)),
    *(f"auto {size}{how}" for size in (55, 48, 40) for how in ("", ", trained")),
]
_FIELDS = ("mean", "covariance", "group_means", "group_counts")


class Bench:
    """The model with its factors, the moments of its inputs, and the texts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.texts = protocol_texts(args.data, load_tokenizer(args.model), args.calibration, 512, 16, 512, args.windows)
        self.prepared = prepare(args, self.texts.calibration, "kfac", 32, args.gradients, "pivoted")
        self.structure, self.model = self.prepared.structure, self.prepared.model
        self.layers, self.storage = self.structure.num_layers, STORAGES.get("two-factor")
        self.tokens = self.texts.calibration[: args.sequences]
        self.kept = BlockStore(args.cache / f"moments-{args.calibration}-{args.sequences}")
        if not self.kept.complete(self.layers):
            walk = input_walk(self.model, self.structure, self.tokens, 4)
            for layer in range(self.layers):
                (found,) = collect(walk, [MOMENTS], 32)
                values = {f"{n}/{f}": getattr(s[MOMENTS], f) for n, s in found.items() for f in _FIELDS}
                self.kept.write(layer, values)
            walk.close()

    def moments(self, layer: int) -> dict[str, SiteStatistics]:
        """Of the inputs of a block."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in self.kept.read(layer).items():
            group, _, field = name.rpartition("/")
            found.setdefault(group, {})[field] = value
        return {group: SiteStatistics({MOMENTS: Moments(**values)}) for group, values in found.items()}

    def noise(self) -> dict[int, dict[str, Noise]]:
        """What codes would add, of every matrix."""
        p, sites = self.prepared, self.structure.sites
        top = {site.name: self.storage.max_rank(site, 8) for site in sites}
        task = NoiseTask(p.subject, p.store, top, p.statistics, True, CHOICES, GROUP, 0.01)
        store = NoiseStore(self.args.cache / f"noise-{self.args.calibration}-{self.args.sequences}")
        for layer in range(self.layers):
            if not store.has(layer):
                store.put(layer, task.of_block(layer, self.moments(layer)))
        return store.all(self.layers)

    def planned(self, words: list[str]) -> tuple[Ranks, dict[str, int]]:
        """Ranks and bits of a row."""
        sites = self.structure.sites
        spectra = self.prepared.store.spectra(self.layers)
        if words[0] in ("auto", "mixed"):
            spectra = spectra if words[0] == "auto" else {}
            coded = CodedStorage(self.storage, CHOICES, GROUP, torch.bfloat16)
            total = sum(coded.dense_cost(site) for site in sites)
            # Biases are not in the budget of matrices, and are in what is compared.
            biases = 2 * sum(site.out_features for site in sites) if spectra else 0
            limit = 8 * int(float(words[1]) * 1e6 - biases)
            return coded_ranks(sites, spectra, Budget(sites, ratio_of(limit, total), coded), 8, False, self.noise())
        width = int(words[2 if words[0] == "keep" else 0].removeprefix("int"))
        bits = dict.fromkeys((site.name for site in sites), width)
        if words[0] != "keep":
            return dict.fromkeys(bits), bits
        return spectral_ranks(sites, spectra, Budget(sites, float(words[1]), self.storage), 8), bits

    def bytes_of(self, ranks: Ranks, bits: dict[str, int]) -> int:
        """Of all linears, with scales and new biases."""
        found = 0
        for site in self.structure.sites:
            coded = CodedStorage(self.storage, (bits[site.name],), GROUP, torch.bfloat16)
            biases = 2 * site.out_features if ranks[site.name] is not None else 0
            found += coded.parameters(site, ranks[site.name]) // 8 + biases
        return found

    def run(self, row: str) -> dict[str, float]:
        """Makes a row's model, measures it, and gives the model back as it was."""
        name, _, trained = row.partition(", ")
        words = name.split()
        ranks, bits = self.planned(words)
        rounding = BlockRounding(self.structure, bits, GROUP, 0.01)
        subject, store = self.prepared.subject, self.prepared.store

        def make(layer: int) -> torch.nn.Module:
            return trainable_copy(subject, layer, compressed_block(subject, layer, store.load(layer), ranks))

        made = []
        layers = self.args.layers or self.layers
        settings = Quantization(format="int8", group=GROUP, sequences=self.args.sequences, steps=self.args.steps)
        if trained:
            place = BlockStore(self.args.cache / f"coded-{row.replace(' ', '-').replace(',', '')}-{self.args.steps}")
            quantizer = Quantizer(subject, make, bits, self.tokens, settings, Calibration())
            quantizer.run(place, Reporter(), layers=layers)
            made = [quantized_block(place, n, make(n), self.structure, bits, settings) for n in range(layers)]
        for layer in range(len(made), layers):
            block = make(layer)
            # Rounded to nearest where nothing is known of the inputs.
            known = {} if words[0].startswith("int") and "gptq" not in words else self.moments(layer)
            rounding.run(layer, block, known)
            made.append(block)
        size = self.bytes_of(ranks, bits)
        linears = sum(site.size for site in self.structure.sites)
        others = 2 * (sum(p.numel() for p in self.model.parameters()) - linears)
        factored = sum(rank is not None for rank in ranks.values())
        mean_bits = sum(bits[site.name] * site.size for site in self.structure.sites) / linears
        with with_blocks(self.model, self.structure, made):
            scores = self.scores()
        known = {"linears": size / 1e6, "folder": (size + others) / 1e6, "factored": factored, "bits": mean_bits}
        return scores | known

    def scores(self) -> dict[str, float]:
        """Perplexity on each text."""
        head, heldout = Head(self.model), self.texts.heldout[: max(1, self.args.windows // 2)]
        texts = {"wikitext": self.texts.wikitext, "c4": heldout}
        return {name: score(self.model, head, text).perplexity for name, text in texts.items()}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="rows of these names")
    parser.add_argument("--layers", type=int, help="the first so many blocks only; the others stay as they are")
    parser.add_argument("--calibration", type=int, default=64, help="sequences of 512 tokens, for the factors")
    parser.add_argument("--gradients", type=int, default=64, help="of these, sequences for the loss gradients")
    parser.add_argument("--sequences", type=int, default=32, help="of these, sequences that codes see")
    parser.add_argument("--steps", type=int, default=40, help="of scales, norms and biases of a block")
    parser.add_argument("--windows", type=int, default=16, help="of 1024 tokens of WikiText-2; half as many of C4")
    args = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(args)
    sizes = f"{args.calibration}-{args.gradients}-{args.sequences}-{args.steps}-{args.layers or 'all'}-{args.windows}"
    ledger = Ledger(args.cache / f"bytes-{sizes}.json")
    measure: Callable[[str], dict[str, float]] = lambda row: ledger.get(row, lambda: bench.run(row))  # noqa: E731
    dense = ledger.get("dense", bench.scores)
    rows = []
    for row in args.only or ROWS:
        found = measure(row)
        gaps = [round(gap(found[text], dense[text]), 3) for text in ("wikitext", "c4")]
        sizes_of = [round(found["linears"], 1), round(found["folder"], 1)]
        rows.append([row, *sizes_of, found["factored"], round(found["bits"], 2), *gaps])
        print(rows[-1], flush=True)
    print_table(["row", "linears, MB", "all, MB", "factored", "bits, mean", "WikiText-2, gap", "C4, gap"], rows)


if __name__ == "__main__":
    main()
