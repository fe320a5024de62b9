"""Stage ``student``: a small classifier with a tokenizer of its own, made from a configuration of transformers.

It learns labels, the teacher's probabilities, and the teacher's similarities over items of the store, by which it finds
such items itself. Where it puts a text is the mean of its final hidden states, so it is a plain Hugging Face folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from bolaco.distill.prompt import batch_of
from bolaco.distill.settings import Studying
from bolaco.distill.steps import Steps
from bolaco.distill.store import Store
from bolaco.errors import DataError, RecipeError
from bolaco.models.quiet import quiet
from bolaco.models.structure import positions_of
from bolaco.settings import meant, parsed_json, parsed_yaml

_PAD, _UNKNOWN, _START = "[PAD]", "[UNK]", "[CLS]"
_EVERY = 100  # steps between two states that are kept


def parsed_spec(spec: str) -> dict[str, Any]:
    """The values of a configuration: ``bert:hidden_size=128,num_hidden_layers=2``, or a file of them in JSON.

    Raises:
        RecipeError: it is neither, or names no type of models.
    """
    if spec.endswith(".json"):
        try:
            values = parsed_json(Path(spec).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"student {spec}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    else:
        kind, _, fields = spec.partition(":")
        values = {"model_type": kind.strip()}
        for pair in filter(None, fields.split(",")):
            name, equals, value = pair.partition("=")
            if not equals:
                raise RecipeError(f"student {spec}: expected FIELD=VALUE, not {pair!r}")
            values[name.strip()] = parsed_yaml(value)
    if not isinstance(values, dict) or not values.get("model_type") or not isinstance(values["model_type"], str):
        raise RecipeError(f"student {spec}: expected MODEL_TYPE:FIELD=VALUE,.. or a config.json with a model_type")
    return values


def student_config(spec: str, labels: Sequence[str], vocabulary: int) -> Any:
    """The configuration of a student.

    Raises:
        RecipeError: transformers has no such type, no classifier of it, or cannot take a value.
    """
    values = parsed_spec(spec)
    kind = values.pop("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        raise RecipeError(
            f"student {spec}: transformers has no models of type {kind!r}{meant(kind, CONFIG_MAPPING_NAMES)}"
        )
    own = {
        "vocab_size": vocabulary,
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "pad_token_id": 0,
    }
    try:
        config: Any = AutoConfig.for_model(kind, **(values | own))
        with torch.device("meta"), quiet():
            AutoModelForSequenceClassification.from_config(config)
    except Exception as error:  # any value can be in it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"student {spec}: no classifier can be made of it: {reason}") from error
    if config.is_encoder_decoder:
        raise RecipeError(f"student {spec}: an encoder with a decoder; name a model that is one of them")
    return config


def train_tokenizer(texts: Sequence[str], vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (arXiv 1508.07909) of texts, that puts a token for the whole text first."""
    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[_PAD, _UNKNOWN, _START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    start = tokenizer.token_to_id(_START)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{_START} $A", special_tokens=[(_START, start)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        cls_token=_START,
        model_max_length=length,
    )


