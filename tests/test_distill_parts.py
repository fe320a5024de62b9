"""The parts of a distillation: steps that go on, policy gradients, soft prompts, the task, the index, the store."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bolaco.distill.index import Exact, Faiss, make_index
from bolaco.distill.policy import ALGORITHMS, advantages
from bolaco.distill.predict import chosen_retrieval, mixed, retrieved
from bolaco.distill.prompt import batch_of
from bolaco.distill.record import Retrieval
from bolaco.distill.reinforce import distinct_pairs, nearest
from bolaco.distill.settings import make_settings
from bolaco.distill.steps import Steps
from bolaco.distill.store import Item, Store, read_store
from bolaco.distill.student import new_student, parsed_spec, student_config
from bolaco.distill.task import Task, read_task
from bolaco.distill.teacher import Teacher, answers, save_prompt
from bolaco.errors import CheckpointError, DataError, MissingPackageError, NonFiniteError, RecipeError, ResumeError
from tests.distilling import LABELS, toy_options, toy_rows, write_rows
from tests.models import FAMILIES, POSITIONS, english, tiny_llama, tiny_tokenizer

# --- steps --------------------------------------------------------------------------------------------------------


def fit(file: Path, until: int = 30, worths: list[float] | None = None) -> tuple[Tensor, Steps]:
    """A line through points, a batch at a time; ends at a step as if it were killed there."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=draw)
    y = x @ torch.tensor([1.0, -2.0, 0.5])
    weight = nn.Parameter(torch.zeros(3))

    def step(number: int) -> float:
        if number == until:
            raise KeyboardInterrupt
        rows = batch_of(64, 8, 1, number)
        loss = (x[rows] @ weight - y[rows]).square().mean()
        loss.backward()
        return loss.item()

    def worth() -> float:
        return worths.pop(0) if worths else float((x @ weight.detach() - y).square().mean())

    steps = Steps(file, {"weight": weight}, 0.1, 30, 7)
    steps.run(step, worth)
    return weight.detach(), steps


@pytest.mark.parametrize("moment", [1, 7, 20, 29])
def test_steps_go_on_as_if_nothing_had_been(tmp_path: Path, moment: int) -> None:
    whole, known = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", moment)
    found, steps = fit(tmp_path / "killed")
    assert torch.equal(found, whole)
    assert (steps.losses, steps.worths) == (known.losses, known.worths)
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    again, _ = fit(tmp_path / "killed", 0)  # nothing is left to do
    assert torch.equal(again, whole)
    assert known.worths[30] < 0.1 * known.worths[0]


def test_the_best_parameters_are_kept(tmp_path: Path) -> None:
    # Evaluations at 0, 7, 14, 21, 28 and 30.
    best, _ = fit(tmp_path / "a", worths=[5.0, 4.0, 1.0, 2.0, 3.0, 2.0])
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", 14)
    from safetensors.torch import load_file

    # The state that was kept before step 14.
    assert torch.equal(load_file(tmp_path / "b")["now.weight"], best)


