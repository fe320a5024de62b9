"""The parts of tuning against references: the loss in slabs, the folds, the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bolaco.errors import DataError, RecipeError
from bolaco.evaluation.losses import IGNORED, summed_losses
from bolaco.evaluation.objective import Head
from bolaco.evaluation.perplexity import perplexity
from bolaco.layers import LowRankLinear, PivotedLinear
from bolaco.recipe.recipe import make_recipe
from bolaco.storage.block import low_rank_linear
from bolaco.storage.pivot import pivot
from bolaco.tune.data import TuneData, _rows, prepare_data
from bolaco.tune.factored import balanced, stored
from bolaco.tune.loss import Student, mean_loss
from bolaco.tune.mode import Matrix
from bolaco.tune.modes.diagonal import DiagonalLinear
from bolaco.tune.resolve import trainer_fields
from bolaco.tune.settings import make_settings
from bolaco.tune.trainer import total_steps
from tests.models import BOS, EOS, FAMILIES, english, text_file, tiny_llama, tiny_tokenizer, token_blocks


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the loss ---------------------------------------------------------------------------------------------------------


def shifted(tokens: Tensor, ignored: int) -> Tensor:
    """Labels of token blocks, of which the first ``ignored`` of each carry no loss."""
    labels = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), IGNORED)], dim=1)
    labels[:, :ignored] = IGNORED
    return labels


def reference(model: Any, teacher: Any, tokens: Tensor, labels: Tensor, weight: float) -> Tensor:
    """The loss as it is defined, on all logits at once, from the models' own forward passes."""
    logits = model(input_ids=tokens, use_cache=False).logits
    with torch.no_grad():
        wanted = teacher(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    rows = labels != IGNORED
    ours = logits.log_softmax(-1)[rows]
    nll = F.nll_loss(ours, labels[rows])
    kl = F.kl_div(ours, wanted[rows], log_target=True, reduction="sum") / rows.sum()
    return (1 - weight) * nll + weight * kl


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2"])
@pytest.mark.parametrize(("weight", "chunk"), [(0.0, 1), (0.3, 7), (1.0, None)])
def test_loss_in_slabs_is_the_loss(family: str, weight: float, chunk: int | None) -> None:
    model, teacher = FAMILIES[family]().double(), FAMILIES[family]().double()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    tokens = token_blocks(3, 11, seed=4)
    labels = shifted(tokens, 2)
    gradients = []
    for slabs in (False, True):
        model.zero_grad()
        loss = (
            Student(model, weight, teacher, chunk)(tokens, labels)["loss"]
            if slabs
            else reference(model, teacher, tokens, labels, weight)
        )
        loss.backward()
        gradients.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-11)


def test_no_more_logits_exist_than_a_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    tokens = token_blocks(4, 16)
    sizes: list[int] = []
    call = Head.__call__
    monkeypatch.setattr(Head, "__call__", lambda self, h: sizes.append(len(h)) or call(self, h))
    student = Student(model, chunk=5)
    sizes.clear()
    student(tokens, shifted(tokens, 0))["loss"].backward()
    assert max(sizes) == 5
    assert sum(sizes) == 2 * 4 * 15  # forward, and again for the gradient


def test_batches_of_a_step_count_by_their_labels() -> None:
    """Two forward passes with the step's number of labels add up to one pass over both."""
    model, tokens = tiny_llama().double(), token_blocks(2, 12)
    labels = shifted(tokens, 1)
    labels[0, :6] = IGNORED
    student, count = Student(model), (labels != IGNORED).sum()
    parts = [student(tokens[i : i + 1], labels[i : i + 1], num_items_in_batch=count)["loss"] for i in range(2)]
    torch.testing.assert_close(sum(parts), student(tokens, labels)["loss"])


def test_measured_loss_is_perplexity() -> None:
    model, data = tiny_llama(), data_of(text_file(), evaluation=5)
    loss, tokens = mean_loss(model, data.evaluation, data.collate, 2)
    blocks = torch.stack([example["input_ids"] for example in data.evaluation])
    known = perplexity(model, blocks)
    assert tokens == known.tokens
    assert loss == pytest.approx(torch.tensor(known.perplexity, dtype=torch.float64).log().item(), rel=1e-6)


def test_kl_of_a_model_with_itself_is_zero() -> None:
    model = tiny_llama().double()
    head, hidden = Head(model), normal(9, 32, seed=1)
    with torch.no_grad():
        _, kl = summed_losses(head, hidden, torch.arange(9), (head, hidden), 4)
    assert abs(float(kl)) < 1e-10