class Student:
    """A small classifier and its tokenizer.

    Args:
        model: a sequence classifier of transformers.
        tokenizer: its own.
        length: tokens of a text at most.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, length: int) -> None:
        self.model, self.tokenizer, self.length = model, tokenizer, length

    @property
    def parameters(self) -> int:
        """How many it has."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def encode(self, texts: Sequence[str], what: str) -> list[list[int]]:
        """Token ids of texts, the start included.

        Raises:
            DataError: one is longer than the student reads.
        """
        rows: list[list[int]] = self.tokenizer(list(texts), verbose=False).input_ids
        for number, row in enumerate(rows, 1):
            if len(row) > self.length:
                raise DataError(
                    f"{what}: text {number} has {len(row)} tokens and the student reads {self.length}; shorten it, or "
                    "train one with a larger student.length"
                )
        return rows

    def __call__(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Logits ``[batch, labels]``, and where the texts are: ``[batch, width]`` of length 1."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[n, : len(row)] = 1
        device = self.model.device
        found = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True)
        # Padding is at the end, also for models that read it with the last token of the text.
        shown = mask.to(device).unsqueeze(-1)
        mean = (found.hidden_states[-1] * shown).sum(1) / shown.sum(1)
        return found.logits.float(), nn.functional.normalize(mean.float(), dim=1)

    def read(self, rows: Sequence[Sequence[int]], batch: int = 64) -> tuple[Tensor, Tensor]:
        """Probabilities ``[texts, labels]`` and places ``[texts, width]``, without gradients, on the CPU."""
        self.model.eval()
        with torch.no_grad():
            parts = [self(rows[start : start + batch]) for start in range(0, len(rows), batch)]
        return torch.cat([p.softmax(-1).cpu() for p, _ in parts]), torch.cat([g.cpu() for _, g in parts])

    def save(self, folder: Path) -> None:
        """Writes a plain Hugging Face folder."""
        with quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def new_student(texts: Sequence[str], labels: Sequence[str], settings: Studying, seed: int) -> Student:
    """An untrained student, whose tokenizer is made of these texts.

    Raises:
        RecipeError: see :func:`student_config`; or it has fewer positions than ``student.length``.
    """
    tokenizer = train_tokenizer(texts, settings.vocabulary, settings.length)
    config = student_config(settings.config, labels, len(tokenizer))
    positions = positions_of(config)
    if positions is not None and positions < settings.length:
        raise RecipeError(f"student.length {settings.length}: the student has {positions} positions; lower it")
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
    return Student(model, tokenizer, settings.length)


def learn(
    student: Student,
    store: Store,
    settings: Studying,
    seed: int,
    file: Path,
    tick: Callable[[int], object] | None = None,
) -> list[float]:
    """Trains a student on a store, in place.

    The loss is CE(label) + a KL(teacher || student) + b KL(similarities of the teacher || of the student), the last
    over items of the store that are drawn for each step.

    Args:
        student: is changed.
        store: what it learns from; without ``settings.generated`` its labelled texts only.
        settings: how.
        seed: of order, items and dropout.
        file: where the steps are kept.
        tick: is told of steps.

    Returns:
        The loss of every step.

    Raises:
        DataError: a text is longer than the student reads.
    """
    numbers = list(range(len(store))) if settings.generated else (~store.generated).nonzero()[:, 0].tolist()
    used = store.part(numbers)
    rows = student.encode([item.text for item in used.items], "the store")
    targets = used.targets
    count = min(settings.items, len(used)) if settings.similarity else 0

    def step(number: int) -> float:
        chosen = batch_of(len(rows), settings.batch, seed, number)
        draw = torch.Generator().manual_seed((seed + 1) * 100_003 + number)
        items = torch.randperm(len(rows), generator=draw)[:count].tolist()
        student.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((seed + 1) * 100_003 + number)
            logits, places = student([rows[n] for n in chosen + items])
        size = len(chosen)
        device = logits.device
        loss = nn.functional.cross_entropy(logits[:size], targets[chosen].to(device))
        if settings.distill:
            wanted = used.probabilities[chosen].to(device)
            loss = loss + settings.distill * divergence(wanted, logits[:size].log_softmax(-1))
        if count:
            theirs = used.embeddings[chosen] @ used.embeddings[items].T / settings.temperature
            ours = places[:size] @ places[size:].T / settings.temperature
            # A text is no neighbour of itself.
            same = torch.tensor(chosen)[:, None] == torch.tensor(items)[None]
            theirs, ours = theirs.masked_fill(same, -1e4), ours.masked_fill(same.to(device), -1e4)
            loss = loss + settings.similarity * divergence(theirs.softmax(-1).to(device), ours.log_softmax(-1))
        loss.backward()
        return loss.item()

    parameters = {name: tensor for name, tensor in student.model.named_parameters() if tensor.requires_grad}
    steps = Steps(file, parameters, settings.learning_rate, settings.steps, _EVERY, decay=0.01)
    steps.run(step, tick=tick)
    student.model.eval()
    return steps.losses


def divergence(wanted: Tensor, log_found: Tensor) -> Tensor:
    """KL(wanted || found), a mean over rows, of probabilities and of log-probabilities ``[rows, n]``."""
    return nn.functional.kl_div(log_found, wanted, reduction="batchmean")


def student_texts(store: Store, settings: Studying) -> list[str]:
    """The texts that a student's tokenizer is made of: those that it is trained on."""
    return [item.text for item in store.items if settings.generated or item.origin == "labelled"]
