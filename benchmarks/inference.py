"""Speed of dense, two-factor and pivoted models as they are loaded and fused, side by side in one process.

    python benchmarks/inference.py
    python benchmarks/inference.py --hidden 2048 --intermediate 5632 --layers 4 --heads 32 --kv-heads 8

Every round takes one step of each model in turn, so that what else the machine does meets all of them; ratios are
medians over the rounds. "Over dense" is over the dense model in its own best layout, which is fused as well.
"To bytes" and "to MACs" are that ratio over what weights to read, or operations, alone would allow. ``--profile`` says
where the time of a step goes. Weights are random: speed does not depend on their values.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bolaco.layers import PivotedLinear, install_layers
from bolaco.models.find import inspect_structure, meta_model
from bolaco.models.load import load_config
from bolaco.runtime.fuse import fuse
from bolaco.runtime.product import PackedProduct, RowProduct
from bolaco.storage.storage import STORAGES
from common import median, print_table

PREFILL, PROMPT = 256, 32
# Operations of torch by what they are for.
PRODUCTS = ("mm", "addmm", "mv", "addmv", "bmm", "mkldnn_linear", "_linear_pointwise", "linear", "_mkl_linear")
MOVES = ("cat", "index_select", "copy_", "gather")


def config_of(args: argparse.Namespace):
    """SmolLM2-135M, or a model of the given width with few layers and hardly a vocabulary."""
    config = load_config(args.model)
    if args.hidden:
        config.hidden_size, config.intermediate_size = args.hidden, args.intermediate
        config.num_attention_heads, config.num_key_value_heads = args.heads, args.kv_heads
        config.head_dim = args.hidden // args.heads
        config.layer_types = None
        config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = 128, None, None, None
    if args.layers:
        config.num_hidden_layers = args.layers
    return config


def build(config, kind: str, keep: float, dtype: torch.dtype) -> nn.Module:
    """A model with every matrix at the same keep ratio, and random weights."""
    model = meta_model(config)
    if kind != "dense":
        structure, storage = inspect_structure(model), STORAGES.get(kind)
        matrices = {}
        for site in structure.sites:
            rank = storage.rank_for(site, keep, 8)
            entry = {"kind": kind, "out": site.out_features, "rank": rank, "bias": True}
            if kind == "pivoted":
                entry["side"] = "rows" if site.out_features <= site.in_features else "columns"
            if rank is not None:
                matrices[site.module] = entry
        with torch.device("meta"):
            install_layers(model.base_model, matrices)
    model = model.to(dtype).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    for module in model.modules():
        if isinstance(module, PivotedLinear):
            module.order.copy_(torch.randperm(len(module.order), generator=generator))
    rotary = model.base_model.rotary_emb
    fresh = type(rotary)(config)
    rotary.inv_freq.copy_(fresh.inv_freq)
    return model


def macs_of(model: nn.Module) -> int:
    """Multiplications of the matrices for one token, without the head."""
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    return sum(m.weight.numel() for m in linears)


def decoding(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    """One more token after a prompt, each time it is called."""
    cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    last = tokens[:, -1:]
    return lambda: model(input_ids=last, past_key_values=cache, use_cache=True)


def side_by_side(actions: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each action in each round, after one that is not counted; every other round goes backwards."""
    times: list[list[float]] = [[] for _ in actions]
    for index in range(rounds + 1):
        order = list(enumerate(actions))
        for which, action in order if index % 2 else reversed(order):
            start = time.perf_counter()
            action()
            if index:
                times[which].append(time.perf_counter() - start)
    return times


def ratio(times: list[float], reference: list[float]) -> float:
    """How much faster than the reference, as the median over the rounds."""
    return median([other / own for own, other in zip(times, reference, strict=True)])