# --- folds ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    out=st.integers(1, 12),
    inside=st.integers(1, 12),
    rank=st.integers(1, 8),
    size=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_diagonal_folds_exactly(out: int, inside: int, rank: int, size: int, seed: int) -> None:
    expand, reduce, bias = normal(out, rank, seed=seed), normal(rank, inside, seed=seed + 1), normal(out, seed=seed + 2)
    layer = low_rank_linear(expand, reduce, bias)
    chosen = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))[:size]
    tuned = DiagonalLinear(layer, chosen, 0.1)
    x = normal(5, inside, seed=seed + 3)
    torch.testing.assert_close(tuned(x), layer(x), rtol=0, atol=0)  # b starts at zero
    with torch.no_grad():
        tuned.b.copy_(normal(out, seed=seed + 4))
        tuned.d.copy_(normal(len(chosen), seed=seed + 5))
        defined = expand @ reduce + torch.diag(tuned.b) @ expand[:, chosen] @ torch.diag(tuned.d) @ reduce[chosen]
        wanted = tuned(x)
        torch.testing.assert_close(wanted, x @ defined.T + bias, rtol=1e-12, atol=1e-12)
        folded = tuned.fold()
        torch.testing.assert_close(folded(x), wanted, rtol=1e-12, atol=1e-12)
    assert folded.rank == rank
    assert torch.equal(folded.reduce.weight, reduce)


@settings(deadline=None, max_examples=25)
@given(out=st.integers(3, 12), inside=st.integers(3, 12), bias=st.booleans(), seed=st.integers(0, 99))
def test_pivoted_form_and_two_factors_are_one_matrix(out: int, inside: int, bias: bool, seed: int) -> None:
    rank = min(out, inside) - 2
    expand, reduce = normal(out, rank, seed=seed), normal(rank, inside, seed=seed + 1)
    offset = normal(out, seed=seed + 2) if bias else None
    form = pivot(expand, reduce)
    layer = PivotedLinear(inside, out, rank, bias, form.side).double()
    layer.load_state_dict(form.state(offset))
    (left, right), found = layer.factors(), layer.dense_bias()
    torch.testing.assert_close(left @ right, expand @ reduce, rtol=1e-9, atol=1e-9)
    assert (found is None) == (offset is None)
    if offset is not None:
        torch.testing.assert_close(found, offset, rtol=1e-9, atol=1e-9)
    left, right = balanced(left.detach(), right.detach())
    torch.testing.assert_close(left @ right, expand @ reduce, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(left.T @ left, right @ right.T, rtol=1e-9, atol=1e-9)
    holder = torch.nn.ModuleDict({"m": low_rank_linear(left, right, found)})
    entry: dict[str, Any] = {"kind": "pivoted", "side": "neither"}
    stored(holder, [Matrix("m", 0, ("q",), entry)])
    back = holder["m"]
    assert isinstance(back, PivotedLinear)
    assert entry == back.entry()
    assert entry["side"] == back.side
    assert sum(p.numel() for p in back.parameters()) == sum(p.numel() for p in layer.parameters())
    torch.testing.assert_close(back(normal(3, inside)), layer(normal(3, inside)), rtol=1e-9, atol=1e-9)


def test_two_factor_storage_stays_two_factors() -> None:
    layer = low_rank_linear(normal(4, 2), normal(2, 5), None)
    holder = torch.nn.ModuleDict({"m": layer})
    stored(holder, [Matrix("m", 0, ("q",), entry := {"kind": "two-factor", "rank": 2})])
    assert holder["m"] is layer
    assert entry == {"kind": "two-factor", "rank": 2}
    assert isinstance(layer, LowRankLinear)


# --- data -------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' , ' + m['content'] + ' </s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant , ' }}{% endif %}"
)


def data_of(source: Path | str, evaluation: int = 1, tokenizer: Any = None, **fields: Any) -> TuneData:
    given = {"data.seq_len": 32, "evaluation.windows": evaluation} | {
        k.replace("__", "."): v for k, v in fields.items()
    }
    made = make_settings("m", {"mode": "factors", "data": str(source)}, given)
    return prepare_data(made, tokenizer or tiny_tokenizer(), tiny_llama().config)


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return path


