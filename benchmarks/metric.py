"""What the two-sided metric is sensitive to: amount and kind of text, shrinkage, and tokens that stand out.

    python benchmarks/metric.py --data DATA

Pivoted storage and closed-form ranks at one keep ratio; nothing else differs between rows. Judged on WikiText-2's
validation split and on C4 that ablation and comparison do not report, so that choices are not made on what is reported.
"Varied" text is half C4 and half the documentation of Python (the source `pydoc`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bolaco.allocate.allocators.spectral import spectral_ranks
from bolaco.data.sources import TokenStream
from bolaco.evaluation.objective import Head, score
from bolaco.factorize.solver import Factors, InputMetric, OutputMetric, low_rank
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model, load_tokenizer
from bolaco.models.structure import Site
from bolaco.models.subject import Subject
from bolaco.statistics.backward import BlockGradientWalk
from bolaco.statistics.gradient import GRADIENT
from bolaco.statistics.statistic import GradientAccumulator, GradientStatistic
from bolaco.storage.block import compressed_block
from bolaco.storage.budget import Budget
from bolaco.storage.storage import STORAGES
from common import Ledger, arguments, gap, print_table, with_blocks

SHRINKAGE = 0.1
CLIP = 2.0


class Weighted:
    """Mean and covariance of inputs with a weight for each token."""

    def __init__(self, dim: int) -> None:
        self.shift: Tensor | None = None
        self.total = 0.0
        self.first = torch.zeros(dim, dtype=torch.float64)
        self.second = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, x: Tensor, weight: Tensor) -> None:
        """Adds ``x`` ``[..., d]`` with weights ``[..., 1]``."""
        x, weight = x.flatten(0, -2), weight.flatten(0, -2)
        # Of float32 sums only differences from a typical input are exact enough.
        self.shift = x.mean(dim=0) if self.shift is None else self.shift
        x = x - self.shift
        self.total += float(weight.sum())
        self.first += (weight * x).sum(dim=0).double()
        self.second += ((weight * x).T @ x).double()

    def finish(self) -> tuple[Tensor, Tensor]:
        assert self.shift is not None
        mean = self.first / self.total
        return mean + self.shift.double(), self.second / self.total - torch.outer(mean, mean)


def alike(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.ones_like(x[..., :1])


def by_gradient(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return x, gradient.square().sum(dim=-1, keepdim=True)


def without_first(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.ones_like(x[..., :1])
    weight[:, 0] = 0
    return x, weight


def clipped(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    norms = x.norm(dim=-1, keepdim=True)
    limit = CLIP * norms.flatten().median()
    return x * (limit / norms.clamp(min=1e-12)).clamp(max=1), torch.ones_like(norms)


TOKENS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "": alike,
    "tokens weighted by gradient": by_gradient,
    "first position left out": without_first,
    f"norms clipped at {CLIP:g} medians": clipped,
}


class Seen:
    """Takes gradients as the output metric does, and inputs in several ways."""

    def __init__(self, outputs: GradientAccumulator, inputs: dict[str, Weighted]) -> None:
        self.outputs, self.inputs = outputs, inputs

    def update(self, x: Tensor, gradient: Tensor) -> None:
        self.outputs.update(x, gradient)
        for way, moments in self.inputs.items():
            moments.update(*TOKENS[way](x, gradient))

    def result(self) -> Tensor:
        return self.outputs.result()


class Both(GradientStatistic):
    """The statistic of the output metric; ``moments`` has those of the inputs, by site name and way to treat tokens."""

    name, labels = GRADIENT.name, GRADIENT.labels

    def __init__(self, ways: tuple[str, ...]) -> None:
        self.ways = ways
        self.moments: dict[str, dict[str, Weighted]] = {}

    def accumulator(self, site: Site, device: torch.device) -> Seen:
        self.moments[site.name] = {way: Weighted(site.in_features) for way in self.ways}
        return Seen(GRADIENT.accumulator(site, device), self.moments[site.name])

    def stack(self, values: Sequence[Tensor]) -> Tensor:
        return GRADIENT.stack(values)

    def numbers(self, site: Site) -> int:
        return GRADIENT.numbers(site)


def rows(
    subject: Subject, tokens: Tensor, ways: tuple[str, ...], shrinkage: list[float]
) -> Iterator[tuple[str, list[dict[str, Factors]]]]:
    """Label and factors by block of each way to treat tokens, and of the plain one with each shrinkage."""
    structure, storage, both = subject.structure, STORAGES.get("pivoted"), Both(ways)
    walk = BlockGradientWalk(subject.model, structure, tokens, 4, both)
    made: dict[str, list[dict[str, Factors]]] = {}
    for layer, found in walk.run():
        for site in structure.of_layer(layer):
            weight, top = subject.weight(site), storage.max_rank(site, 8)
            for way, moments in both.moments.pop(site.name).items():
                mean, covariance = moments.finish()
                for value in shrinkage if not way else [SHRINKAGE]:
                    label = way or ("" if value == SHRINKAGE else f"shrinkage {value}")
                    blocks = made.setdefault(label, [{} for _ in range(structure.num_layers)])
                    output = OutputMetric(found[site.name], value)
                    blocks[layer][site.name] = low_rank(weight, InputMetric(covariance), top, mean=mean, output=output)
    yield from made.items()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--sequences", type=int, nargs=2, default=[24, 64], help="few and many")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--shrinkage", type=float, nargs="*", default=[0.03, 0.3], help=f"beside {SHRINKAGE}")
    args = parser.parse_args()
    tokenizer, c4 = load_tokenizer(args.model), args.data / "c4_sample.jsonl"
    few, many = args.sequences
    calibration = TokenStream(f"{c4}[:1000]", tokenizer).take(many, args.length, "calibration")
    python = TokenStream("pydoc", tokenizer).take(many // 2, args.length, "Python's documentation")
    judged = {
        "WikiText-2 validation": TokenStream(str(args.data / "wikitext2_raw_validation.txt"), tokenizer),
        "other C4": TokenStream(f"{c4}[1000:]", tokenizer),
    }
    texts = {name: stream.take(args.windows, args.length, name) for name, stream in judged.items()}
    model = load_model(args.model)
    structure = inspect_structure(model)
    subject, budget = Subject(model, structure), Budget(structure.sites, args.keep, STORAGES.get("pivoted"))
    ledger = Ledger(args.cache / f"metric-{args.keep}-{few}-{many}-{args.length}-{args.windows}.json")

    def measured() -> dict[str, float]:
        return {name: score(model, Head(model), blocks).perplexity for name, blocks in texts.items()}

    dense = ledger.get("dense", measured)
    plan: dict[str, tuple[Tensor, tuple[str, ...], list[float]]] = {
        f"{few} sequences": (calibration[:few], ("",), [SHRINKAGE]),
        f"{many} sequences, varied": (torch.cat([calibration[: many - many // 2], python]), ("",), [SHRINKAGE]),
        f"{many} sequences": (calibration, tuple(TOKENS), [SHRINKAGE, *args.shrinkage]),
    }
    for text, (tokens, ways, shrinkage) in plan.items():
        done = f"{text}: all"
        if done not in ledger.values:
            start = time.perf_counter()
            for label, factors in rows(subject, tokens, ways, shrinkage):
                spectra = {name: item.spectrum for block in factors for name, item in block.items()}
                ranks = spectral_ranks(structure.sites, spectra, budget, 8)
                made = [compressed_block(subject, n, factors[n], ranks) for n in range(len(factors))]
                with with_blocks(model, structure, made):
                    ledger.get(", ".join(filter(None, (text, label))), measured)
            ledger.get(done, lambda start=start: time.perf_counter() - start)
    found = {name: item["value"] for name, item in ledger.values.items() if not name.endswith(": all")}
    header = ["metric", *(x for name in texts for x in (name, "gap"))]
    print_table(
        header,
        [[n, *(x for t in texts for x in (v[t], round(gap(v[t], dense[t]), 3)))] for n, v in found.items()],
    )


if __name__ == "__main__":
    main()