def test_a_loss_that_is_none_stops(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(1))
    steps = Steps(tmp_path / "classify.safetensors", {"weight": weight}, 0.1, 3, 1)
    with pytest.raises(NonFiniteError, match="classify: the loss of step 0 is nan; lower learning_rate"):
        steps.run(lambda number: math.nan)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    fit(tmp_path / "state")
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:-9])
    with pytest.raises(ResumeError, match="state: missing or damaged"):
        fit(tmp_path / "state")


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 3))
def test_every_example_comes_before_any_comes_again(count: int, size: int, seed: int) -> None:
    seen = [n for step in range(-(-3 * count // size)) for n in batch_of(count, size, seed, step)][: 3 * count]
    for start in range(0, len(seen), count):
        assert sorted(seen[start : start + count]) == list(range(count))


# --- policy gradient ----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 2)), min_size=3, max_size=12))
def test_a_text_is_compared_with_the_others_of_its_label(rows: list[tuple[float, int]]) -> None:
    rewards = torch.tensor([reward for reward, _ in rows], dtype=torch.float64)
    groups = torch.tensor([group for _, group in rows])
    found = advantages(rewards, groups)
    plain = []
    for n, (reward, group) in enumerate(rows):
        others = [r for m, (r, g) in enumerate(rows) if m != n and g == group]
        others = others or [r for m, (r, _) in enumerate(rows) if m != n]
        plain.append(reward - sum(others) / len(others))
    wanted = torch.tensor(plain, dtype=torch.float64)
    torch.testing.assert_close(found, wanted / (wanted.std() + 1e-6), rtol=1e-9, atol=1e-9)


def policy_case() -> tuple[nn.Parameter, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    now = nn.Parameter(-torch.rand(5, 4, generator=draw, dtype=torch.float64))
    mask = torch.arange(4)[None] < torch.tensor([4, 2, 3, 1, 4])[:, None]
    return now, mask.double(), torch.randn(5, generator=draw, dtype=torch.float64)


def test_the_first_pass_of_ppo_is_reinforce() -> None:
    now, mask, advantage = policy_case()
    gradients = []
    for algorithm in ALGORITHMS.values():
        now.grad = None
        algorithm.loss(now, now.detach(), mask, advantage).backward()
        gradients.append(now.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], -advantage[:, None] * mask / mask.sum())


def test_ppo_does_not_push_further_what_is_far_already() -> None:
    now, mask, advantage = policy_case()
    before = now.detach() - 0.5 * advantage.sign()[:, None]  # all moved the way they should
    ALGORITHMS["ppo"].loss(now, before, mask, advantage).backward()
    assert now.grad.abs().max() == 0
    now.grad = None
    ALGORITHMS["ppo"].loss(now, now.detach() + 0.5 * advantage.sign()[:, None], mask, advantage).backward()
    assert ((now.grad != 0) == (mask != 0)).all()


def test_similarity_is_to_others_and_to_the_window() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = nn.functional.normalize(torch.randn(6, 4, generator=draw), dim=1)
    some, window = rows[:3], rows[3:]
    found = nearest(some, window)
    for n in range(3):
        wanted = max(float(some[n] @ rows[m]) for m in range(6) if m != n)
        assert found[n] == pytest.approx(wanted)
    assert nearest(some[:1], window[:0]).tolist() == [0.0]
    assert nearest(torch.stack([some[0], some[0]]), window[:0]).tolist() == pytest.approx([1.0, 1.0])


def test_distinct_pairs() -> None:
    assert distinct_pairs(["a b a b", "a b"]) == 2 / 4
    assert distinct_pairs(["alone", ""]) == 0


# --- the teacher --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def teacher(request: pytest.FixtureRequest) -> Teacher:
    return Teacher(FAMILIES[request.param]().double(), tiny_tokenizer())


ROWS = [[7, 8, 9, 10, 11], [12, 13], [14, 15, 16]]


def test_log_probabilities_are_those_of_the_model_behind_the_prompt(teacher: Teacher) -> None:
    before = torch.tensor([20, 21])
    prompt = teacher.model.get_input_embeddings()(before).detach().clone().requires_grad_()
    found, mask = teacher.log_probabilities(prompt.expand(3, *prompt.shape), ROWS)
    assert mask.sum(1).tolist() == [5, 2, 3]
    for n, row in enumerate(ROWS):
        with torch.no_grad():
            logits = teacher.model(torch.tensor([[*before.tolist(), *row]])).logits[0].log_softmax(-1)
        wanted = [float(logits[1 + i, token]) for i, token in enumerate(row)]
        assert found[n, : len(row)].tolist() == pytest.approx(wanted, rel=1e-6)
        assert found[n, len(row) :].tolist() == [0.0] * (5 - len(row))
    found.sum().backward()
    assert prompt.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_a_judgement_does_not_depend_on_the_batch(teacher: Teacher) -> None:
    prompt, tokens = teacher.words(3, "the old river"), torch.tensor([30, 31])
    whole = teacher.judge(prompt, ROWS, tokens, 3)
    for n, row in enumerate(ROWS):
        alone = teacher.judge(prompt, [row], tokens, 1)
        torch.testing.assert_close(alone.probabilities[0], whole.probabilities[n])
        torch.testing.assert_close(alone.embeddings[0], whole.embeddings[n])
    assert whole.probabilities.sum(1).tolist() == pytest.approx([1.0] * 3)


def test_peft_reads_a_prompt(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    teacher = Teacher(tiny_llama(), tiny_tokenizer())
    prompt = torch.randn(5, teacher.width, generator=torch.Generator().manual_seed(0))
    save_prompt(prompt, tmp_path / "prompt", teacher.model, "model")
    with torch.no_grad():
        states = teacher.states(prompt[None], [ROWS[0]])[0, 1:]
        wanted = teacher.head(states)
        adapted = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "prompt")
        found = adapted(input_ids=torch.tensor([ROWS[0]])).logits[0, -5:]
    torch.testing.assert_close(found, wanted)


def test_answers_are_words_or_letters() -> None:
    tokenizer = tiny_tokenizer()
    tokens, words = answers(tokenizer, ["winter", "summer"])
    assert words
    assert tokenizer.decode(tokens) == "winter summer"
    # "a" is the only letter of this vocabulary.
    with pytest.raises(DataError, match="labels: the teacher has no token of its own for each of winter, winter house"):
        answers(tokenizer, ["winter", "winter house"])


def test_a_text_that_does_not_fit_is_named() -> None:
    teacher = Teacher(tiny_llama(), tiny_tokenizer())
    with pytest.raises(DataError, match=rf"t\.jsonl: text 2 has \d+ tokens, and {POSITIONS - 20} fit"):
        teacher.encode(["the river", english(POSITIONS, 0)], 20, "t.jsonl")


# --- the task -----------------------------------------------------------------------------------------------------


def test_a_task_is_read_and_divided(tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "t.jsonl", toy_rows(30)))
    task = read_task(file)
    assert task.labels == tuple(sorted(LABELS))
    assert read_task(file, LABELS).labels == LABELS
    first, second = task.divided(0.2, 0)
    assert sorted(first.texts + second.texts) == sorted(task.texts)
    assert [len(second.of_label(label)) for label in range(3)] == [2, 2, 2]
    assert task.divided(0.2, 1)[1].texts != second.texts
    assert task.digest != first.digest


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.floats(0.01, 0.99), st.integers(0, 5))
def test_every_label_stays_in_the_first_part(targets: list[int], share: float, seed: int) -> None:
    texts = tuple(str(n) for n in range(len(targets)))
    task = Task("t", ("a", "b", "c", "d"), texts, tuple(targets))
    first, second = task.divided(share, seed)
    assert set(first.targets) == set(targets)
    assert sorted(first.texts + second.texts, key=int) == list(texts)
    assert all(targets.count(label) > 1 for label in second.targets)


BAD_TASKS = [
    ("", "there is no labelled text in it"),
    ('{"text": "a", "label": "x"}\n', "has the label 'x' only; two are needed"),
    ('{"text": "a"}\n', "line 1: label: Field required"),
    ('\n{"text": "", "label": "x"}\n', "line 2: text: String should have at least 1 character"),
    ('{"text": "a", "label": 3}\n', "line 1: label: Input should be a valid string"),
    ("no json\n", "line 1: the line: Invalid JSON"),
]


@pytest.mark.parametrize(("content", "said"), BAD_TASKS, ids=[said for _, said in BAD_TASKS])
def test_a_bad_task_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "t.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_task(str(tmp_path / "t.jsonl"))
    assert said in str(caught.value)
    assert "t.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_that_are_given_are_all_there(tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "t.jsonl", toy_rows(3)))
    with pytest.raises(DataError, match="label 'autumn' never occurs"):
        read_task(file, [*LABELS, "autumn"])
    with pytest.raises(DataError, match="line 3: label 'story' is none of winter, summer"):
        read_task(file, LABELS[:2])
    assert read_task(file, [*LABELS, "autumn"], known=True).labels == (*LABELS, "autumn")
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        read_task(str(tmp_path / "none.jsonl"))


def test_settings_are_checked() -> None:
    words = {"teacher": "m", "task": "t"}
    for options, said in [
        ({"reinforce.algorithm": "pop"}, "did you mean 'ppo'"),
        ({"store.smaples": 3}, "did you mean 'samples'"),
        ({"prompt.template": "Label:"}, "prompt.template: has no {text}"),
        ({"store.certainty": 2}, "store.certainty: Input should be less than or equal to 1"),
    ]:
        with pytest.raises(RecipeError, match=said):
            make_settings(words, options)


# --- index, store and retrieval -----------------------------------------------------------------------------------


def units(count: int, width: int, seed: int) -> Tensor:
    return nn.functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_exact_search() -> None:
    keys, queries = units(50, 8, 0), units(7, 8, 1)
    cosines, numbers = Exact(keys).search(queries, 5)
    for n in range(7):
        order = sorted(range(50), key=lambda m: -float(queries[n].double() @ keys[m].double()))
        assert numbers[n].tolist() == order[:5]
    assert cosines.shape == (7, 5)
    assert Exact(keys[:3]).search(queries, 5)[1].shape == (7, 3)


def test_faiss_finds_what_exact_search_finds() -> None:
    pytest.importorskip("faiss", reason="FAISS is an extra (retrieval)")
    keys, queries = units(3000, 32, 0), units(100, 32, 1)
    wanted = Exact(keys).search(queries, 8)
    found = Faiss(keys).search(queries, 8)
    same = [len(set(a) & set(b)) for a, b in zip(found[1].tolist(), wanted[1].tolist(), strict=True)]
    assert sum(same) >= 0.97 * 8 * 100
    exactly = found[1] == wanted[1]
    torch.testing.assert_close(found[0][exactly], wanted[0][exactly])
    assert Faiss(keys[:3]).search(queries, 8)[1].shape == (100, 3)


def test_without_faiss_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **words: object) -> object:
        if name == "faiss":
            raise ImportError(name)
        return real(name, *rest, **words)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r"bolaco\[retrieval\]"):
        make_index(units(5, 3, 0), "faiss")
    assert isinstance(make_index(units(5, 3, 0)), Exact)


