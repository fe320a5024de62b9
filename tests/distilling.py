"""A toy task and settings that distil it in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.models import LEXICON

LABELS = ("winter", "summer", "story")
_OF = {"winter": ["cold", "heavy"], "summer": ["warm", "light"], "story": ["old", "short"]}
TOY: dict[str, Any] = {
    "prompt.vectors": 4,
    "prompt.steps": 24,
    "prompt.generate_steps": 24,
    "prompt.learning_rate": 0.05,
    "reinforce.steps": 4,
    "reinforce.every": 2,
    "reinforce.length": 10,
    "reinforce.batch": 12,
    "reinforce.evaluation": 24,
    "store.samples": 60,
    "store.batch": 10,
    "store.certainty": 0.2,
    "student.vocabulary": 400,
    "student.length": 40,
    "student.steps": 30,
    "student.neighbours": "[2,4]",
    "student.config": "bert:hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64",
}


def toy_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts whose label shows in a third of their words."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        label = LABELS[number % len(LABELS)]
        words = [draw.choice(LEXICON["nouns"][:8] + LEXICON["verbs"]) for _ in range(6)]
        words += [draw.choice(_OF[label]) for _ in range(3)]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def toy_words(**changes: Any) -> list[str]:
    """``--set`` words of :data:`TOY`; ``store_samples=3`` changes one of them."""
    values = TOY | {name.replace("_", ".", 1): value for name, value in changes.items()}
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def toy_options(**changes: Any) -> dict[str, Any]:
    """The same as options of a function."""
    values = TOY | {"student.neighbours": (2, 4)} | {name.replace("_", ".", 1): v for name, v in changes.items()}
    return values
