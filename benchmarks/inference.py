"""Speed of dense, two-factor and pivoted models, each beside the machine's own limit.

    python benchmarks/inference.py
    python benchmarks/inference.py --hidden 2048 --intermediate 5632 --layers 4 --heads 32 --kv-heads 8

Prefill is compared with what the matrices' floating-point operations would take at the speed of one large product,
decoding with what reading all weights once would take at the speed memory is read. Every model runs in a process of
its own, so that peak memory is its own. Weights are random: speed does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch
from torch import nn

from bolaco.evaluation.speed import decode_seconds, median_seconds
from bolaco.layers import PivotedLinear, install_layers
from bolaco.models.find import inspect_structure, meta_model
from bolaco.models.load import load_config
from bolaco.storage.storage import STORAGES
from common import print_table

PREFILL, DECODE = 256, 16


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


def limits(dtype: torch.dtype) -> dict[str, float]:
    """Operations per second of a large product, and bytes per second of reading weights that no cache holds."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    flops = 2 * 2048**3 / median_seconds(lambda: a @ b, 5)
    big, vector = torch.randn(8192, 16384).to(dtype), torch.randn(16384).to(dtype)
    read = big.numel() * big.element_size() / median_seconds(lambda: big @ vector, 5)
    total = big.view(torch.int32 if dtype == torch.float32 else torch.int16)
    streamed = big.numel() * big.element_size() / median_seconds(lambda: total.max(), 5)
    return {"flops": flops, "bytes": max(read, streamed)}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """The child process: one model, both batch sizes."""
    kind, keep, dtype = args.child[0], float(args.child[1]), getattr(torch, args.child[2])
    if kind == "limits":
        return limits(dtype)
    model = build(config_of(args), kind, keep, dtype)
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    result = {
        "macs": float(sum(m.weight.numel() for m in linears)),
        "bytes": float(sum(p.numel() * p.element_size() for p in model.parameters())),
        "head": float(model.get_output_embeddings().weight.numel()),
    }
    with torch.inference_mode():
        for batch in (1, 8):
            tokens = torch.randint(0, 100, (batch, PREFILL), generator=torch.Generator().manual_seed(0))
            run = lambda t=tokens: model.base_model(input_ids=t, use_cache=False)  # noqa: E731
            result[f"prefill {batch}"] = batch * PREFILL / median_seconds(run, args.repeats)
            result[f"decode {batch}"] = batch / decode_seconds(model, tokens[:, :32], DECODE)
    result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return result


def child(args: argparse.Namespace, *words: object) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", *map(str, words)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    for name in ("hidden", "intermediate", "layers", "heads", "kv-heads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    header = ["model", "keep", "MACs"]
    for batch in (1, 8):
        header += [f"prefill x{batch}", "over dense", "of limit", f"decode x{batch}", "over dense", "of limit"]
    header += ["weights, MB", "peak, MB"]
    for dtype in args.dtypes:
        machine = child(args, "limits", 1, dtype)
        print(f"\n{dtype}: {machine['flops'] / 1e9:.0f} GFLOP/s, {machine['bytes'] / 1e9:.1f} GB/s\n")
        kinds = [("dense", 1.0)] + [(kind, keep) for keep in args.keep for kind in ("two-factor", "pivoted")]
        results = [child(args, kind, keep, dtype) for kind, keep in kinds]
        dense, rows = results[0], []
        for (kind, keep), found in zip(kinds, results, strict=True):
            row: list[object] = [kind, keep, found["macs"] / dense["macs"]]
            for batch in (1, 8):
                prefill, step = found[f"prefill {batch}"], found[f"decode {batch}"]
                # Prefill needs no logits here; a decoding step reads every weight once for the whole batch.
                best = machine["flops"] / (2 * found["macs"])
                fastest = batch * machine["bytes"] / found["bytes"]
                row += [prefill, prefill / dense[f"prefill {batch}"], prefill / best]
                row += [step, step / dense[f"decode {batch}"], step / fastest]
            rows.append([*row, found["bytes"] / 1e6, found["peak"] / 1e6])
        print_table(header, rows)


if __name__ == "__main__":
    main()