def toy_store(count: int = 60, wrong: bool = False) -> Store:
    """A store in which the label shows in words and embeddings, or (``wrong``) is another one."""
    rows = toy_rows(count, 5)
    targets = torch.tensor([LABELS.index(row["label"]) for row in rows])
    told = (targets + 1) % 3 if wrong else targets
    items = tuple(
        Item(text=row["text"], label=LABELS[label], origin="generated")
        for row, label in zip(rows, told.tolist(), strict=True)
    )
    probabilities = 0.85 * nn.functional.one_hot(told, 3) + 0.05
    embeddings = nn.functional.normalize(nn.functional.one_hot(targets, 3) + 0.1 * units(count, 3, 2), dim=1)
    return Store(LABELS, items, probabilities, embeddings)


def test_a_store_is_read_as_it_was_saved(tmp_path: Path) -> None:
    store = toy_store()
    items = (store.items[0].model_copy(update={"origin": "labelled"}), *store.items[1:])
    store = Store(LABELS, items, store.probabilities, store.embeddings, units(60, 5, 0))
    store.save(tmp_path / "store")
    found = read_store(tmp_path / "store", LABELS)
    assert found.items == store.items
    for name in ("probabilities", "embeddings", "keys"):
        assert torch.equal(getattr(found, name), getattr(store, name))
    assert found.values[0].tolist() == [1.0, 0.0, 0.0]  # the label of a labelled text
    assert torch.equal(found.values[1:], store.probabilities[1:])
    seen, apart = store.divided(0.1)
    assert len(seen) + len(apart) == 60
    assert {item.text for item in seen.items}.isdisjoint(item.text for item in apart.items)
    assert apart.generated.all()
    assert sorted(apart.targets.tolist()) == [0, 0, 1, 1, 2, 2]