def spelled(data: TuneData, i: int = 0) -> tuple[str, str]:
    """The text of an example, and the part of it that is predicted."""
    example, tokenizer = data.train[i], tiny_tokenizer()
    labels = example["labels"]
    return tokenizer.decode(example["input_ids"]), tokenizer.decode(labels[labels != IGNORED])


def test_text_blocks_follow_the_held_out_ones() -> None:
    data = data_of(text_file(), evaluation=3, data__sequences=4)
    ids: list[int] = tiny_tokenizer()(text_file().read_text(), verbose=False).input_ids
    together = torch.cat([example["input_ids"] for example in (*data.evaluation, *data.train)])
    assert together.tolist() == ids[: 7 * 32]
    for example in data.train:
        assert torch.equal(example["labels"][:-1], example["input_ids"][1:])
        assert example["labels"][-1] == IGNORED


def test_other_evaluation_text_leaves_all_of_the_data(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(english(100, 5))
    data = data_of(text_file(), evaluation=2, evaluation__source=str(other), data__sequences=3)
    start = tiny_tokenizer()(text_file().read_text(), verbose=False).input_ids[:32]
    assert data.train[0]["input_ids"].tolist() == start
    assert len(data.evaluation) == 2
    assert data.evaluation_source == str(other)


def test_only_as_much_text_is_read_as_is_trained_on() -> None:
    given = {"data__seq_len": 16, "training__max_steps": 2, "training__batch": 3, "training__gradient_accumulation": 2}
    assert len(data_of(text_file(), **given).train) == 12


ROWS = {
    "prompt": {"prompt": "the old river", "response": "sees a house"},
    "instruction": {"instruction": "the old river", "input": "a garden", "output": "sees a house"},
    "instruction without input": {"instruction": "the old river", "output": "sees a house"},
    "messages": {
        "messages": [{"role": "user", "content": "the old river"}, {"role": "assistant", "content": "sees a house"}]
    },
}


@pytest.mark.parametrize("form", ROWS)
def test_only_responses_carry_loss(form: str, tmp_path: Path) -> None:
    data = data_of(jsonl(tmp_path / "d.jsonl", ROWS[form], ROWS[form]))
    assert data.kind == "instructions"
    text, predicted = spelled(data)
    assert predicted == "sees a house </s>"
    assert "the old river" in text
    assert ("a garden" in text) == (form == "instruction")
    everything = data_of(jsonl(tmp_path / "d.jsonl", ROWS[form], ROWS[form]), data__train_on="all")
    assert spelled(everything)[1] == text.partition(" ")[2]


@pytest.mark.parametrize("form", ROWS)
def test_chat_template_where_there_is_one(form: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    data = data_of(jsonl(tmp_path / "d.jsonl", ROWS[form], ROWS[form]), tokenizer=tokenizer)
    text, predicted = spelled(data)
    assert text.startswith("<s> <unk> , the old river")  # "user" and "assistant" are no words of this vocabulary
    assert predicted == "sees a house </s>"


def test_a_column_of_text_instead_of_instructions(tmp_path: Path) -> None:
    """Also one of conversations: all of it is text then, packed."""
    row = ROWS["messages"] | {"body": english(200)}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    source = jsonl(tmp_path / "d.jsonl", *[row] * 30)
    for column, text in (("body", english(200)), ("messages", "<s> user , the old river </s><s> assistant , sees")):
        data = data_of(source, tokenizer=tokenizer, data__text_column=column)
        assert data.kind == "text"
        expected = tokenizer(text, add_special_tokens=False).input_ids[:32]
        assert data.evaluation[0]["input_ids"][: len(expected)].tolist() == expected


def test_a_byte_order_mark_before_instructions(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", ROWS["prompt"], ROWS["prompt"])
    source.write_text(source.read_text(), encoding="utf-8-sig")
    assert data_of(source).kind == "instructions"


def test_every_turn_of_a_conversation_carries_loss(tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": text}
        for role, text in [("user", "the river"), ("assistant", "sees"), ("user", "a house"), ("assistant", "hears")]
    ]
    row = {"messages": turns}
    for template in (None, TEMPLATE):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        data = data_of(jsonl(tmp_path / "d.jsonl", row, row), tokenizer=tokenizer)
        assert spelled(data)[1] == "sees </s> hears </s>"


def test_bos_comes_first_where_the_tokenizer_puts_it(tmp_path: Path) -> None:
    data = data_of(jsonl(tmp_path / "d.jsonl", ROWS["prompt"], ROWS["prompt"]), tokenizer=tiny_tokenizer(bos=True))
    assert data.train[0]["input_ids"][0] == BOS
    assert data.train[0]["input_ids"][-1] == EOS


def test_a_batch_is_padded_on_the_right_and_padding_changes_nothing(tmp_path: Path) -> None:
    short, long = ROWS["prompt"], ROWS["instruction"]
    data = data_of(jsonl(tmp_path / "d.jsonl", short, short, long))
    batch = data.collate(data.train)
    length = len(data.train[0]["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, len(data.train[1]["input_ids"]))
    assert (batch["labels"][0, length:] == IGNORED).all()
    student = Student(tiny_llama().double())
    alone = student(**data.collate(data.train[:1]))["loss"]
    padded = student(batch["input_ids"][:1], batch["labels"][:1])["loss"]
    torch.testing.assert_close(alone, padded, rtol=1e-12, atol=1e-12)


def test_instructions_without_a_response_in_reach_are_left_out(tmp_path: Path) -> None:
    long = {"prompt": english(60), "response": "sees"}
    data = data_of(jsonl(tmp_path / "d.jsonl", ROWS["prompt"], long, ROWS["messages"]))
    assert len(data.train) == 1
    with pytest.raises(
        DataError, match=r"too short for evaluation: 1 instructions .* within 32 tokens are needed, 0 are left"
    ):
        data_of(jsonl(tmp_path / "d.jsonl", long))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": "b"}, "line 3: has question, answer; known are messages; instruction and output"),
        ("{broken", "line 3: no JSON"),
        ("[1]", "line 3: a list, not an object"),
        ({"prompt": 3, "response": "b"}, "line 3: prompt is int, not a string"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "line 3: messages must be a list of objects"),
        ({"messages": "hello"}, "line 3: messages must be a list of objects"),
    ],
    ids=["keys", "json", "list", "number", "role", "messages"],
)
def test_malformed_rows_are_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        data_of(jsonl(tmp_path / "d.jsonl", ROWS["prompt"], ROWS["prompt"], row))


def test_jsonl_of_text_is_text(tmp_path: Path) -> None:
    data = data_of(jsonl(tmp_path / "d.jsonl", {"text": english(200)}))
    assert data.kind == "text"


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"training.max_steps": 7}, 7),
        ({"training.epochs": 1}, 3),
        ({"training.epochs": 2.5}, 8),
        ({"training.epochs": 9, "training.max_steps": 5}, 5),
        ({"training.epochs": 1, "training.gradient_accumulation": 2}, 2),
    ],
)
def test_steps(fields: dict[str, Any], steps: int) -> None:
    made = make_settings("m", {"mode": "factors", "data": "d", "batch": 4}, fields)
    assert total_steps(made, 10, 1) == steps


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("nowhere", "nowhere is not supported"),
        (["none", "nowhere"], "nowhere is not supported"),
        ({"a": 1}, "expected a name, or a list of names"),
        (True, "expected a name"),
        ([1], "expected a name"),
        ("comet_ml", "requires"),
    ],
)
def test_reports_that_cannot_be_sent_are_known_before_the_model_is_read(value: Any, part: str) -> None:
    with pytest.raises(RecipeError, match=r"^trainer\.report_to: ") as caught:
        trainer_fields({"report_to": value})
    assert part in str(caught.value)
    for fine in ("none", "all", ["none"], []):
        assert trainer_fields({"report_to": fine}) == {"report_to": fine}


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30, 1.5, "x", True])
def test_seeds_that_no_generator_takes(seed: Any) -> None:
    with pytest.raises(RecipeError, match=r"^seed: "):
        make_settings("m", {"mode": "factors", "data": "x"}, {"seed": seed})
    with pytest.raises(RecipeError, match=r"^seed: "):
        make_recipe({"model": "m", "keep": 0.5, "seed": seed})
    make_settings("m", {"mode": "factors", "data": "x", "seed": 2**32 - 1})


def test_instructions_that_are_no_text_name_their_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "the river", "response": "the house"}).encode()
    for bad in (b"\xff\xfe", b'{"prompt": "\\ud800", "response": "x"}', b"[" * 10**5, b"9" * 5000, b"{"):
        file.write_bytes(good + b"\n" + bad + b"\n")
        with pytest.raises(DataError, match=r"rows\.jsonl, line 2: no JSON"):
            list(_rows(str(file)))
    file.write_bytes(b"\xef\xbb\xbf" + good)
    assert [number for number, _ in _rows(str(file))] == [1]
