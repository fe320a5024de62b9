"""Stage ``prompt``: soft prompts on the frozen teacher, one that classifies and one for each label that generates."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bolaco.distill.settings import Prompting
from bolaco.distill.steps import Steps
from bolaco.distill.task import Task
from bolaco.distill.teacher import Teacher, answers, by_length

Tick = Callable[[int], object]


@dataclass(frozen=True)
class Prompts:
    """Soft prompts of a task.

    Attributes:
        classify: ``[vectors, width]``.
        generate: ``[labels, 2 vectors, width]``: what all labels share, and then what is a label's own.
        tokens: ``[labels]``, the token by which the teacher answers each label.
    """

    classify: Tensor
    generate: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Learned:
    """How a prompt was learned: the loss of every step, and by step the loss on held-out texts, in nats."""

    losses: list[float]
    held_out: dict[int, float]


def in_template(template: str, texts: Sequence[str]) -> list[str]:
    """Texts as the teacher reads them to classify them."""
    return [template.replace("{text}", text) for text in texts]


def batch_of(count: int, size: int, seed: int, step: int) -> list[int]:
    """Numbers of the examples of a step: all examples come once before any comes twice."""
    wanted, found = range(step * size, (step + 1) * size), []
    for number in wanted:
        epoch, place = divmod(number, count)
        order = list(range(count))
        random.Random(f"{seed} {epoch}").shuffle(order)
        found.append(order[place])
    return found


def learn_to_classify(
    teacher: Teacher, task: Task, held_out: Task, settings: Prompting, seed: int, file: Path, tick: Tick | None = None
) -> tuple[Tensor, Learned]:
    """The prompt ``[vectors, width]`` with which the teacher classifies best on held-out texts.

    Args:
        teacher: which is frozen.
        task: labelled texts to learn from.
        held_out: labelled texts the prompt is chosen on; may be empty.
        settings: how.
        seed: of the order of the texts.
        file: where the steps are kept.
        tick: is told of steps.
    """
    tokens, _ = answers(teacher.tokenizer, task.labels)
    rows = teacher.encode(in_template(settings.template, task.texts), settings.vectors, task.name)
    others = teacher.encode(in_template(settings.template, held_out.texts), settings.vectors, task.name)
    words = f"Classify the text: {', '.join(task.labels)}."
    prompt = nn.Parameter(teacher.words(settings.vectors, words).to(teacher.model.device))

    def loss_of(some: list[list[int]], targets: Sequence[int]) -> Tensor:
        logits, _ = teacher.label_logits(prompt, some, tokens)
        return nn.functional.cross_entropy(logits, torch.tensor(targets, device=logits.device))

    def step(number: int) -> float:
        chosen = batch_of(len(rows), settings.batch, seed, number)
        loss = loss_of([rows[n] for n in chosen], [task.targets[n] for n in chosen])
        loss.backward()
        return loss.item()

    def worth() -> float | None:
        if not others:
            return None
        with torch.no_grad():
            parts = [
                loss_of([others[n] for n in numbers], [held_out.targets[n] for n in numbers]).item() * len(numbers)
                for numbers in by_length(others, settings.batch)
            ]
        return sum(parts) / len(others)

    return _learned(file, {"prompt": prompt}, settings, settings.steps, step, worth, tick, lambda: prompt.detach())


def learn_to_generate(
    teacher: Teacher, task: Task, held_out: Task, settings: Prompting, seed: int, file: Path, tick: Tick | None = None
) -> tuple[Tensor, Learned]:
    """The prompts ``[labels, 2 vectors, width]`` with which the teacher expects held-out texts of a label most.

    Arguments are those of :func:`learn_to_classify`. The loss is that of the tokens of a text, its end included.
    """
    vectors, end = settings.vectors, teacher.tokenizer.eos_token_id

    def ended(texts: Sequence[str]) -> list[list[int]]:
        return [row + [end] * (end is not None) for row in teacher.encode(texts, 2 * vectors + 1, task.name)]

    rows, others = ended(task.texts), ended(held_out.texts)
    device = teacher.model.device
    shared = nn.Parameter(teacher.words(vectors, "Write a text of this kind:").to(device))
    own = nn.Parameter(torch.stack([teacher.words(vectors, f" {label}:") for label in task.labels]).to(device))

    def prompts() -> Tensor:
        return torch.cat([shared.expand(len(own), *shared.shape), own], dim=1)

    def sums(some: list[list[int]], targets: Sequence[int]) -> tuple[Tensor, int]:
        found, mask = teacher.log_probabilities(prompts()[list(targets)], some)
        return -found.sum(), int(mask.sum())

    def step(number: int) -> float:
        chosen = batch_of(len(rows), settings.batch, seed, number)
        total, count = sums([rows[n] for n in chosen], [task.targets[n] for n in chosen])
        loss = total / count
        loss.backward()
        return loss.item()

    def worth() -> float | None:
        if not others:
            return None
        with torch.no_grad():
            parts = [
                sums([others[n] for n in numbers], [held_out.targets[n] for n in numbers])
                for numbers in by_length(others, settings.batch)
            ]
        return sum(total.item() for total, _ in parts) / sum(count for _, count in parts)

    both = {"common": shared, "own": own}
    return _learned(
        file, both, settings, settings.generate_steps, step, worth, tick, lambda: prompts().detach().clone()
    )


def _learned(
    file: Path,
    parameters: dict[str, nn.Parameter],
    settings: Prompting,
    total: int,
    step: Callable[[int], float],
    worth: Callable[[], float | None],
    tick: Tick | None,
    result: Callable[[], Tensor],
) -> tuple[Tensor, Learned]:
    steps = Steps(file, parameters, settings.learning_rate, total, max(1, total // 6))
    steps.run(step, worth, tick)
    return result().float().cpu(), Learned(steps.losses, steps.worths)
