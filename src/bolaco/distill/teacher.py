"""The teacher: a frozen causal language model with soft prompts in front of what it reads or writes.

A soft prompt is a few vectors in the place of embedded tokens (prompt tuning, arXiv 2104.08691). They are tensors here
and not PEFT modules, because one batch mixes the prompts of several labels; :func:`save_prompt` writes them as PEFT
reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bolaco.errors import DataError
from bolaco.evaluation.objective import SLAB, Head
from bolaco.models.structure import positions_of, trunk


@dataclass(frozen=True)
class Judgement:
    """What the teacher thinks of some texts.

    Attributes:
        probabilities: ``[texts, labels]``.
        embeddings: ``[texts, width]``, mean final hidden states over each text.
    """

    probabilities: Tensor
    embeddings: Tensor


class Teacher:
    """A model that is not changed, and what is asked of it.

    Args:
        model: in evaluation mode; its parameters get no gradients from here on.
        tokenizer: of the model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.requires_grad_(False), tokenizer
        self.head = Head(model)
        self._trunk = trunk(model)
        self._embed: Any = model.get_input_embeddings()

    @property
    def width(self) -> int:
        """Of an embedded token."""
        return int(self._embed.weight.shape[1])

    def encode(self, texts: Sequence[str], vectors: int, what: str | None) -> list[list[int]]:
        """Token ids of texts, without special tokens.

        Args:
            texts: the texts.
            vectors: of the prompt that is put before them.
            what: they are, for the message; None cuts what is too long.

        Raises:
            DataError: one of them does not fit behind the prompt.
        """
        rows: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        positions = positions_of(self.model.config)
        if what is None:
            return rows if positions is None else [row[: positions - vectors] for row in rows]
        for number, row in enumerate(rows, 1):
            if positions is not None and len(row) + vectors > positions:
                raise DataError(
                    f"{what}: text {number} has {len(row)} tokens, and {positions - vectors} fit into the teacher's "
                    f"{positions} positions behind the prompt; shorten it or leave it out"
                )
        return rows

    def words(self, count: int, text: str) -> Tensor:
        """Embeddings ``[count, width]`` of the tokens of a text, again and again: what a prompt starts from."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids or [0]
        wanted = torch.tensor([ids[n % len(ids)] for n in range(count)], device=self.model.device)
        with torch.no_grad():
            return torch.as_tensor(self._embed(wanted)).detach().float().cpu()

    def states(self, prefix: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
        """Final hidden states ``[batch, length + 1, width]``: position i is what token i is predicted from.

        Args:
            prefix: ``[batch, vectors, width]``, a prompt in front of each row.
            rows: token ids; shorter rows are padded at their end, what is computed there means nothing.
        """
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), prefix.shape[1] + longest, dtype=torch.long)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[n, : prefix.shape[1] + len(row)] = 1
        device = self.model.device
        inputs = torch.cat([prefix.to(device, self.model.dtype), self._embed(ids.to(device))], dim=1)
        found: Tensor = self._trunk(inputs_embeds=inputs, attention_mask=mask.to(device), use_cache=False)[0]
        return found[:, prefix.shape[1] - 1 :]

    def log_probabilities(self, prefix: Tensor, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Of each token of each row, in nats, with gradients to the prompt.

        Returns:
            ``[batch, length]`` with 0 behind the end of a row, and the mask ``[batch, length]`` of what is a token.
        """
        states = self.states(prefix, rows)[:, :-1]
        mask = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        for n, row in enumerate(rows):
            mask[n, : len(row)] = True
            ids[n, : len(row)] = torch.tensor(row, dtype=torch.long)

        def part(some: Tensor, targets: Tensor) -> Tensor:
            return -torch.nn.functional.cross_entropy(self.head(some), targets, reduction="none")

        chosen, targets = states[mask], ids[mask]
        chunk = max(1, SLAB // (4 * self.head.linear.weight.shape[0]))
        parts: list[Tensor] = [
            checkpoint(part, some, target, use_reentrant=False)
            for some, target in zip(chosen.split(chunk), targets.split(chunk), strict=True)
        ]
        found = torch.zeros(mask.shape, dtype=parts[0].dtype, device=states.device)
        return found.masked_scatter(mask, torch.cat(parts)), mask

    def label_logits(self, prompt: Tensor, rows: Sequence[Sequence[int]], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher answers behind each row, with gradients to the prompt.

        Args:
            prompt: ``[vectors, width]``, which classifies.
            rows: token ids of texts in the template.
            tokens: ``[labels]``, the token that answers each label.

        Returns:
            Logits ``[batch, labels]``, and the mean state over each row ``[batch, width]``, float32.
        """
        states = self.states(prompt.expand(len(rows), *prompt.shape), rows)
        lengths = torch.tensor([len(row) for row in rows], device=states.device)
        last = states[torch.arange(len(rows), device=states.device), lengths]
        inside = torch.arange(states.shape[1], device=states.device)[None] - 1
        mask = ((inside >= 0) & (inside < lengths[:, None])).unsqueeze(-1)
        mean = (states * mask).sum(1).float() / lengths[:, None]
        return self.head(last)[:, tokens.to(states.device)], mean

    def judge(self, prompt: Tensor, rows: Sequence[Sequence[int]], tokens: Tensor, batch: int) -> Judgement:
        """Probabilities and embeddings of texts, without gradients, on the CPU; see :meth:`label_logits`."""
        probabilities = torch.zeros(len(rows), len(tokens))
        embeddings = torch.zeros(len(rows), self.width)
        with torch.no_grad():
            for numbers in by_length(rows, batch):
                logits, mean = self.label_logits(prompt, [rows[n] for n in numbers], tokens)
                probabilities[numbers] = logits.softmax(-1).float().cpu()
                embeddings[numbers] = mean.cpu()
        return Judgement(probabilities, embeddings)


def by_length(rows: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """Numbers of rows in batches of about the same length, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    return (order[start : start + batch] for start in range(0, len(order), batch))


def answers(tokenizer: Any, labels: Sequence[str]) -> tuple[Tensor, bool]:
    """The token by which the teacher answers each label.

    It is the first one of the label as a word, or letters (A, B, ..) where two labels begin with the same token.

    Returns:
        ``[labels]`` token ids, and whether they are words of the labels.

    Raises:
        DataError: there are more labels than letters that are one token.
    """
    for words in ([f" {label}" for label in labels], [f" {chr(ord('A') + n)}" for n in range(min(len(labels), 26))]):
        ids = [tokenizer(word, add_special_tokens=False).input_ids[:1] for word in words]
        known = [found[0] for found in ids if found and found[0] != tokenizer.unk_token_id]
        if len(set(known)) == len(labels):
            return torch.tensor(known), words[0] == f" {labels[0]}"
    raise DataError(
        f"labels: the teacher has no token of its own for each of {', '.join(labels)}; rename those that begin alike"
    )


def save_prompt(prompt: Tensor, folder: Path, model: PreTrainedModel, name: str) -> None:
    """Writes a soft prompt ``[vectors, width]`` for the model ``name``, as a folder that PEFT reads."""
    config = model.config.get_text_config(decoder=True)
    folder.mkdir(parents=True)
    values = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "inference_mode": True,
        "num_virtual_tokens": len(prompt),
        "token_dim": prompt.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    save_file(
        {"prompt_embeddings": prompt.contiguous()}, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
