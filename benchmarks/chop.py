"""Layers removed and trained on, beside the same shape from a random start (arXiv 2305.14864), on the same tokens.

    python benchmarks/chop.py --data DATA --keep 0.5 --max-steps 40
    python benchmarks/chop.py --data DATA --keep 0.9 --patterns

The second compares where the removed layers were, before any training.
Tuned is on C4 documents 1001-1300; see common.TuningTexts. Results are remembered in --cache.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bolaco import api
from bolaco.checkpoint.info import read_any_info
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model, load_tokenizer
from bolaco.models.structure import parameter_limit
from bolaco.progress import Reporter
from bolaco.transform.chop import PATTERNS, ChopOptions, chop, plan
from common import Ledger, TuningTexts, arguments, gap, print_table


def patterns(args: argparse.Namespace, texts: TuningTexts) -> None:
    """What each pattern leaves, untrained."""
    ledger = Ledger(args.cache / f"chop-patterns-{Path(args.model).name}-{args.keep}-{args.windows}.json")
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    structure = inspect_structure(model)

    def measured(changed: Any) -> dict[str, float]:
        return texts.perplexities(changed, 1024, args.windows, tokenizer)

    dense: Any = ledger.get("dense", lambda: measured(model))
    rows: list[list[object]] = [["dense", structure.num_layers, dense["wikitext"], 0.0, dense["c4"], 0.0]]
    limit = parameter_limit(args.keep, sum(site.size for site in structure.sites))
    for pattern in PATTERNS:
        blocks = plan(structure, args.keep, limit, ChopOptions.model_validate({"pattern": pattern}))
        found: Any = ledger.get(pattern, lambda kept=blocks: measured(chop(model, structure, kept)))
        gaps = {text: gap(found[text], dense[text]) for text in ("wikitext", "c4")}
        rows.append([pattern, len(blocks), found["wikitext"], gaps["wikitext"], found["c4"], gaps["c4"]])
    print_table(["pattern", "blocks", "WikiText-2", "gap", "C4 held out", "gap"], rows)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--max-steps", type=int, default=40, help="of 2,048 tokens")
    parser.add_argument("--windows", type=int, default=8, help="of WikiText-2; half as many of C4")
    parser.add_argument("--pattern", choices=PATTERNS, default=ChopOptions().pattern)
    parser.add_argument("--patterns", action="store_true", help="all patterns at this keep ratio, nothing is trained")
    args = parser.parse_args()
    texts = TuningTexts(args.data)
    if args.patterns:
        patterns(args, texts)
        return
    name = f"{Path(args.model).name}-{args.keep}"
    ledger = Ledger(args.cache / f"chop-{name}-{args.max_steps}-{args.windows}.json")
    # The random start is the same for all patterns.
    chopped, fresh = args.cache / f"chopped-{name}-{args.pattern}", args.cache / f"chopped-{name}-random"
    if not chopped.exists():
        options = {"evaluation.windows": 4, "method.pattern": args.pattern}
        words = {"evaluation": texts.wikitext, "options": options, "dtype": "float32"}
        api.compress(args.model, keep=args.keep, out=chopped, preset="chop", reporter=Reporter(), **words)
    if not fresh.exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(chopped)).float().save_pretrained(fresh)
        load_tokenizer(args.model).save_pretrained(fresh)

    def tuned(source: Path) -> dict[str, Any]:
        out = source.with_name(f"{source.name}-tuned-{args.max_steps}")
        if not out.exists():
            words = {"max_steps": args.max_steps, "seq_len": 512, "batch": 4, "reporter": Reporter()}
            words |= {"evaluation": texts.held_out, "options": {"evaluation.windows": 4}}
            api.tune(str(source), "continued", texts.tuning, out, **words)
        record = read_any_info(out).tuning
        assert record is not None  # of a folder that was tuned
        return {**texts.perplexities(str(out), 1024, args.windows), "minutes": record.seconds["train"] / 60}

    rows: list[list[object]] = []
    for start, source in ((f"chopped, {args.pattern}", chopped), ("random start", fresh)):
        before: Any = ledger.get(start, lambda s=source: texts.perplexities(str(s), 1024, args.windows))
        after: Any = ledger.get(f"{start}, tuned", lambda s=source: tuned(s))
        rows.append([start, 0, before["wikitext"], before["c4"], ""])
        rows.append([f"{start}, continued", args.max_steps, after["wikitext"], after["c4"], after["minutes"]])
    print_table(["start", "steps", "WikiText-2", "C4 held out", "minutes"], rows)


if __name__ == "__main__":
    main()
