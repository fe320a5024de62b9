"""Does searching the policy behind closed-form ranks earn its time?

    python benchmarks/policy.py --data DATA

Seven factors on the estimated errors, one for each matrix type, and one that grows or shrinks with depth; ranks come in
closed form from the scaled errors. A Gaussian process (Optuna's GPSampler) proposes them, starting from all ones, which
is the closed form itself. Trials are compared on sequences of two kinds of text and stopped as soon as the paired
difference to the best trial is clear (racing). The result is judged on texts the search has not seen.
"""

from __future__ import annotations

import math
import time

import optuna
import torch
from torch import Tensor

from bolaco.allocate.allocators.spectral import spectral_ranks
from bolaco.allocate.search.elastic import ElasticModel
from bolaco.data.sources import TokenStream
from bolaco.evaluation.objective import Head, score
from bolaco.models.labels import TYPES
from bolaco.models.load import load_tokenizer
from bolaco.storage.budget import Budget, Ranks
from bolaco.storage.storage import STORAGES
from common import arguments, gap, prepare, print_table, protocol_texts


def policy_ranks(structure, spectra: dict[str, Tensor], budget: Budget, values: dict[str, float]) -> Ranks:
    """Ranks in closed form, the errors of each matrix multiplied by its type's factor and its depth's."""
    last = max(structure.num_layers - 1, 1)
    scaled = {}
    for site in structure.sites:
        depth = site.layer / last - 0.5
        scaled[site.name] = spectra[site.name] * math.exp(values[site.type] + values["depth"] * depth)
    return spectral_ranks(structure.sites, scaled, budget, 8)


def race(losses: list[float], best: list[float] | None) -> bool:
    """Whether these losses, sequence by sequence, are clearly above the best trial's."""
    if best is None or len(losses) < 3:
        return False
    difference = torch.tensor(losses) - torch.tensor(best[: len(losses)])
    return float(difference.mean()) > 2 * float(difference.std()) / math.sqrt(len(losses))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--gradients", type=int, default=24)
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    texts = protocol_texts(args.data, tokenizer, args.calibration, args.length, 6, 512, args.windows)
    other = TokenStream("pydoc", tokenizer).take(4, 512, "validation")
    validation = torch.stack([x for pair in zip(texts.validation[:4], other, strict=True) for x in pair])
    prepared = prepare(args, texts.calibration, "kfac", 32, args.gradients, "pivoted")
    structure, model = prepared.structure, prepared.model
    spectra = prepared.store.spectra(structure.num_layers)
    budget = Budget(structure.sites, args.keep, STORAGES.get("pivoted"))
    names = [*TYPES, "depth"]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=0, n_startup_trials=6))
    study.enqueue_trial(dict.fromkeys(names, 0.0))
    head, best, evaluated = Head(model), None, 0
    start = time.perf_counter()
    with ElasticModel(prepared.subject, prepared.store) as elastic:
        for _ in range(args.trials):
            trial = study.ask()
            values = {name: trial.suggest_float(name, -1.0, 1.0) for name in names}
            elastic.set_ranks(policy_ranks(structure, spectra, budget, values))
            losses: list[float] = []
            for sequence in validation:
                losses.append(float(score(model, head, sequence[None]).nll.sum()) / (len(sequence) - 1))
                evaluated += 1
                if race(losses, best):
                    break
            mean = sum(losses) / len(losses)
            if len(losses) == len(validation):
                best = losses if best is None or mean < sum(best) / len(best) else best
            elif best is not None:
                # What the rest would have been, had it differed as the first ones did.
                mean = sum(best) / len(best) + mean - sum(best[: len(losses)]) / len(losses)
            study.tell(trial, mean)
        seconds = time.perf_counter() - start
        whole = args.trials * len(validation)
        print(f"{args.trials} trials in {seconds:.0f} s; racing evaluated {evaluated} of {whole} sequences\n")
        rows: list[list[object]] = []
        dense: list[float] = []
        found = {"dense": None, "closed form": dict.fromkeys(names, 0.0), "best policy": study.best_params}
        for label, values in found.items():
            elastic.set_ranks({} if values is None else policy_ranks(structure, spectra, budget, values))
            judged = (validation, texts.wikitext, texts.heldout[: args.windows // 2])
            perplexities = [score(model, head, blocks).perplexity for blocks in judged]
            dense = dense or perplexities
            rows.append(
                [label, *(x for p, d in zip(perplexities, dense, strict=True) for x in (p, round(gap(p, d), 3)))]
            )
    print_table(["ranks", "searched on", "gap", "WikiText-2", "gap", "C4 held out", "gap"], rows)
    print("\n" + ", ".join(f"{name} {value:+.2f}" for name, value in study.best_params.items()))


if __name__ == "__main__":
    main()
