"""What the two-sided metric is sensitive to: text for the gradients, shrinkage, weighting tokens by their gradient.

    python benchmarks/metric.py --data DATA

Pivoted storage and closed-form ranks at one keep ratio; nothing else differs between rows. Judged on WikiText-2's
validation split and on C4 that is in no other benchmark's table, so that choices are not made on what is reported.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from bolaco.allocate import Budget, max_rank
from bolaco.allocate.spectral import spectral_ranks
from bolaco.compressed import compressed_block
from bolaco.data import TokenStream
from bolaco.factorize.solver import Factors, InputMetric, OutputMetric, low_rank
from bolaco.models.load import load_model, load_tokenizer
from bolaco.models.structure import Site, inspect_structure
from bolaco.objective import Head, score
from bolaco.statistics.gradients import GradientWalk
from bolaco.statistics.moments import PooledMoments
from common import arguments, gap, print_table, with_blocks


class Weighted:
    """Mean and covariance of inputs, each token counted by the squared norm of its output gradient."""

    def __init__(self, dim: int) -> None:
        self.shift: Tensor | None = None
        self.total = 0.0
        self.first = torch.zeros(dim, dtype=torch.float64)
        self.second = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, x: Tensor, gradient: Tensor) -> None:
        x, weight = x.flatten(0, -2), gradient.flatten(0, -2).square().sum(dim=-1, keepdim=True)
        self.shift = x.mean(dim=0) if self.shift is None else self.shift
        x = x - self.shift
        self.total += float(weight.sum())
        self.first += (weight * x).sum(dim=0).double()
        self.second += ((weight * x).T @ x).double()

    def finish(self) -> tuple[Tensor, Tensor]:
        assert self.shift is not None
        mean = self.first / self.total
        return mean + self.shift.double(), self.second / self.total - torch.outer(mean, mean)


class Both(GradientWalk):
    """A gradient walk that sees the inputs too; keeps everything of the block it is at."""

    def start(self, layer: int) -> list:
        self.plain: dict[str, PooledMoments] = {}
        self.weighted: dict[str, Weighted] = {}
        base, handles = self.model.base_model, []
        for site in self.structure.of_layer(layer):
            self.plain[site.name] = PooledMoments(site.in_features)
            self.weighted[site.name] = Weighted(site.in_features)
            handles.append(base.get_submodule(site.module).register_forward_hook(self._hook(site)))
        return handles

    def _hook(self, site: Site):
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()

            def take(gradient: Tensor) -> None:
                self.plain[site.name].update(x)
                self.weighted[site.name].update(x, gradient)

            output.register_hook(take)

        return hook

    def _backward(self, layer, tick):
        handles = self.start(layer)
        try:
            return super()._backward(layer, tick)
        finally:
            for handle in handles:
                handle.remove()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--sequences", type=int, nargs=2, default=[24, 64], help="few and many")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--shrinkage", type=float, nargs="+", default=[0.03, 0.1, 0.3])
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    c4 = args.data / "c4_sample.jsonl"
    few, many = args.sequences
    calibration = TokenStream(f"{c4}[:1000]", tokenizer).take(many, args.length, "calibration")
    judged = {
        "WikiText-2 validation": TokenStream(str(args.data / "wikitext2_raw_validation.txt"), tokenizer),
        "other C4": TokenStream(f"{c4}[1000:]", tokenizer),
    }
    texts = {name: stream.take(args.windows, args.length, name) for name, stream in judged.items()}
    model = load_model(args.model)
    structure = inspect_structure(model)
    layers = range(structure.num_layers)
    made: dict[str, list[dict[str, Factors]]] = {}
    start = time.perf_counter()
    for count in (few, many):
        walk = Both(model, structure, calibration[:count], batch=4)
        for layer, found in walk.run():
            for site in structure.of_layer(layer):
                weight, moments = structure.weight(model, site), walk.plain[site.name].finalize()
                top = max_rank(site, 8, "pivoted")
                metrics = [(f"{count} sequences, shrinkage 0.1", InputMetric(moments.covariance), moments.mean, 0.1)]
                if count == many:
                    metrics += [
                        (f"{count} sequences, shrinkage {value}", metrics[0][1], moments.mean, value)
                        for value in args.shrinkage
                        if value != 0.1
                    ]
                    mean, covariance = walk.weighted[site.name].finish()
                    metrics.append(
                        (f"{count} sequences, tokens weighted by gradient", InputMetric(covariance), mean, 0.1)
                    )
                for label, metric, mean, shrinkage in metrics:
                    output = OutputMetric(found[site.name], shrinkage)
                    blocks = made.setdefault(label, [{} for _ in layers])
                    blocks[layer][site.name] = low_rank(weight, metric, top, mean=mean, output=output)
    print(f"statistics and factors: {time.perf_counter() - start:.0f} s")
    dense = {name: score(model, Head(model), blocks).perplexity for name, blocks in texts.items()}
    rows: list[list[object]] = [["dense", *(x for value in dense.values() for x in (value, 0.0))]]
    for label, factors in made.items():
        spectra = {name: item.spectrum for block in factors for name, item in block.items()}
        ranks = spectral_ranks(structure.sites, spectra, Budget(structure.sites, args.keep, "pivoted"), 8)
        row: list[object] = [label]
        with with_blocks(model, structure, [compressed_block(model, structure, n, factors[n], ranks) for n in layers]):
            for name, blocks in texts.items():
                value = score(model, Head(model), blocks).perplexity
                row += [value, round(gap(value, dense[name]), 3)]
        rows.append(row)
    header = ["metric", *(x for name in texts for x in (name, "gap"))]
    print_table(header, rows)


if __name__ == "__main__":
    main()