def where_time_goes(action: Callable[[], object], steps: int = 8) -> dict[str, float]:
    """Milliseconds of one step in products, in moving numbers, and in everything else; and calls of torch."""
    action()
    start = time.perf_counter()
    for _ in range(steps):
        action()
    total = (time.perf_counter() - start) / steps
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            action()
    parts: dict[str, float] = defaultdict(float)
    calls = 0
    for event in seen.key_averages():
        name = event.key.rpartition("::")[2]
        kind = "products" if name in PRODUCTS else "moves" if name in MOVES else "other"
        parts[kind] += event.self_cpu_time_total / 1e3 / steps
        calls += event.count
    return {
        "step": 1e3 * total,
        "products": parts["products"],
        "moves": parts["moves"],
        # The profiler makes every call longer, so that the rest is what is left of an unwatched step.
        "rest": 1e3 * total - parts["products"] - parts["moves"],
        "calls": calls / steps,
    }


def call_costs(dtype: torch.dtype) -> dict[str, float]:
    """Microseconds of a product with one token and a matrix that is too small to take any: what a call costs."""
    weight, x = torch.ones(16, 16, dtype=dtype), torch.ones(1, 1, 16, dtype=dtype)
    found = {}
    for kind in (RowProduct, PackedProduct):
        made, times = kind(weight, None), []
        with torch.inference_mode():
            for _ in range(2000):
                start = time.perf_counter()
                made(x)
                times.append(time.perf_counter() - start)
        found[kind.__name__] = 1e6 * median(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kinds", nargs="+", default=["two-factor", "pivoted"])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="where the time of a decoding step goes")
    for name in ("hidden", "intermediate", "layers", "heads", "kv-heads"):
        parser.add_argument(f"--{name}", type=int)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, batch {args.batch}")
    for dtype in args.dtypes:
        table(args, dtype)


def table(args: argparse.Namespace, dtype: str) -> None:
    """All models in one number format."""
    variants: list[tuple[str, float, bool]] = [("dense", 1.0, False), ("dense", 1.0, True)]
    variants += [(kind, keep, fused) for keep in args.keep for kind in args.kinds for fused in (False, True)]
    tokens = torch.randint(0, 100, (args.batch, PREFILL), generator=torch.Generator().manual_seed(0))
    models, macs, size = [], [], []
    with torch.inference_mode(False), torch.no_grad():
        for kind, keep, fused in variants:
            model: Any = build(config_of(args), kind, keep, getattr(torch, dtype))
            macs.append(macs_of(model))
            size.append(sum(p.numel() * p.element_size() for p in model.parameters()))
            models.append(fuse(model) if fused else model)
    with torch.inference_mode():
        prompts = [lambda m=m: m.base_model(input_ids=tokens, use_cache=False) for m in models]
        prefill = side_by_side(prompts, max(args.rounds // 6, 3))
        steps = [decoding(m, tokens[:, :PROMPT]) for m in models]
        decode = side_by_side(steps, args.rounds)
    best = [min((1, 0), key=lambda i: median(times[i])) for times in (prefill, decode)]
    header = ["model", "keep", "form", "MACs", "bytes", "prefill", "over dense", "to MACs"]
    header += ["decode", "over dense", "to bytes"]
    rows: list[list[object]] = []
    for i, (kind, keep, fused) in enumerate(variants):
        count, share = macs[i] / macs[0], size[i] / size[0]
        row: list[object] = [kind, keep, "fused" if fused else "as loaded", count, share]
        over = ratio(prefill[i], prefill[best[0]])
        row += [args.batch * PREFILL / median(prefill[i]), over, over * count]
        over = ratio(decode[i], decode[best[1]])
        rows.append([*row, args.batch / median(decode[i]), over, over * share])
    calls = ", ".join(f"{name} {cost:.1f}" for name, cost in call_costs(getattr(torch, dtype)).items())
    print(f"\n{dtype}, microseconds of a call: {calls}")
    print(f"\n{dtype}, tokens per second\n")
    print_table(header, rows)
    if args.profile:
        print(f"\n{dtype}, milliseconds of a decoding step\n")
        with torch.inference_mode():
            found = [where_time_goes(step) for step in steps]
        names = ("step", "products", "moves", "rest", "calls")
        lines = [[*rows[i][:3], *(found[i][name] for name in names)] for i in range(len(rows))]
        print_table(["model", "keep", "form", *names], lines)
    del models, prompts, steps
    gc.collect()


if __name__ == "__main__":
    main()
