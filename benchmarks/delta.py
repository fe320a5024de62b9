"""What is left of a skill when its delta is made small: every method at equal bits, scales counted.

    python benchmarks/delta.py --data DATA --ratios 1/16,1/32 --seeds 0,1,2

SmolLM2 is fine-tuned on benchmarks/delta_task.py once for each seed (the tuned models are kept in the cache), and each
method makes its delta small. A row has the share of held-out answers that are right as a whole, the loss on their
tokens over that of the tuned model, and the loss on general text over that of the tuned model, in nats a token.
Calibration is general text (C4), as in the papers, not the task. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.data.sources import TokenStream
from bolaco.delta.method import DELTA_METHODS, DENSE_BITS, DeltaTask, FormStore
from bolaco.delta.pair import DeltaSubject, rest_of
from bolaco.delta.settings import DeltaCalibration
from bolaco.errors import BudgetError
from bolaco.evaluation.objective import Head, score
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model, load_tokenizer
from bolaco.models.observe import observed
from bolaco.models.structure import weight_of
from bolaco.progress import Reporter
from bolaco.work.folder import digest
from common import Ledger, arguments, median, print_table
from delta_task import Skill, skill_of, taught

METHODS = ("lowrank", "bitdelta", "ultradelta", "delta-come", "default")


class Bench:
    """One seed's pair, and what every method makes of its delta."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.folder = args.cache / f"delta-{seed}"
        self.tokenizer = load_tokenizer(args.model)
        tuned_folder = taught(args.model, args.cache / f"tuned-{seed}", seed, args.steps, enough=args.enough)
        self.base, self.tuned = load_model(args.model), load_model(str(tuned_folder))
        stream = TokenStream(str(args.data / "c4_sample.jsonl"), self.tokenizer)
        self.tokens = stream.take(args.sequences, args.seq_len, "calibration")
        self.text = stream.take(args.windows, 512, "evaluation")
        self.structure = observed(self.tuned, inspect_structure(self.tuned), self.tokens)
        self.subject = DeltaSubject(self.tuned, self.structure, self.base)
        rest = rest_of(self.base, self.tuned, self.structure, torch.float32)
        if rest.tensors:
            raise SystemExit(f"the task trains matrices alone, and {next(iter(rest.tensors))} differs")
        self.ledger = Ledger(args.cache / f"delta-{seed}.json")
        self.sizes = sum(site.size for site in self.structure.sites)

    def measured(self, model: PreTrainedModel) -> list[float]:
        """Exact match, loss on answers, loss on general text."""
        skill: Skill = skill_of(model, self.tokenizer, self.args.examples)
        found = score(model, Head(model), self.text)
        return [skill.exact, skill.loss, float(found.nll.sum()) / (found.predicted * len(found.nll))]

    def row(self, method: str, ratio: str, given: dict[str, Any]) -> list[float]:
        """Bits a number takes, and what the base with the delta does."""
        chosen = DELTA_METHODS.get(method)
        options = chosen.options(**given)
        share = Fraction(ratio)
        if method == "bitdelta":  # a bit for each number, and a size for each matrix: it has no other ratio
            share = Fraction(sum(8 * -(-s.size // 8) + 16 for s in self.structure.sites), DENSE_BITS * self.sizes)
        calibration = DeltaCalibration(source="c4", sequences=len(self.tokens), seq_len=self.tokens.shape[1])
        text = hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
        key = digest([method, str(share), options.model_dump(mode="json"), text])

        def folder(name: str, depends: Any) -> Path:
            return self.folder / f"{name}-{digest([depends, text])}"

        store = FormStore(self.folder / f"forms-{key}")
        task = DeltaTask(self.subject, share, self.tokens, calibration, store, folder, Reporter(), self.seed)
        chosen.compress(task, options)
        bits, before = 0, {}
        sites = {site.name: site for site in self.structure.sites}
        with torch.no_grad():
            for layer in range(task.layers):
                for name, form in store.load(layer).items():
                    site = sites[name]
                    weight: Tensor = weight_of(self.base.base_model.get_submodule(site.module))[slice(*site.rows)]
                    before[name] = weight.clone()
                    weight += form.dense()
                    bits += form.bits
        try:
            return [bits / self.sizes, *self.measured(self.base)]
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    site = sites[name]
                    weight_of(self.base.base_model.get_submodule(site.module))[slice(*site.rows)].copy_(weight)

    def rows(self, methods: list[str], ratios: list[str]) -> dict[str, list[float]]:
        """By method and ratio."""
        key = digest([self.args.sequences, self.args.seq_len, self.args.windows, self.args.examples])
        found: dict[str, list[float]] = {}
        for name, model in (("base", self.base), ("tuned", self.tuned)):
            found[name] = [0.0, *self.ledger.get(f"{name} {key}", lambda m=model: self.measured(m))]
        for ratio in ratios:
            for method in methods:
                name, _, words = method.partition(":")
                given = dict(word.split("=") for word in words.split(";") if word)
                label = f"{method} {'' if name == 'bitdelta' else ratio}".strip()
                try:
                    found[label] = self.ledger.get(f"{label} {key}", lambda n=name, r=ratio, g=given: self.row(n, r, g))
                except BudgetError as error:
                    print(f"{label}: {error}")
                    continue
                print(f"seed {self.seed} {label}: {found[label]}", flush=True)
        return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--ratios", default="1/16,1/32", help="of 16 bits a number")
    parser.add_argument("--seeds", default="0", help="of the fine-tuning, with commas between")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas; NAME:OPTION=VALUE;OPTION=VALUE")
    parser.add_argument("--steps", type=int, default=400, help="of the fine-tuning, at most")
    parser.add_argument("--enough", type=float, default=0.9, help="it ends when so many answers are right")
    parser.add_argument("--sequences", type=int, default=32, help="of calibration text")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8, help="of general text, 512 tokens each")
    parser.add_argument("--examples", type=int, default=400, help="held-out examples of the skill")
    args = parser.parse_args()
    all_rows = [
        Bench(args, int(seed)).rows(args.methods.split(","), args.ratios.split(",")) for seed in args.seeds.split(",")
    ]
    rows: list[list[object]] = []
    for name in all_rows[0]:
        values = [found[name] for found in all_rows if name in found]
        gaps = [[a - b for a, b in zip(found[name], found["tuned"])] for found in all_rows if name in found]
        rows.append(
            [
                name,
                f"{median([v[0] for v in values]):.4f}",
                " ".join(f"{v[1]:.3f}" for v in values),
                " ".join(f"{g[2]:+.4f}" for g in gaps),
                " ".join(f"{g[3]:+.4f}" for g in gaps),
            ]
        )
    print_table(["delta", "bits a number", "exact match", "answers, gap to tuned", "C4, gap to tuned"], rows)


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    main()
