"""Weights coded into tables: perplexity and size beside rounding to nearest, before and after the tables are tuned.

    python benchmarks/sketch.py --data DATA --bits 3 --max-steps 40

Calibrated and tuned is on C4 documents 1001-1300; see common.TuningTexts. Results are remembered in --cache.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bolaco import api
from bolaco.checkpoint.info import read_any_info
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model, load_tokenizer
from bolaco.models.subject import Subject
from bolaco.progress import Reporter
from common import Ledger, TuningTexts, arguments, gap, print_table

MIB = 2**20


def rounded(weight: Tensor, bits: int) -> Tensor:
    """To nearest, on an even grid from the least to the greatest number of each row."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    step = (high - low).clamp_min(1e-12) / (2**bits - 1)
    return low + step * ((weight - low) / step).round()


def same_tensors(before: Path, after: Path) -> tuple[int, int]:
    """Tensors that are not tables (codes, norms, ..): how many are the same bit for bit, and how many there are."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    names = [name for name in old if not name.endswith(".lut")]
    if not any(name.endswith(".codes") for name in names):
        raise SystemExit(f"{before}: no codes")
    return sum(torch.equal(old[name], new[name]) for name in names), len(names)


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.texts = args, TuningTexts(args.data)

    def perplexities(self, model: str) -> dict[str, float]:
        return self.texts.perplexities(model, 1024, self.args.windows)

    def to_nearest(self, bits: int) -> dict[str, float]:
        """All decoder matrices rounded, each row with a grid of its own: two numbers, where a table has 2^bits."""
        model = load_model(self.args.model, "float32")
        subject = Subject(model, inspect_structure(model))
        with torch.no_grad():
            for site in subject.structure.sites:
                weight = subject.weight(site)  # a view
                weight.copy_(rounded(weight, bits))
        folder = self.args.cache / "nearest.tmp"
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        load_tokenizer(self.args.model).save_pretrained(folder)
        found = self.perplexities(str(folder))
        shutil.rmtree(folder)
        return found

    def tuned(self, source: str, out: Path, **words: Any) -> dict[str, Any]:
        """Mode ``sketch``; a source that is coded keeps its codes."""
        if not out.exists():
            options = {"evaluation.windows": 4, "training.warmup": 0.1} | words.pop("options", {})
            words |= {"seq_len": 512, "batch": 4, "evaluation": self.texts.held_out, "reporter": Reporter()}
            api.tune(source, "sketch", self.texts.tuning, out, options=options, **words)
        record = read_any_info(out).tuning
        assert record is not None  # of a folder that was tuned
        return {
            **self.perplexities(str(out)),
            "bytes": record.bytes,
            "trained": record.trainable_parameters,
            "minutes": {name: record.seconds[name] / 60 for name in ("prepare", "train")},
            "same": None if source == self.args.model else same_tensors(Path(source), out),
        }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens, to code on")
    parser.add_argument("--max-steps", type=int, default=40, help="of 2,048 tokens")
    parser.add_argument("--windows", type=int, default=8, help="of WikiText-2; half as many of C4")
    args = parser.parse_args()
    bench = Bench(args)
    ledger = Ledger(
        args.cache / f"sketch-{Path(args.model).name}-{args.sequences}-{args.max_steps}-{args.windows}.json"
    )
    dense: Any = ledger.get("dense", lambda: bench.perplexities(args.model))
    size = sum(p.numel() * p.element_size() for p in load_model(args.model).parameters())
    rows: list[list[object]] = [["dense", dense["wikitext"], 0, dense["c4"], 0, size / MIB, "", ""]]

    def row(name: str, found: dict[str, Any], minutes: object = "") -> None:
        gaps = [round(gap(found[text], dense[text]), 4) for text in ("wikitext", "c4")]
        more = [found["bytes"] / MIB if "bytes" in found else "", found.get("trained", ""), minutes]
        rows.append([name, found["wikitext"], gaps[0], found["c4"], gaps[1], *more])

    for bits in args.bits:
        coded = args.cache / f"sketch-coded-{Path(args.model).name}-{bits}-{args.sequences}"
        options = {"options.bits": bits, "data.sequences": None, "options.sequences": args.sequences}
        nearest: Any = ledger.get(f"nearest {bits}", lambda b=bits: bench.to_nearest(b))
        # A step that changes nothing: what coding alone gives.
        words = {"max_steps": 1, "learning_rate": 1e-12, "options": options}
        before: Any = ledger.get(f"coded {bits}", lambda c=coded, w=words: bench.tuned(args.model, c, **w))
        after: Any = ledger.get(
            f"tuned {bits}",
            lambda c=coded, b=bits: bench.tuned(
                str(c),
                c.with_name(f"{c.name}-tuned-{args.max_steps}"),
                max_steps=args.max_steps,
                options={"options.bits": b},
            ),
        )
        row(f"{bits} bits, to nearest", nearest)
        row(f"{bits} bits, coded", before, before["minutes"]["prepare"])
        row(f"{bits} bits, tables tuned", after, after["minutes"]["train"])
        same, count = after["same"]
        print(
            f"{bits} bits: {same} of {count} tensors that are not tables are bit for bit what they were before tuning"
        )
    print_table(["model", "WikiText-2", "gap", "C4 held out", "gap", "MiB", "trained", "minutes"], rows)


if __name__ == "__main__":
    main()