def test_a_store_that_is_not_right_is_named(tmp_path: Path) -> None:
    toy_store().save(tmp_path / "store")
    with pytest.raises(CheckpointError, match=r"items\.jsonl: cannot be read"):
        read_store(tmp_path / "none", LABELS)
    with pytest.raises(CheckpointError, match="60 items and 2 labels, but"):
        read_store(tmp_path / "store", LABELS[:2])
    with pytest.raises(CheckpointError, match="label 'story' is none of"):
        read_store(tmp_path / "store", ("winter", "summer", "autumn"))
    lines = (tmp_path / "store" / "items.jsonl").read_text().splitlines()
    (tmp_path / "store" / "items.jsonl").write_text("\n".join([*lines[:-1], json.dumps({"text": "a"})]))
    with pytest.raises(CheckpointError, match=r"items\.jsonl: damaged"):
        read_store(tmp_path / "store", LABELS)
    (tmp_path / "store" / "items.jsonl").write_text("")
    with pytest.raises(DataError, match="the store is empty"):
        read_store(tmp_path / "store", LABELS)


def test_what_is_nearest_is_retrieved() -> None:
    keys = torch.eye(3)
    store = Store(("a", "b"), tuple(Item(text="t", label="a", origin="generated") for _ in range(3)), *[
        torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]), torch.eye(3)
    ])  # fmt: skip
    place = nn.functional.normalize(torch.tensor([[1.0, 0.5, 0.0]]), dim=1)
    how = Retrieval(neighbours=2, share=0.5, temperature=0.1)
    found, numbers = retrieved(store, place, how, Exact(keys))
    assert numbers.tolist() == [[0, 1]]
    weights = torch.tensor([place[0, 0], place[0, 1]]).div(0.1).softmax(0)
    torch.testing.assert_close(found[0], weights[0] * store.values[0] + weights[1] * store.values[1])
    torch.testing.assert_close(mixed(torch.tensor([[1.0, 0.0]]), found, 0.25)[0, 1], 0.25 * found[0, 1])


