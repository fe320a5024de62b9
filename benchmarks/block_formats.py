"""Bytes and loss of a model and its compressed results, as they are and quantized: what a smaller file costs each way.

    python benchmarks/block_formats.py --data DATA --results small smaller

Weights are rounded to the block formats of GGUF files (groups of 32 along the input: Q8_0 with 8.5 bits a weight, Q4_0
with 4.5) and computed with as float32. All matrices are, the embedding always to Q8_0; vectors stay. Perplexity on the
windows of the other benchmarks. The source of the default model is a Q4_1 file, so its own four bits cost nothing here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import nn
from transformers import PreTrainedModel

from bolaco.evaluation.objective import Head, score
from bolaco.models.load import load_model, load_tokenizer
from common import Ledger, arguments, gap, print_table, protocol_texts

FORMATS = {"Q8_0": GGMLQuantizationType.Q8_0, "Q4_0": GGMLQuantizationType.Q4_0}
_GROUP = 32


def rounded(weight: torch.Tensor, kind: GGMLQuantizationType) -> tuple[torch.Tensor, int]:
    """A matrix as the format has it, and its bytes; rows are filled up to whole groups."""
    rows = weight.detach().float().numpy()
    filled = np.pad(rows, ((0, 0), (0, -rows.shape[1] % _GROUP)))
    packed = quants.quantize(filled, kind)
    return torch.from_numpy(quants.dequantize(packed, kind)[:, : rows.shape[1]].copy()), packed.nbytes


def size(model: PreTrainedModel, itemsize: int) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * itemsize for p in model.parameters())


def quantize(model: PreTrainedModel, name: str) -> int:
    """Rounds the matrices of a model in place; returns the bytes of all parameters, vectors in 16 bits."""
    matrices = {id(m.weight): (m.weight, isinstance(m, nn.Embedding)) for m in model.modules() if _has_matrix(m)}
    total = sum(2 * p.numel() for p in model.parameters() if id(p) not in matrices)
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for key, (weight, _) in matrices.items():
        value, taken = rounded(weight, FORMATS["Q8_0" if key in tied else name])
        weight.data.copy_(value)
        total += taken
    return total


def _has_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding)


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--results", nargs="*", default=[], help="folders of compressed models")
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    texts = protocol_texts(args.data, load_tokenizer(args.model), 1, 512, 16, 512, args.windows)
    measured = {"wikitext": texts.wikitext, "c4": texts.heldout[: args.windows // 2]}
    ledger = Ledger(args.cache / f"block-formats-{args.windows}.json")

    def measure(place: str, form: str) -> dict[str, float]:
        model = load_model(place, dtype="float32")
        itemsize = {"float32": 4, "bfloat16": 2}.get(form)
        if form == "bfloat16":
            for parameter in model.parameters():
                parameter.data.copy_(parameter.data.bfloat16())
        taken = size(model, itemsize) if itemsize else quantize(model, form)
        head = Head(model)
        return {"MiB": taken / 2**20} | {name: score(model, head, text).perplexity for name, text in measured.items()}

    rows, dense = [], None
    for place in [args.model, *args.results]:
        for form in ("float32", "bfloat16", *FORMATS):
            found = ledger.get(f"{Path(place).name} {form}", lambda p=place, f=form: measure(p, f))
            dense = dense or found
            gaps = [round(gap(found[text], dense[text]), 3) for text in measured]
            rows.append([Path(place).name, form, round(found["MiB"]), *gaps])
            print(rows[-1], flush=True)
    print_table(["model", "weights", "MiB", "WikiText-2, gap", "C4 held out, gap"], rows)


if __name__ == "__main__":
    main()
