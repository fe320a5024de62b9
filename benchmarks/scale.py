"""Memory and seconds of a default run by the number of layers: does the one stay, does the other grow linearly?

Checkpoints are random, bfloat16, of LLaMA-2-7B's block (4096, 11008, 32 heads) with a small vocabulary, and are written
shard by shard. Every run is a process of its own. Resident memory counts the pages of files that the process looks at,
anonymous memory does not. Memory of other layers is a bound that was measured; seconds of other layers are
extrapolated by the line through the first and the last run.

    python benchmarks/scale.py --layers 2 4 8
    python benchmarks/scale.py --shape small --layers 2 4 8 --stream auto
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from bolaco import api
from bolaco.work.memory import largest_resident

SHAPES = {"7b": (4096, 11008, 32), "small": (1024, 2816, 8)}
VOCABULARY = 2048
EXTRAPOLATED = (32, 80)


def make_checkpoint(folder: Path, shape: str, layers: int) -> int:
    """Writes a random model, one shard a block; returns the bytes of its weights."""
    width, inner, heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    draw = torch.Generator().manual_seed(layers)

    def random_matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=draw) * columns**-0.5).bfloat16()

    places: dict[str, str] = {}
    size = 0
    shards = [f"model-{i:05d}-of-{layers + 1:05d}.safetensors" for i in range(1, layers + 2)]
    for i, shard in enumerate(shards):
        if i == layers:
            tensors = {
                "model.embed_tokens.weight": torch.randn(VOCABULARY, width, generator=draw).bfloat16(),
                "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
                "lm_head.weight": random_matrix(VOCABULARY, width),
            }
        else:
            at, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
            tensors = {f"{at}{name}_proj.weight": random_matrix(width, width) for name in "qkvo"}
            tensors |= {f"{mlp}{name}_proj.weight": random_matrix(inner, width) for name in ("gate", "up")}
            tensors[f"{mlp}down_proj.weight"] = random_matrix(width, inner)
            for name in ("input", "post_attention"):
                tensors[f"model.layers.{i}.{name}_layernorm.weight"] = torch.ones(width, dtype=torch.bfloat16)
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        size += sum(tensor.nbytes for tensor in tensors.values())
        places |= dict.fromkeys(tensors, shard)
        del tensors
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    pick = random.Random(0)
    (folder / "text.txt").write_text(" ".join(f"w{pick.randrange(1, VOCABULARY)}" for _ in range(60_000)))
    return size


def watched() -> dict[str, int]:
    """Starts to look at this process's memory twenty times a second; the largest values so far."""
    peaks = {"anonymous": 0}

    def look() -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peaks["anonymous"] = max(peaks["anonymous"], int(line.split()[1]) * 1024)
            time.sleep(0.05)

    threading.Thread(target=look, daemon=True).start()
    return peaks


def run_one(folder: Path, tokens: int, stream: str, effort: str) -> None:
    """One run in this process; its figures go to standard output as JSON."""
    peaks, start = watched(), largest_resident()
    options: dict[str, Any] = {
        "calibration.sequences": 4,
        "calibration.seq_len": tokens // 4,
        "calibration.batch": 1,
        "calibration.groups": 4,
        "validation.batch": 1,
        "evaluation.windows": 4,
        "stream": {"always": True, "never": False, "auto": None}[stream],
    }
    out = folder / "out"
    began = time.perf_counter()
    result = api.compress(
        str(folder),
        out=out,
        keep=0.8,
        effort=effort,
        calibration=str(folder / "text.txt"),
        options={name: value for name, value in options.items() if value is not None},
    )
    found = {
        "seconds": result.info.seconds,
        "total": time.perf_counter() - began,
        "resident": largest_resident(),
        "before": start,
        **peaks,
    }
    print("FIGURES " + json.dumps(found))


def measured(folder: Path, args: argparse.Namespace, layers: int) -> dict[str, Any]:
    """Figures of one number of layers, from a process of its own."""
    size = make_checkpoint(folder, args.shape, layers)
    command = [sys.executable, __file__, "--one", str(folder), "--tokens", str(args.tokens)]
    command += ["--stream", args.stream, "--effort", args.effort]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise SystemExit(f"{layers} layers: the run failed\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads(lines[-1].removeprefix("FIGURES "))
    return figures | {"bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, default=512, help="of calibration text, in four sequences")
    parser.add_argument("--stream", choices=("always", "never", "auto"), default="always")
    parser.add_argument("--effort", choices=("fast", "default", "best"), default="default")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made; a temporary folder by default")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_one(args.one, args.tokens, args.stream, args.effort)
        return
    rows: dict[int, dict[str, Any]] = {}
    for layers in args.layers:
        place = Path(tempfile.mkdtemp(prefix=f"scale-{layers}-", dir=args.folder))
        try:
            rows[layers] = measured(place, args, layers)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        show(layers, rows[layers])
    ratio(rows)


def show(layers: int, row: dict[str, Any]) -> None:
    """One run in two lines."""
    mb = {name: row[name] / 1e6 for name in ("bytes", "resident", "anonymous")}
    print(
        f"{layers} layers: {mb['bytes']:,.0f} MB of weights, peak resident {mb['resident']:,.0f} MB, "
        f"peak anonymous {mb['anonymous']:,.0f} MB, {row['total']:,.0f} s"
    )
    print("  seconds: " + ", ".join(f"{name} {value:,.1f}" for name, value in row["seconds"].items()), flush=True)


def ratio(rows: dict[int, dict[str, Any]]) -> None:
    """What the runs say of other numbers of layers."""
    if len(rows) < 2:
        return
    first, last = min(rows), max(rows)
    a, b = rows[first], rows[last]
    print(f"resident memory from {first} to {last} layers: {100 * (b['resident'] / a['resident'] - 1):+.1f} %")
    slope = (b["total"] - a["total"]) / (last - first)
    for layers in EXTRAPOLATED:
        seconds = a["total"] + slope * (layers - first)
        print(f"extrapolated to {layers} layers: {seconds / 3600:.2f} hours at this number of tokens")
    print(f"threads: {torch.get_num_threads()}, machine: {psutil.virtual_memory().total / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
