"""The settings of a distillation: everything that its result depends on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from bolaco.errors import RecipeError
from bolaco.settings import Section, meant, problems, unflatten

# A student of about 1.5 million parameters.
STUDENT = "bert:hidden_size=128,num_hidden_layers=2,num_attention_heads=2,intermediate_size=512"


class Prompting(Section):
    """Stage ``prompt``: soft prompts on the frozen teacher, by supervised learning."""

    vectors: int = Field(20, gt=0, description="of the prompt that classifies, of each label's, and of the shared one")
    steps: int = Field(150, ge=0, description="of the prompt that classifies")
    generate_steps: int = Field(150, ge=0, description="of the prompts that generate")
    batch: int = Field(16, gt=0)
    learning_rate: float = Field(3e-2, gt=0)
    held_out: float = Field(0.2, gt=0, lt=1, description="share of each label's texts that prompts are chosen on")
    template: str = Field("{text}\nLabel:", description="what the teacher reads; it answers with the label's word")


class Reinforcing(Section):
    """Stage ``reinforce``: the prompts that generate, by policy gradient."""

    algorithm: str = Field("rloo", description="rloo: REINFORCE with a leave-one-out baseline; or ppo")
    steps: int = Field(20, ge=0)
    batch: int = Field(32, ge=2, description="texts that are sampled in a step")
    length: int = Field(48, ge=4, description="tokens of a text at most")
    learning_rate: float = Field(3e-3, gt=0)
    kl_target: float = Field(6.0, gt=0, description="nats a text that the prompts may move from the supervised ones")
    kl_weight: float = Field(0.1, gt=0, description="of the divergence in the reward, at first; it adapts")
    diversity: float = Field(0.5, ge=0, description="weight of the similarity to what was generated before")
    window: int = Field(256, ge=0, description="earlier texts that this similarity looks at")
    every: int = Field(5, gt=0, description="steps between evaluations, of which the best is kept")
    evaluation: int = Field(64, ge=2, description="texts that are sampled for an evaluation")


class Storing(Section):
    """Stage ``store``: texts of the teacher with what it knows of them."""

    samples: int = Field(1000, gt=0, description="texts that are drawn, evenly over the labels")
    batch: int = Field(32, gt=0)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    certainty: float = Field(0.6, ge=0, le=1, description="least probability the teacher gives to a text's label")
    copies: float = Field(0.95, gt=0, le=1, description="cosine of two texts' embeddings above which one is a copy")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of generated texts that retrieval is chosen on")


class Studying(Section):
    """Stage ``student``: a small model that learns from labels, teacher and store."""

    config: str = Field(STUDENT, description="MODEL_TYPE:FIELD=VALUE,.. of transformers, or a config.json")
    vocabulary: int = Field(6000, gt=10, description="tokens of the student's own tokenizer at most")
    length: int = Field(256, ge=4, description="tokens of a text at most")
    steps: int = Field(400, gt=0)
    batch: int = Field(32, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    distill: float = Field(1.0, ge=0, description="weight of KL(teacher || student) of the labels")
    generated: bool = Field(True, description="whether it trains on generated texts too")
    similarity: float = Field(1.0, ge=0, description="weight of similarities over store items; 0: no store")
    items: int = Field(32, ge=2, description="store items that these are over, of a step")
    temperature: float = Field(0.1, gt=0, description="of similarities")
    neighbours: tuple[int, ...] = Field((8, 16, 32), description="items that are retrieved; one is chosen")
    index: Literal["auto", "exact", "faiss"] = Field("auto", description="auto: faiss for large stores if installed")


class Distillation(Section):
    """Everything a distillation depends on."""

    teacher: str
    task: str
    labels: tuple[str, ...] | None = Field(None, description="default: those that occur, in alphabetical order")
    evaluation: str | None = Field(None, description="labelled texts that are reported on; default: held-out ones")
    seed: int = Field(0, ge=0, lt=2**32)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    prompt: Prompting = Prompting()
    reinforce: Reinforcing = Reinforcing()
    store: Storing = Storing()
    student: Studying = Studying()


def make_settings(words: dict[str, Any], options: dict[str, Any] | None = None) -> Distillation:
    """Validates the settings of a distillation.

    Args:
        words: fields by dotted name; one that is None is left to its default.
        options: the same, as given by ``--set``.

    Raises:
        RecipeError: an unknown field, or a value of the wrong type or out of range.
    """
    values = unflatten({name: value for name, value in words.items() if value is not None} | (options or {}))
    try:
        found = Distillation.model_validate(values)
    except ValidationError as error:
        raise RecipeError(problems(error, "settings", section=Distillation)) from None
    if "{text}" not in found.prompt.template:
        raise RecipeError("prompt.template: has no {text}, which stands for the text")
    from bolaco.distill.policy import ALGORITHMS  # it brings torch

    if found.reinforce.algorithm not in ALGORITHMS:
        name = found.reinforce.algorithm
        raise RecipeError(f"reinforce.algorithm: unknown algorithm {name!r}{meant(name, ALGORITHMS)}")
    return found
