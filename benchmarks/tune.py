"""What tuning a compressed model brings: each mode on the same text, steps and evaluation.

    python benchmarks/tune.py SMALL --data DATA --max-steps 300
    python benchmarks/tune.py SMALL --data DATA --minutes 30 --only diagonal factors

SMALL is a folder that `bolaco compress` wrote from a model calibrated on C4 documents 1-1000. Tuned is on documents
1001-1300, and held out are the last 180; no document serves two purposes. Results are remembered in --cache, and a
run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

from bolaco import api
from bolaco.checkpoint.info import read_any_info, read_info
from bolaco.progress import Reporter
from bolaco.tune.mode import MODES
from common import Ledger, TuningTexts, gap, print_table

# Name -> mode and settings. Modes that are not named here run with their defaults.
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "diagonal, distilled": ("diagonal", {"distillation.weight": 1.0}),
    "factors, distilled": ("factors", {"distillation.weight": 1.0}),
    "factors and norms, distilled": ("factors", {"distillation.weight": 1.0, "options.norms": True}),
    "lora, distilled": ("lora", {"distillation.weight": 1.0}),
    "continued, distilled": ("continued", {"distillation.weight": 1.0}),
}


def variants(only: list[str] | None) -> dict[str, tuple[str, dict[str, Any]]]:
    every: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in MODES.names()} | NAMED
    return {name: value for name, value in sorted(every.items()) if not only or name.startswith(tuple(only))}


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.texts = TuningTexts(args.data)

    def perplexities(self, model: str) -> dict[str, float]:
        return self.texts.perplexities(model, self.args.window, self.args.windows)

    def run(self, name: str, mode: str, options: dict[str, Any]) -> dict[str, float]:
        args = self.args
        out = args.cache / "".join(c if c.isalnum() else "-" for c in f"tuned-{args.folder.name}-{name}-{self.key}")
        if out.exists():  # written before its perplexities were in the ledger
            info = read_any_info(out)
        else:
            words = {"max_steps": args.max_steps, "minutes": args.minutes, "seq_len": args.length, "batch": args.batch}
            words |= {"evaluation": self.texts.held_out, "reporter": Reporter()}
            given = {"evaluation.windows": 4, "training.gradient_accumulation": args.accumulation} | options
            result = api.tune(str(args.folder), mode, self.texts.tuning, out, options=given, **words)
            assert result is not None
            info = result.info
        record = info.tuning
        assert record is not None  # of a folder that was tuned
        found = {
            "parameters": record.trainable_parameters,
            "steps": record.steps,
            "minutes": record.seconds["train"] / 60,
            **self.perplexities(str(out)),
        }
        if not args.keep:
            shutil.rmtree(out)
        return found

    @property
    def key(self) -> str:
        args = self.args
        sizes = (args.max_steps, args.minutes, args.length, args.batch, args.accumulation, args.window, args.windows)
        return "-".join(map(str, sizes))


def closed(after: float, before: float, dense: float) -> float:
    """Share of the gap in log-perplexity that is closed."""
    return gap(before, after) / gap(before, dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a compressed model")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with c4_sample.jsonl and wikitext2_raw_test.txt"
    )
    parser.add_argument("--cache", type=Path, default=Path("benchmark-cache.work"), help="results are kept here")
    parser.add_argument("--only", nargs="+", help="variants whose names begin so")
    parser.add_argument("--max-steps", type=int, help="of each variant")
    parser.add_argument("--minutes", type=float, help="of training of each variant")
    parser.add_argument("--length", type=int, default=512, help="tokens of a training sequence")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--window", type=int, default=1024, help="tokens of an evaluation window")
    parser.add_argument("--windows", type=int, default=16, help="of WikiText-2; half as many of C4")
    parser.add_argument("--keep", action="store_true", help="keep the tuned folders in --cache")
    parser.add_argument("--measured", action="store_true", help="print what has been measured, compute nothing")
    args = parser.parse_args()
    if args.max_steps is None and args.minutes is None:
        parser.error("one of --max-steps and --minutes is needed")
    bench = Bench(args)
    ledger = Ledger(args.cache / f"tune-{args.folder.name}-{bench.key}.json")
    if not args.measured:
        original = read_info(args.folder).model
        ledger.get("dense", lambda: bench.perplexities(original))
        ledger.get("compressed", lambda: bench.perplexities(str(args.folder)))
    dense, before = (ledger.values[name]["value"] for name in ("dense", "compressed"))
    rows: list[list[object]] = [
        [name, "", "", "", found["wikitext"], found["c4"], *[""] * 4]
        for name, found in (("dense", dense), ("compressed", before))
    ]
    for name, (mode, options) in variants(args.only).items():
        if args.measured and name not in ledger.values:
            continue
        found = ledger.get(name, lambda n=name, m=mode, o=options: bench.run(n, m, o))
        millions = found["parameters"] / 1e6
        shares = [closed(found[text], before[text], dense[text]) for text in ("wikitext", "c4")]
        both = math.fsum(shares) / 2
        row = [name, round(millions, 3), found["steps"], round(found["minutes"], 2), found["wikitext"], found["c4"]]
        rows.append([*row, *(round(s, 3) for s in shares), both / millions, both / found["minutes"]])
    header = ["mode", "trained, M", "steps", "minutes", "WikiText-2", "C4 held out"]
    header += ["gap closed, WikiText-2", "gap closed, C4", "a million trained", "a minute"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
