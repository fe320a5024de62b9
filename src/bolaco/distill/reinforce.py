"""Stage ``reinforce``: the prompts that generate, by policy gradient.

A text's reward is the teacher's log-probability of the label it was written for, minus its similarity to what was
written before, minus the weighted divergence from the supervised prompts. That weight adapts so that the divergence
stays near its target (arXiv 1909.08593). Prompts are evaluated every few steps on texts sampled for that, and the best
are kept whose divergence and variety are in bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from bolaco.data.written import Writing, sampled
from bolaco.distill.policy import ALGORITHMS, advantages
from bolaco.distill.prompt import Prompts, in_template
from bolaco.distill.settings import Prompting, Reinforcing
from bolaco.distill.steps import Steps
from bolaco.distill.teacher import Teacher

# Of prompts that are kept: how far beyond the target the divergence may be, and how much variety must remain.
MOST_DIVERGENCE, LEAST_VARIETY = 1.5, 0.9
# Texts whose gradient is computed at once.
_PART = 16
# How much the weight of the divergence changes in a step where that is far from its target.
_GAIN = 0.3


@dataclass(frozen=True)
class Sampled:
    """Means over texts that were sampled for an evaluation.

    Attributes:
        reward: without the divergence.
        certainty: probability of the label that a text was written for.
        kl: nats a text.
        distinct: share of different ones among all pairs of neighbouring words (distinct-2, arXiv 1510.03055).
        texts: a few of them for each label.
    """

    reward: float
    certainty: float
    kl: float
    distinct: float
    texts: list[list[str]]


@dataclass(frozen=True)
class Reinforced:
    """How prompts were reinforced.

    Attributes:
        rewards, kl, weights: of every step: mean reward without the divergence, divergence in nats a text, its weight.
        before, after: evaluations with the prompts as they were and as they are.
    """

    rewards: list[float]
    kl: list[float]
    weights: list[float]
    before: Sampled
    after: Sampled


class Reinforcement:
    """The policy gradient, of a teacher with its prompts.

    Args:
        teacher: which is frozen.
        prompts: of stage ``prompt``.
        labels: their names.
        center: ``[width]``, mean embedding of the labelled texts; similarity is that of what is left without it.
        prompting: how texts are read.
        settings: how.
        seed: of the samples.
    """

    def __init__(
        self,
        teacher: Teacher,
        prompts: Prompts,
        labels: Sequence[str],
        center: Tensor,
        prompting: Prompting,
        settings: Reinforcing,
        seed: int,
    ) -> None:
        self.teacher, self.prompts, self.labels, self.center = teacher, prompts, labels, center
        self.prompting, self.settings, self.seed = prompting, settings, seed
        self.reference = prompts.generate.to(teacher.model.device)
        self.policy = nn.Parameter(self.reference.clone())

    @property
    def total(self) -> int:
        """Optimiser steps in all."""
        return self.settings.steps * ALGORITHMS[self.settings.algorithm].passes

    def run(self, file: Path, tick: Callable[[int], object] | None = None) -> tuple[Prompts, Reinforced]:
        """The reinforced prompts, and how it went.

        Args:
            file: where the steps are kept.
            tick: is told of optimiser steps.
        """
        settings, algorithm = self.settings, ALGORITHMS[self.settings.algorithm]
        passes = algorithm.passes
        # States are kept between batches, so a run that goes on samples the batch that comes next.
        steps = Steps(file, {"policy": self.policy}, settings.learning_rate, self.total, settings.every * passes)
        notes: dict[str, Any] = steps.notes
        if not notes:
            notes |= {"rewards": [], "kl": [], "weights": [], "weight": settings.kl_weight, "evaluated": {}}
            steps.tensors["window"] = torch.empty(0, self.teacher.width)
        batch: list[Any] = []

        def sample(number: int) -> None:
            """A batch with its rewards, which stays for the passes over it."""
            labels = self._labels(settings.batch)
            rows = self.sample(labels, f"step {number}")
            with torch.no_grad():
                old, divergence = self._divergence(labels, rows)
            window = steps.tensors["window"]
            rewards, _, embeddings = self.reward(labels, rows, window)
            steps.tensors["window"] = torch.cat([window, embeddings])[-settings.window or len(window) + len(rows) :]
            gained = advantages(rewards - notes["weight"] * divergence, labels)
            batch[:] = [labels, rows, old, gained]
            mean = float(divergence.mean())
            for name, value in (("rewards", float(rewards.mean())), ("kl", mean), ("weights", notes["weight"])):
                notes[name].append(value)
            off = max(-1.0, min(1.0, mean / settings.kl_target - 1))
            notes["weight"] *= 1 + _GAIN * off

        def step(number: int) -> float:
            if number % passes == 0:
                sample(number // passes)
            labels, rows, old, gained = batch
            count = sum(len(row) + 1 for row in rows)
            loss = 0.0
            for start in range(0, len(rows), _PART):
                part = slice(start, start + _PART)
                now, mask = self._ended(self.policy, labels[part], rows[part])
                before = old[part, : now.shape[1]].to(now)
                share = sum(len(row) + 1 for row in rows[part]) / count
                found = algorithm.loss(now, before, mask.to(now), gained[part].to(now)) * share
                found.backward()
                loss += found.item()
            return loss

        def worth() -> float:
            found = self.evaluate()
            notes["evaluated"][str(steps.done)] = asdict(found)
            least = LEAST_VARIETY * notes["evaluated"]["0"]["distinct"]
            inside = found.kl <= MOST_DIVERGENCE * settings.kl_target and found.distinct >= least
            return -found.reward if inside else float("inf")

        steps.run(step, worth, tick)
        best = min(steps.worths, key=lambda number: steps.worths[number])
        before, after = (Sampled(**notes["evaluated"][str(number)]) for number in (0, best))
        how = Reinforced(notes["rewards"], notes["kl"], notes["weights"], before, after)
        made = self.policy.detach().float().cpu().clone()
        return Prompts(self.prompts.classify, made, self.prompts.tokens), how

    def evaluate(self) -> Sampled:
        """What the prompts are worth, on texts whose random numbers are always the same."""
        labels = self._labels(self.settings.evaluation)
        rows = self.sample(labels, "evaluation")
        with torch.no_grad():
            _, divergence = self._divergence(labels, rows)
        rewards, certainty, _ = self.reward(labels, rows, torch.empty(0, self.teacher.width))
        texts = self.teacher.tokenizer.batch_decode(rows, skip_special_tokens=True)
        some = [[texts[n] for n in range(label, len(texts), len(self.labels))][:3] for label in range(len(self.labels))]
        return Sampled(
            float(rewards.mean()), float(certainty.mean()), float(divergence.mean()), distinct_pairs(texts), some
        )

    def sample(self, labels: Tensor, what: str) -> list[list[int]]:
        """Texts for labels ``[batch]`` as token ids without their end; they depend on the prompts and on ``what``."""
        writing = Writing(length=self.settings.length, top_p=1.0, batch=len(labels))
        seed = crc32(f"{self.seed} {what}".encode())
        start = torch.empty(len(labels), 0, dtype=torch.long)
        prefix = self.policy.detach()[labels]
        return sampled(self.teacher.model, self.teacher.tokenizer, writing, seed, start, prefix)

    def reward(self, labels: Tensor, rows: list[list[int]], window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards without the divergence.

        Args:
            labels: ``[batch]``, what the texts were written for.
            rows: their tokens.
            window: ``[earlier texts, width]`` centred embeddings, of length 1.

        Returns:
            Rewards ``[batch]``, the teacher's certainty of the labels ``[batch]``, and the texts' own centred
            embeddings ``[batch, width]``.
        """
        teacher, prompts = self.teacher, self.prompts
        texts = teacher.tokenizer.batch_decode(rows, skip_special_tokens=True)
        read = teacher.encode(in_template(self.prompting.template, texts), len(prompts.classify), None)
        judged = teacher.judge(prompts.classify, read, prompts.tokens, self.prompting.batch)
        certainty = judged.probabilities[torch.arange(len(labels)), labels]
        embeddings = nn.functional.normalize(judged.embeddings - self.center, dim=1)
        rewards = certainty.clamp_min(1e-6).log()
        rewards -= self.settings.diversity * nearest(embeddings, window)
        # Texts that are empty, or have no end within the length, are no samples of the task.
        unfinished = torch.tensor([not text.strip() for text in texts])
        unfinished |= torch.tensor([len(row) >= self.settings.length for row in rows])
        return rewards - unfinished.float(), certainty, embeddings

    def _labels(self, count: int) -> Tensor:
        return torch.arange(count) % len(self.labels)

    def _ended(self, prompts: Tensor, labels: Tensor, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the tokens of texts, their end included, and what is a token; ``[batch, length]``."""
        end = self.teacher.tokenizer.eos_token_id
        ended = [row + [end] if end is not None and len(row) < self.settings.length else row for row in rows]
        return self.teacher.log_probabilities(prompts[labels], ended)

    def _divergence(self, labels: Tensor, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all tokens ``[batch, length]``, and log(policy / reference) of each text ``[batch]``."""
        old = torch.zeros(len(rows), self.settings.length + 1)
        divergence = torch.zeros(len(rows))
        for start in range(0, len(rows), _PART):
            part = slice(start, start + _PART)
            now, _ = self._ended(self.policy, labels[part], rows[part])
            reference, _ = self._ended(self.reference, labels[part], rows[part])
            old[part, : now.shape[1]] = now.float().cpu()
            divergence[part] = (now - reference).sum(1).float().cpu()
        return old, divergence


def nearest(embeddings: Tensor, window: Tensor) -> Tensor:
    """The largest cosine of each row to another one, or to one of the window; 0 where there is no other.

    Args:
        embeddings: ``[batch, width]`` of length 1.
        window: ``[n, width]`` of length 1.
    """
    among = embeddings @ embeddings.T
    among.fill_diagonal_(-1.0)
    others = torch.cat([among, embeddings @ window.T], dim=1)
    return others.max(1).values if others.shape[1] > 1 else torch.zeros(len(embeddings))


def distinct_pairs(texts: Sequence[str]) -> float:
    """The share of different ones among all pairs of neighbouring words; 0 where there are none."""
    pairs = [pair for text in texts for pair in pairwise(text.lower().split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
