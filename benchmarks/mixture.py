"""A small mixture of experts, trained here on Python's own documentation, compressed in several ways.

    python benchmarks/mixture.py --out FOLDER [--steps 500] [--keep 0.7]

The trained model stays in FOLDER, and is found there again. 4 blocks of width 128, 8 experts of which 2 take each
token. Perplexity on the last tenth of the text, which neither training nor calibration sees.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from bolaco import api
from bolaco.data.sources import read_documents
from bolaco.models.load import load_model, load_tokenizer
from bolaco.report.tables import experts_table

VOCABULARY, LENGTH = 2048, 128
# Label -> words of `bolaco compress`.
RUNS = {
    "SVD, two factors, one ratio": {"method": "svd", "storage": "two-factor", "search": "uniform"},
    "SVD, two factors": {"method": "svd", "storage": "two-factor", "search": "spectral"},
    "SVD, one input factor for all experts": {"method": "svd", "storage": "shared", "search": "spectral"},
    "SVD-LLM, two factors": {"method": "svd-llm", "storage": "two-factor", "search": "spectral"},
    "SVD-LLM, one input factor for all experts": {"method": "svd-llm", "storage": "shared", "search": "spectral"},
    "K-FAC, two factors": {
        "method": "kfac",
        "storage": "two-factor",
        "search": "spectral",
        "options": {"search.shared_experts": False},
    },
    "K-FAC, two factors, the cheaper form": {"method": "kfac", "storage": "two-factor", "search": "spectral"},
    "K-FAC, one input factor for all experts": {"method": "kfac", "storage": "shared", "search": "spectral"},
    "K-FAC, pivoted, each expert its own": {
        "method": "kfac",
        "storage": "pivoted",
        "search": "spectral",
        "options": {"search.shared_experts": False},
    },
    "K-FAC, pivoted, the cheaper form": {"method": "kfac", "storage": "pivoted", "search": "spectral"},
}


def texts(folder: Path) -> tuple[Path, Path]:
    """The text to learn from and calibrate on, and that to measure on."""
    files = folder / "learn.txt", folder / "measure.txt"
    if not files[0].exists():
        found = list(read_documents("pydoc"))
        joined = "\n\n".join(found)
        cut = len(joined) * 9 // 10
        files[0].write_text(joined[:cut], encoding="utf-8")
        files[1].write_text(joined[cut:], encoding="utf-8")
    return files


def tokenizer(text: str) -> PreTrainedTokenizerFast:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    model.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")


def train(folder: Path, steps: int) -> Path:
    """The model, trained and saved, or as it was found."""
    place = folder / "model"
    if place.exists():
        return place
    text = texts(folder)[0].read_text(encoding="utf-8")
    words = tokenizer(text)
    tokens = torch.tensor(words(text, verbose=False).input_ids)
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=256,
            output_router_logits=True,
            router_aux_loss_coef=0.02,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    warm = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        at = torch.randint(0, len(tokens) - LENGTH, (12,), generator=generator)
        batch = torch.stack([tokens[i : i + LENGTH] for i in at])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {float(loss.detach()):.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(place)
    words.save_pretrained(place)
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--keep", type=float, default=0.7)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    place = train(args.out, args.steps)
    learn, measure = texts(args.out)
    model, words = load_model(str(place)), load_tokenizer(str(place))
    options = {
        "calibration.seq_len": LENGTH,
        "calibration.sequences": 128,
        "calibration.gradient_sequences": 64,
        "evaluation.source": str(measure),
        "evaluation.windows": 64,
        "search.rank_multiple": 4,
    }
    print(
        "| K | ppl | gap (nats) | kept | active kept | stacks on one input factor | seconds |"
        "\n|---|---:|---:|---:|---:|---:|---:|"
    )
    dense = None
    for label, run in {**RUNS, "the default: K-FAC, pivoted, refined": {}}.items():
        name = "".join(c if c.isalnum() else "-" for c in label)
        words_of = dict(run)
        more = words_of.pop("options", {}) | ({} if not run else {"refinement.steps": 0})
        start = time.perf_counter()
        result = api.compress(
            model,
            args.keep,
            args.out / f"{name}-{args.keep}",
            tokenizer=words,
            preset="default",
            calibration=str(learn),
            options=options | more,
            **words_of,
        )
        info, seconds = result.info, time.perf_counter() - start
        if dense is None:
            dense = info.perplexity.dense
            print(f"| dense | {dense:.2f} | | 1 | 1 | | |")
        gap = math.log(info.perplexity.compressed / info.perplexity.dense)
        active = info.parameters_active / info.parameters_active_dense
        print(
            f"| {label} | {info.perplexity.compressed:.2f} | {gap:.3f} | {info.keep_linears:.4f} | {active:.4f} | "
            f"{len(info.stacks)} | {seconds:.0f} |",
            flush=True,
        )
    from rich.console import Console

    Console().print(experts_table(info.tokens_per_expert))


if __name__ == "__main__":
    main()
