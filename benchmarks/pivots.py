"""Which rows to keep in pivoted storage: those of a pivoted QR, or neighbours that need no index.

    python benchmarks/pivots.py --data DATA

Growth is the largest coefficient in absolute value; rounding errors grow by about as much. The error is that of the
product stored in bfloat16, relative to the product (bfloat16 factors, for comparison, beside it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bolaco.allocate.allocators.spectral import spectral_ranks
from bolaco.models.load import load_tokenizer
from bolaco.storage.budget import Budget
from bolaco.storage.pivot import pivot
from bolaco.storage.storage import STORAGES
from common import arguments, prepare, print_table, protocol_texts


def contiguous(expand: Tensor, reduce: Tensor, side: str) -> tuple[float, Tensor]:
    """Smallest growth over the first, middle and last run of r rows (columns), and that product in bfloat16."""
    tall, wide = (expand, reduce) if side == "rows" else (reduce.T, expand.T)
    size, rank = tall.shape
    best: tuple[float, Tensor] | None = None
    for start in sorted({0, (size - rank) // 2, size - rank}):
        kept = tall[start : start + rank]
        others = torch.cat([tall[:start], tall[start + rank :]])
        coefficients = torch.linalg.solve(kept.T, others.T).T
        growth = float(coefficients.abs().max())
        if best is None or growth < best[0]:
            rows = kept @ wide
            made = half(coefficients) @ half(rows)
            whole = torch.cat([made[:start], half(rows), made[start:]])
            best = growth, whole if side == "rows" else whole.T
    assert best is not None
    return best


def half(value: Tensor) -> Tensor:
    return value.bfloat16().double()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--gradients", type=int, default=24)
    parser.add_argument("--every", type=int, default=5, help="every so many layers")
    args = parser.parse_args()
    texts = protocol_texts(args.data, load_tokenizer(args.model), args.calibration, args.length, 16, 512, 1)
    prepared = prepare(args, texts.calibration, "kfac", 32, args.gradients, "pivoted")
    structure, store = prepared.structure, prepared.store
    budget = Budget(structure.sites, args.keep, STORAGES.get("pivoted"))
    ranks = spectral_ranks(structure.sites, store.spectra(structure.num_layers), budget, 8)
    found: dict[str, list[tuple[float, ...]]] = {}
    for layer in range(0, structure.num_layers, args.every):
        factors = store.load(layer)
        for site in structure.of_layer(layer):
            rank = ranks[site.name]
            if rank is None:
                continue
            item = factors[site.name]
            expand, reduce = item.expand_t[:rank].T.double(), item.reduce[:rank].double()
            product = expand @ reduce
            form = pivot(expand, reduce)
            rows, rest = (form.first, form.second) if form.side == "rows" else (form.second.T, form.first.T)
            stored = torch.cat([half(rows), half(rest) @ half(rows)])
            chosen = stored[form.order] if form.side == "rows" else stored.T[:, torch.argsort(form.order)]
            growth, run = contiguous(expand, reduce, form.side)
            errors = [float((x - product).norm() / product.norm()) for x in (chosen, run, half(expand) @ half(reduce))]
            found.setdefault(site.type, []).append((form.growth, growth, *errors))
    header = ["matrices", "growth, QR", "growth, contiguous", "error, QR", "error, contiguous", "error, two factors"]
    print(f"keep {args.keep}, every {args.every} layers; the largest of each type\n")
    print_table(header, [[name, *(max(column) for column in zip(*rows, strict=True))] for name, rows in found.items()])


if __name__ == "__main__":
    main()
