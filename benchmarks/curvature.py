"""The two-sided metric with closed-form ranks, in two factors (`--preset kfac-svd`) and in pivoted storage.

    python benchmarks/curvature.py --data DATA --keep 0.8

The protocol and the evaluation text of allocation.py, on a quarter of its calibration tokens by default.
"""

from __future__ import annotations

import time

from bolaco.allocate.allocators.spectral import spectral_ranks
from bolaco.models.load import load_tokenizer
from bolaco.storage.storage import STORAGES
from common import Budget, Ledger, arguments, gap, prepare, print_table, protocol_texts


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8])
    parser.add_argument("--calibration", type=int, default=64, help="sequences of --length tokens")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--gradients", type=int, default=24, help="of these, sequences for the loss gradients")
    parser.add_argument("--windows", type=int, default=64)
    args = parser.parse_args()
    texts = protocol_texts(args.data, load_tokenizer(args.model), args.calibration, args.length, 16, 512, args.windows)
    heldout = texts.heldout[: args.windows // 4]
    start = time.perf_counter()
    prepared = prepare(args, texts.calibration, "kfac", gradients=args.gradients, storage="pivoted")
    print(f"statistics and factors: {time.perf_counter() - start:.0f} s")
    sites = prepared.structure.sites
    spectra = prepared.store.spectra(prepared.structure.num_layers)
    ledger = Ledger(args.cache / f"curvature-{args.calibration}-{args.length}-{args.gradients}-{args.windows}.json")
    dense = [
        ledger.get(f"dense {n}", lambda b=b: prepared.perplexity({}, b))
        for n, b in (("wikitext", texts.wikitext), ("c4", heldout))
    ]
    rows = [["dense", 1.0, dense[0], 0.0, dense[1], 0.0]]
    for keep in args.keep:
        for storage in ("two-factor", "pivoted"):
            budget = Budget(sites, keep, STORAGES.get(storage))
            ranks = spectral_ranks(sites, spectra, budget, 8)
            a, b = (
                ledger.get(f"{keep} {storage} {n}", lambda b=b, r=ranks: prepared.perplexity(r, b))
                for n, b in (("wikitext", texts.wikitext), ("c4", heldout))
            )
            rows.append([f"kfac, spectral, {storage}", budget.ratio(ranks), a, gap(a, dense[0]), b, gap(b, dense[1])])
    print_table(["allocation", "keep (linears)", "WikiText-2", "gap", "C4 held out", "gap"], rows)


if __name__ == "__main__":
    main()