# --- the student --------------------------------------------------------------------------------------------------


def studying(**changes: object) -> object:
    return make_settings({"teacher": "m", "task": "t"}, toy_options(**changes)).student


@pytest.mark.parametrize(
    "spec",
    [
        "bert:hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64",
        "llama:hidden_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2,intermediate_size=64",
    ],
)
def test_a_student_learns_and_a_store_with_wrong_labels_hurts(tmp_path: Path, spec: str) -> None:
    from bolaco.distill.study import study

    settings = studying(student_config=spec, student_steps=60, student_learning_rate=3e-3)
    right, test = toy_store(), toy_rows(60, 9)
    targets = torch.tensor([LABELS.index(row["label"]) for row in test])
    studied = study(right, settings, 0.1, 0, tmp_path / "right.safetensors")
    assert studied.losses[-1] < 0.5 * studied.losses[0]
    rows = studied.student.encode([row["text"] for row in test], "test")
    own, places = studied.student.read(rows)
    how = Retrieval(neighbours=8, share=0.9, temperature=0.1)
    accuracies = []
    for values in (studied.store, toy_store(wrong=True).divided(0.1)[0]):
        found, _ = retrieved(values, places, how, Exact(studied.store.keys))
        accuracies.append(float((mixed(own, found, 0.9).argmax(1) == targets).float().mean()))
    assert accuracies[0] > 0.8
    assert accuracies[1] < accuracies[0] - 0.3
    # It is a plain folder, which reads what is at the end of a shorter text as the student does.
    studied.student.save(tmp_path / "student")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    read = tokenizer([row["text"] for row in test], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=read.input_ids, attention_mask=read.attention_mask).logits
    torch.testing.assert_close(logits.softmax(-1), own, rtol=1e-4, atol=1e-5)


def test_the_store_is_used_as_far_as_it_helps(tmp_path: Path) -> None:
    settings = studying()
    store = toy_store()
    student = new_student([item.text for item in store.items], LABELS, settings, 0)
    _, apart = store.divided(0.1)
    # Keys by which the nearest item has the right label, or never has; the student knows nothing yet.
    _, places = student.read(student.encode([item.text for item in apart.items], "t"))
    helps = Store(LABELS, apart.items, apart.probabilities, apart.embeddings, places)
    assert chosen_retrieval(student, helps, apart, 0.01, (1, 2)).share == 0.9
    told = Store(LABELS, apart.items, apart.probabilities[:, [1, 2, 0]], apart.embeddings, places)
    assert chosen_retrieval(student, told, apart, 0.01, (1, 2)).share == 0.0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("brt:hidden_size=8", "no models of type 'brt'; did you mean 'bert'?"),
        ("bert:hidden_size", "expected FIELD=VALUE, not 'hidden_size'"),
        ("bert:hidden_size=30,num_attention_heads=4", "no classifier can be made of it"),
        ("none.json", "cannot be read"),
        ("", "expected MODEL_TYPE:FIELD=VALUE"),
    ],
)
def test_a_bad_student_is_one_line(spec: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        student_config(spec, LABELS, 100)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_student_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 24}))
    assert parsed_spec(str(tmp_path / "config.json")) == {"model_type": "bert", "hidden_size": 24}
    spec = "bert:hidden_size=32,num_attention_heads=2,max_position_embeddings=16"
    with pytest.raises(RecipeError, match=r"student\.length 40: the student has 16 positions"):
        new_student(["a b"], LABELS, studying(student_config=spec), 0)
    student = new_student([row["text"] for row in toy_rows(30)], LABELS, studying(student_length=6), 0)
    with pytest.raises(DataError, match=r"t: text 2 has \d+ tokens and the student reads 6"):
        student.encode(["cold", toy_rows(1)[0]["text"]], "t")
