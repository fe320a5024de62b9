"""Layers removed and trained on, beside the same shape from a random start (arXiv 2305.14864), on the same tokens.

    python benchmarks/chop.py --data DATA --keep 0.5 --max-steps 40

Tuned is on C4 documents 1001-1300; see common.TuningTexts. Results are remembered in --cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bolaco import api
from bolaco.checkpoint.info import read_info
from bolaco.models.load import load_tokenizer
from bolaco.progress import Reporter
from common import Ledger, TuningTexts, arguments, print_table


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--max-steps", type=int, default=40, help="of 2,048 tokens")
    parser.add_argument("--windows", type=int, default=8, help="of WikiText-2; half as many of C4")
    args = parser.parse_args()
    texts = TuningTexts(args.data)
    name = f"{Path(args.model).name}-{args.keep}"
    ledger = Ledger(args.cache / f"chop-{name}-{args.max_steps}-{args.windows}.json")
    chopped, fresh = args.cache / f"chopped-{name}", args.cache / f"chopped-{name}-random"
    if not chopped.exists():
        words = {"evaluation": texts.wikitext, "options": {"evaluation.windows": 4}}
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
        record = read_info(out, compressed=False)["tuning"]
        return {**texts.perplexities(str(out), 1024, args.windows), "minutes": record["seconds"]["train"] / 60}

    rows: list[list[object]] = []
    for start, source in (("chopped", chopped), ("random start", fresh)):
        before: Any = ledger.get(start, lambda s=source: texts.perplexities(str(s), 1024, args.windows))
        after: Any = ledger.get(f"{start}, tuned", lambda s=source: tuned(s))
        rows.append([start, 0, before["wikitext"], before["c4"], ""])
        rows.append([f"{start}, continued", args.max_steps, after["wikitext"], after["c4"], after["minutes"]])
    print_table(["start", "steps", "WikiText-2", "C4 held out", "minutes"], rows)


if __name__ == "__main__":
    main()
