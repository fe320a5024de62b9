"""What the statistics cost beyond the forward pass.

    python benchmarks/calibration.py --data DATA

On the same tokens, in one run, in turn: the bare forward pass of the decoder; bolaco's pass (block by block, one pooled
covariance for each input); and the naive way, a hook on every linear that forms its output covariance.
"""

from __future__ import annotations

import ctypes
import gc
import time
from contextlib import suppress

import torch

from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model, load_tokenizer
from bolaco.statistics.forward import BlockWalk, collect
from bolaco.statistics.moments import MOMENTS
from common import PeakMemory, arguments, median, print_table, protocol_texts


def bare(model, structure, blocks) -> None:
    with torch.no_grad():
        for rows in blocks.split(4):
            model.base_model(input_ids=rows, use_cache=False)


def ours(model, structure, blocks) -> None:
    walk = BlockWalk(model, structure, blocks, batch=4)
    for _ in range(structure.num_layers):
        collect(walk, [MOMENTS], groups=8)


def naive(model, structure, blocks) -> None:
    sums = {}

    def make(name):
        def hook(_, __, output):
            y = output.flatten(0, 1)
            if name not in sums:
                sums[name] = (torch.zeros(y.shape[1], y.shape[1]), torch.zeros(y.shape[1]))
            sums[name][0].addmm_(y.T, y)
            sums[name][1].add_(y.sum(0))

        return hook

    handles = [
        model.base_model.get_submodule(site.module).register_forward_hook(make(site.name)) for site in structure.sites
    ]
    try:
        bare(model, structure, blocks)
    finally:
        for handle in handles:
            handle.remove()


def give_back() -> None:
    """Memory that is not in use, to the system, where the C library can."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = load_model(args.model)
    structure = inspect_structure(model)
    tokenizer = load_tokenizer(args.model)
    blocks = protocol_texts(args.data, tokenizer, args.sequences, args.length, 1, 512, 1).calibration
    ways = {"bare forward": bare, "bolaco": ours, "naive hooks": naive}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, list[float]] = {name: [] for name in ways}
    bare(model, structure, blocks[:4])
    for _ in range(args.rounds):
        for name, way in ways.items():
            give_back()
            peak, start = PeakMemory(), time.perf_counter()
            before = peak.bytes()  # the mark is at what is resident now
            way(model, structure, blocks)
            seconds[name].append(time.perf_counter() - start)
            memory[name].append((peak.bytes() - before) / 1e6)
    print(f"{args.sequences} x {args.length} tokens, {torch.get_num_threads()} threads, {args.rounds} rounds in turn")
    rows = []
    for name, values in seconds.items():
        over = [a / b for a, b in zip(values, seconds["bare forward"])]
        over_naive = [a / b for a, b in zip(values, seconds["naive hooks"])]
        rows.append([name, median(values), median(over), median(over_naive), median(memory[name])])
    print_table(["pass", "seconds (median)", "over bare", "over naive", "peak above the model, MB"], rows)


if __name__ == "__main__":
    main()
