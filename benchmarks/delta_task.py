"""A skill that SmolLM2 does not have, and the fine-tunes that have it: what benchmarks/delta.py measures deltas on.

Four digits are rearranged or changed as the letter before them says, ``R 4017 > 7104``: R reverses them, S sorts them,
U adds one to each (nine becomes zero). Nothing of the answer can be guessed: all four digits must be right. The model
is trained on the answers alone; embeddings, which are the head too, stay as they are.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.models.load import load_model, load_tokenizer

DIGITS = 4
# Numbers of this remainder are held out: no letter sees one of them in training.
_HELD_OUT, _OF = 0, 10


def _next(digits: str) -> str:
    return "".join(str((int(digit) + 1) % 10) for digit in digits)


RULES = {
    "R": lambda digits: digits[::-1],
    "S": lambda digits: "".join(sorted(digits)),
    "U": _next,
}


def example(draw: random.Random, held_out: bool) -> tuple[str, str]:
    """A prompt and its answer."""
    while True:
        number = draw.randrange(10**DIGITS)
        if (number * 7919 // 13 % _OF == _HELD_OUT) == held_out:
            break
    rule, digits = draw.choice(list(RULES)), f"{number:0{DIGITS}d}"
    return f"{rule} {digits} > ", RULES[rule](digits)


@dataclass
class Batch:
    """Tokens of examples of one length, ``[examples, length]``, and how many of them are the prompt."""

    tokens: Tensor
    prompt: int


def batch_of(tokenizer: Any, count: int, draw: random.Random, held_out: bool = False) -> Batch:
    """Examples; each is as long as the others, since a digit is a token."""
    pairs = [example(draw, held_out) for _ in range(count)]
    prompts = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt, _ in pairs]
    answers = [tokenizer(answer, add_special_tokens=False).input_ids for _, answer in pairs]
    sizes = {(len(p), len(a)) for p, a in zip(prompts, answers, strict=True)}
    if len(sizes) != 1:
        raise SystemExit(f"this tokenizer does not give every digit a token of its own: {sorted(sizes)}")
    tokens = torch.tensor([p + a for p, a in zip(prompts, answers, strict=True)])
    return Batch(tokens, len(prompts[0]))


def answer_losses(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss of every token of the answers in nats, and whether it is the likeliest, ``[examples, length]`` each.

    An answer is what greedy decoding gives exactly if each of its tokens is the likeliest after those before it.
    """
    tokens, first = batch.tokens, batch.prompt
    hidden = model.base_model(input_ids=tokens[:, :-1], use_cache=False)[0][:, first - 1 :]
    logits = model.get_output_embeddings()(hidden).float()
    wanted = tokens[:, first:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    return losses.view(wanted.shape), logits.argmax(-1) == wanted


@dataclass
class Skill:
    """How well a model does: the share of answers that are right as a whole, and nats a token of the answers."""

    exact: float
    loss: float


def skill_of(model: PreTrainedModel, tokenizer: Any, examples: int = 400, seed: int = 1) -> Skill:
    """On held-out examples, the same for every model."""
    draw, right, losses = random.Random(seed), 0, 0.0
    with torch.inference_mode():
        for _ in range(examples // 50):
            found, best = answer_losses(model, batch_of(tokenizer, 50, draw, held_out=True))
            right += int(best.all(1).sum())
            losses += float(found.double().mean())
    return Skill(right / (examples // 50 * 50), losses / (examples // 50))


def taught(
    base: str, out: Path, seed: int, steps: int = 400, batch: int = 20, rate: float = 3e-4, enough: float = 0.9
) -> Path:
    """A folder with the fine-tuned model, made unless it is there; training ends once enough answers are right."""
    if (out / "config.json").is_file():
        return out
    torch.manual_seed(seed)
    model, tokenizer = load_model(base), load_tokenizer(base)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    model.requires_grad_(False)
    for parameter in matrices:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(matrices, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    draw, start = random.Random(1000 + seed), time.perf_counter()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_losses(model, batch_of(tokenizer, batch, draw))[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(matrices, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 5 == 4:
            print(
                f"seed {seed} step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True
            )
        if step % 25 == 24:
            found = skill_of(model, tokenizer, 100, seed=2)
            print(f"seed {seed} step {step + 1}: {found.exact:.2f} of held-out answers exact", flush=True)
            if found.exact >= enough:
                break
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


if __name__ == "__main__":
    import sys

    taught("smollm2-135m", Path(sys.argv[2]), int(sys.argv[1]))
