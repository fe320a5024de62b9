"""What the papers of the other methods lead to expect, checked on a real model: FWSVD, WeLore, joint rank-k, LPAF.

    python benchmarks/spec_checks.py --data DATA
    python benchmarks/spec_checks.py --data DATA --every 5 --checks joint welore

Factors are multiplied back into a dense copy, so one number decides: the loss in nats a token. Both sides of a row
have the same number of parameters. With all blocks changed plain SVD leaves a small model at the level of chance;
`--every 5` changes one block of five. tests/test_methods_slow.py prints the same numbers on less text.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.allocate.allocators.welore import welore_cut
from bolaco.allocate.space import make_space
from bolaco.data.settings import Calibration
from bolaco.evaluation.perplexity import perplexity
from bolaco.factorize import FISHER, INPUT_IMPORTANCE, OUTPUT_IMPORTANCE, InputMetric, SiteStatistics, low_rank
from bolaco.factorize.methods.fwsvd import importance
from bolaco.factorize.run import FactorJob, factorize
from bolaco.factorize.store import FactorStore
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model, load_tokenizer
from bolaco.models.structure import Stack, stacked
from bolaco.models.subject import Subject
from bolaco.progress import Reporter
from bolaco.statistics.stored import StatisticStore, estimate_gradients
from bolaco.storage.budget import Budget, Ranks
from bolaco.storage.storage import STORAGES
from bolaco.transform.prune import PruningOptions, kept_elements, prune, with_weights
from common import arguments, chosen, print_table, protocol_texts

HEADER = ["check", "setting", "quantity", "method", "baseline"]
MULTIPLE = 8
TWO_FACTOR = STORAGES.get("two-factor")


@dataclass(frozen=True)
class Row:
    """One comparison; lower is better in both columns."""

    check: str
    setting: str
    quantity: str
    method: float
    baseline: float

    @property
    def cells(self) -> list[object]:
        return [self.check, self.setting, self.quantity, self.method, self.baseline]


class Bench:
    """A model, what was computed for it, and the loss of its variants.

    Args:
        model: the model, in evaluation mode.
        calibration: ``[sequences, length]``, text of the Fisher information and of pruning.
        heldout: text the losses are measured on.
        folder: where factors are kept.
        every: one block of so many is changed; the others are left as they are and out of all ratios.
    """

    def __init__(
        self, model: PreTrainedModel, calibration: Tensor, heldout: Tensor, folder: Path, every: int = 1
    ) -> None:
        self.model, self.calibration, self.heldout, self.folder = model, calibration, heldout, folder
        whole = inspect_structure(model)
        self.sites = tuple(site for site in whole.sites if site.layer % every == every // 2)
        self.structure = replace(whole, sites=self.sites)
        self.subject = Subject(model, self.structure)

    def loss(self, weights: dict[str, Tensor], blocks: Tensor | None = None) -> float:
        """Nats a token with these matrices, the others as they are."""
        all_weights = {site.name: self.subject.weight(site) for site in self.sites} | weights
        changed = with_weights(self.model, self.structure, all_weights)
        return math.log(perplexity(changed, self.heldout if blocks is None else blocks, 4).perplexity)

    def factors(self, method: str, statistics: Sequence[StatisticStore] = ()) -> FactorStore:
        store = FactorStore(self.folder / method)
        top = {site.name: TWO_FACTOR.max_rank(site, MULTIPLE) for site in self.sites}
        job = FactorJob(chosen(method), self.subject, store, top, statistics)
        factorize(self.calibration, [job], Calibration(), Reporter(quiet=True))
        return store

    @cached_property
    def svd(self) -> FactorStore:
        """Plain factors of every matrix."""
        return self.factors("svd")

    def products(self, store: FactorStore, ranks: Ranks) -> dict[str, Tensor]:
        """The factored matrices at these ranks, multiplied back."""
        found: dict[str, Tensor] = {}
        for layer in range(self.structure.num_layers):
            for name, factors in store.load(layer).items():
                rank = ranks.get(name)
                if rank is not None:
                    found[name] = factors.product(rank)
        return found

    def uniform(self, keep: float) -> Ranks:
        """One ratio for all matrices, filled up to the budget."""
        space = make_space(self.structure, Budget(self.sites, keep, TWO_FACTOR), dense_types=(), multiple=MULTIPLE)
        return space.ranks(space.settle([keep] * len(space.names)))


def fwsvd(bench: Bench, keeps: Sequence[float] = (0.9, 0.8)) -> list[Row]:
    """Less error in the Fisher metric by construction, and less loss on the text the Fisher was estimated on."""
    known, quiet = StatisticStore(bench.folder / FISHER.name, FISHER), Reporter(quiet=True)
    estimate_gradients(known, FISHER, bench.model, bench.structure, bench.calibration, Calibration(), quiet)
    store, rows = bench.factors("fwsvd", [known]), []
    fisher = {
        name: importance(value)
        for layer in range(bench.structure.num_layers)
        for name, value in known.get(layer, torch.device("cpu")).items()
    }
    for keep in keeps:
        ranks = bench.uniform(keep)
        ours, plain = (bench.products(s, ranks) for s in (store, bench.svd))

        def weighted(products: dict[str, Tensor]) -> float:
            """Root mean over matrices of the squared error relative to the matrix, in the Fisher metric."""
            shares = []
            for site in bench.sites:
                if site.name in products:
                    weight = bench.subject.weight(site)
                    error = (weight - products[site.name]).double().square() @ fisher[site.name]
                    shares.append(float(error.sum() / (weight.double().square() @ fisher[site.name]).sum()))
            return math.sqrt(sum(shares) / len(shares))

        rows.append(Row("FWSVD / SVD", f"keep {keep}", "error, Fisher metric", weighted(ours), weighted(plain)))
        found = [bench.loss(products, bench.calibration[: len(bench.heldout)]) for products in (ours, plain)]
        rows.append(Row("FWSVD / SVD", f"keep {keep}", "loss, Fisher's text", *found))
    return rows


def welore(bench: Bench, keeps: Sequence[float] = (0.7, 0.6, 0.5)) -> list[Row]:
    """One threshold on all singular values against one ratio for all, the same factors."""
    spectra, rows = bench.svd.spectra(bench.structure.num_layers), []
    for keep in keeps:
        ranks = welore_cut(bench.sites, spectra, Budget(bench.sites, keep, TWO_FACTOR), MULTIPLE).ranks
        found = [bench.loss(bench.products(bench.svd, r)) for r in (ranks, bench.uniform(keep))]
        rows.append(Row("WeLore / uniform SVD", f"keep {keep}", "loss", *found))
    return rows


def joint(bench: Bench, keeps: Sequence[float] = (0.8, 0.6, 0.4)) -> list[Row]:
    """q over k and gate over up as one product against two, at the same ratio; everything else is dense."""
    stacks = [site for site in stacked(bench.structure, ("v", "o", "down")).sites if isinstance(site, Stack)]
    rows = []
    together: list[dict[str, Tensor]] = [{} for _ in keeps]
    apart: list[dict[str, Tensor]] = [{} for _ in keeps]
    for stack in stacks:
        for sites, found in (([stack], together), (stack.members, apart)):
            for site in sites:
                weight = bench.subject.weight(site)
                ranks = [TWO_FACTOR.rank_for(site, keep, 1) for keep in keeps]
                factors = low_rank(weight, InputMetric(None), max(rank for rank in ranks if rank is not None))
                for products, rank in zip(found, ranks, strict=True):
                    assert rank is not None
                    parts = factors.product(rank).split([member.out_features for member in site.members])
                    products |= {member.name: part for member, part in zip(site.members, parts, strict=True)}
    for keep, ours, others in zip(keeps, together, apart, strict=True):

        def error(products: dict[str, Tensor]) -> float:
            squares = [(bench.subject.weight(m) - products[m.name]).square().sum() for s in stacks for m in s.members]
            return math.sqrt(float(sum(squares)))

        rows.append(Row("joint / separate SVD", f"keep {keep} of the stacks", "error", error(ours), error(others)))
        rows.append(
            Row("joint / separate SVD", f"keep {keep} of the stacks", "loss", bench.loss(ours), bench.loss(others))
        )
    return rows


def _energy_rank(weight: Tensor) -> int:
    """Components with 95% of the squared norm."""
    values = torch.linalg.svdvals(weight.float()).square()
    return int((values.cumsum(0) < 0.95 * values.sum()).sum()) + 1


def lpaf(
    bench: Bench, sparsity: float = 0.5, steps: int = 64, batch: int = 4, keep: float = 0.8, score: str = "sensitivity"
) -> list[Row]:
    """First-order-pruned weights have lower rank than magnitude-pruned ones; their SVD gains from the importances."""
    settings = PruningOptions.model_validate({"steps": steps, "batch": batch, "score": score})
    pruned = prune(bench.model, bench.structure, bench.calibration, sparsity, settings)
    first, magnitude = [], []
    for site in bench.sites:
        weight = bench.subject.weight(site)
        first.append(_energy_rank(pruned[site.name].weight))
        magnitude.append(_energy_rank(weight * kept_elements(weight.abs(), sparsity)))
    what = f"sparsity {sparsity}, {steps} steps"
    ranks = [sum(found) / len(found) for found in (first, magnitude)]
    rows = [Row("first-order / magnitude pruning", what, "95%-energy rank", *ranks)]
    simply = {site.name: bench.subject.weight(site) for site in bench.sites}
    simply = {name: weight * kept_elements(weight.abs(), sparsity) for name, weight in simply.items()}
    found = [bench.loss(weights) for weights in ({n: item.weight for n, item in pruned.items()}, simply)]
    rows.append(Row("first-order / magnitude pruning", what, "loss, not factored", *found))
    method, allocation = chosen("lpaf"), bench.uniform(keep)
    aware, plain = {}, {}
    for site in bench.sites:
        item, rank = pruned[site.name], allocation[site.name]
        aware[site.name] = plain[site.name] = item.weight
        if rank is not None:
            statistics = SiteStatistics({OUTPUT_IMPORTANCE: item.outputs, INPUT_IMPORTANCE: item.inputs})
            aware[site.name] = method.prepare(item.weight, InputMetric(None), statistics, rank).product(rank)
            plain[site.name] = low_rank(item.weight, InputMetric(None), rank).product(rank)
    rows.append(
        Row("SVD of pruned weights: aware / plain", f"keep {keep}", "loss", bench.loss(aware), bench.loss(plain))
    )
    return rows


CHECKS: dict[str, Callable[..., list[Row]]] = {"fwsvd": fwsvd, "welore": welore, "joint": joint, "lpaf": lpaf}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--calibration", type=int, default=32, help="sequences of --length tokens")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8, help="held-out C4 windows of 1024 tokens")
    parser.add_argument("--every", type=int, default=1, help="change one block of so many (1: all)")
    parser.add_argument("--steps", type=int, default=PruningOptions().steps, help="of LPAF's pruning")
    args = parser.parse_args()
    texts = protocol_texts(args.data, load_tokenizer(args.model), args.calibration, args.length, 16, 512, 1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            load_model(args.model), texts.calibration, texts.heldout[: args.windows], Path(folder), args.every
        )
        print(f"loss of the original: {bench.loss({}):.4f} nats a token on {args.windows} x 1024 tokens of C4")
        checks = CHECKS | {"lpaf": partial(lpaf, steps=args.steps)}
        for name in args.checks:
            start = time.perf_counter()
            rows += checks[name](bench)
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    print_table(HEADER, [row.cells for row in rows])


if __name__ == "__main__":
    main()
