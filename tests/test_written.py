"""Text that a model writes itself: what is sampled, what is left out, and runs that calibrate on it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bolaco
from bolaco.data.written import Known, Writer, Writing, first_tokens, sampled
from bolaco.errors import DataError, RecipeError, ResumeError
from tests.command import bolaco as command
from tests.command import compress, furnish, info, ok, what_counts
from tests.models import EOS, FAMILIES, POSITIONS, SPECIAL, WORDS, compressed, tiny_llama, tiny_tokenizer
from tests.processes import killed

SMALL = Writing(length=12, batch=3)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(furnish(tmp_path))
    return tmp_path


def greedily(model, start: torch.Tensor, more: int) -> list[int]:
    """The reference: the likeliest token again and again, without a cache."""
    ids = start.clone()
    for _ in range(more):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("build", [tiny_llama, FAMILIES["gpt2"]])
def test_the_start_is_greedy_and_the_rest_is_not(build) -> None:
    model, tokenizer = build(), tiny_tokenizer()
    start = torch.tensor([[7], [9], [23]])
    texts = [sampled(model, tokenizer, Writing(length=20), seed, start, greedy=4) for seed in (1, 2)]
    for row, first in enumerate(start):
        wanted = greedily(model, first[None], 4)
        # The end of a text can come anywhere.
        wanted = wanted[: wanted.index(EOS)] if EOS in wanted else wanted
        assert texts[0][row][:5] == wanted == texts[1][row][:5]
    assert texts[0] != texts[1]
    assert sampled(model, tokenizer, Writing(length=20), 1, start, greedy=4) == texts[0]


def test_a_cold_model_writes_what_is_likeliest() -> None:
    model, start = tiny_llama(), torch.tensor([[7], [9]])
    cold = Writing(length=10, temperature=1e-4)
    found = sampled(model, tiny_tokenizer(), cold, 0, start)
    for row, first in zip(found, start, strict=True):
        wanted = greedily(model, first[None], 9)
        assert row == (wanted[: wanted.index(EOS)] if EOS in wanted else wanted)


def test_a_prefix_of_embeddings_is_as_the_tokens_it_stands_for() -> None:
    model, cold = tiny_llama(), Writing(length=10, temperature=1e-4)
    before = torch.tensor([[5, 6, 7], [8, 9, 10]])
    prefix = model.get_input_embeddings()(before).detach()
    tokens = sampled(model, tiny_tokenizer(), cold, 0, before)
    behind = sampled(model, tiny_tokenizer(), Writing(length=7, temperature=1e-4), 0, torch.empty(2, 0).long(), prefix)
    assert [row[3:] for row in tokens] == behind
    some = sampled(model, tiny_tokenizer(), Writing(length=8, temperature=1e-4), 0, before[:, 2:], prefix[:, :2])
    assert [row[2:] for row in tokens] == some


def test_nothing_of_the_model_s_own_settings_counts_and_they_stay() -> None:
    model, start = tiny_llama(), torch.tensor([[7]] * 4)
    plain = sampled(model, tiny_tokenizer(), SMALL, 0, start)
    own = model.generation_config
    own.repetition_penalty, own.top_k, own.min_new_tokens = 5.0, 1, 9
    before = torch.get_rng_state()
    assert sampled(model, tiny_tokenizer(), SMALL, 0, start) == plain
    assert model.generation_config is own
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_likeliest_tokens_are_sampled() -> None:
    model, start = tiny_llama(), torch.full((400, 1), 7)
    with torch.no_grad():
        likely = model(start[:1]).logits[0, -1].double().softmax(-1).sort(descending=True)
    allowed = likely.indices[: int((likely.values.cumsum(0) < 0.5).sum()) + 1]
    rows = sampled(model, tiny_tokenizer(), Writing(length=2, top_p=0.5), 0, start)
    drawn = {row[1] if len(row) > 1 else EOS for row in rows}
    assert drawn == set(allowed.tolist())


def test_texts_begin_with_words() -> None:
    tokens = first_tokens(tiny_tokenizer())
    assert set(tokens.tolist()) == {number for number, word in enumerate([*SPECIAL, *WORDS]) if word.isalpha()}


def test_a_batch_depends_on_the_settings_and_its_number(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()

    def batch(number: int, place: str, seed: int = 0) -> list[str]:
        return Writer(model, tokenizer, Writing(length=12, batch=3, seed=seed), tmp_path / place).batch(number)

    second = batch(1, "a")
    assert batch(0, "a") != second
    assert batch(1, "b") == second
    assert batch(1, "c", seed=1) != second
    file = tmp_path / "a" / "batch-00001.json"
    file.write_text(json.dumps(["mine"]))
    assert batch(1, "a") == ["mine"]
    file.write_text('["mine"')
    with pytest.raises(ResumeError, match=r"batch-00001\.json: damaged"):
        batch(1, "a")


WORD_LISTS = st.lists(
    st.sampled_from(["river", "house", "garden", "child", "letter", "window"]), min_size=1, max_size=30
)


@given(WORD_LISTS, WORD_LISTS)
def test_the_same_words_are_known(first: list[str], second: list[str]) -> None:
    known = Known()
    assert known.is_new(" ".join(first))
    assert not known.is_new("  " + ", ".join(first).upper() + ".")
    # A known text that goes on is a copy if most of its pieces of eight words are known.
    if len(second) < len(first) - 7:
        assert not known.is_new(" ".join(first + second))


def test_other_words_are_new() -> None:
    known = Known()
    assert not known.is_new("... \n")
    assert all(known.is_new(" ".join(f"w{n}x{i}" for i in range(20))) for n in range(5))


def test_a_model_that_repeats_itself_is_not_asked_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "batch", lambda self, number: ["the same", ""])
    writer = Writer(tiny_llama(), tiny_tokenizer(), SMALL, tmp_path)
    with pytest.raises(DataError, match="1 different texts and then, in 20 batches, no other"):
        writer.until(lambda texts: len(texts) >= 2)


# --- generate-text ------------------------------------------------------------------------------------------------

CALL = ("generate-text", "model", "--sequences", "8", "--length", "12", "--batch", "3", "-o", "own.jsonl")


def test_generate_text(place: Path) -> None:
    assert "8 texts of " in ok(*CALL).out
    rows = [json.loads(line) for line in Path("own.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 8
    assert all(row.keys() == {"text"} and 0 < len(row["text"].split()) <= 12 for row in rows)
    assert not Path("own.jsonl.work").exists()
    refused = command(*CALL)
    assert refused.code == 1
    assert "own.jsonl: exists already" in refused.err
    result = bolaco.generate_text("model", 8, "again.jsonl", length=12, batch=3)
    assert Path("again.jsonl").read_bytes() == Path("own.jsonl").read_bytes()
    assert (result.texts, result.path) == (8, Path("again.jsonl"))


@pytest.mark.parametrize(
    ("where", "call", "moment"),
    [
        ("bolaco.data.written.write_text", 2, "before"),
        ("bolaco.data.written.write_text", 2, "after"),
        ("bolaco.work.folder.WorkFolder.close", 1, "before"),
    ],
)
def test_a_killed_run_goes_on(place: Path, where: str, call: int, moment: str) -> None:
    ok(*CALL[:-1], "whole.jsonl")
    assert killed(where, call, moment, CALL).returncode == -9
    assert Path("own.jsonl.work").exists()
    assert Path("own.jsonl").exists() == (moment == "before" and where.endswith("close"))
    ok(*CALL)
    assert Path("own.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert sorted(path.name for path in place.iterdir() if path.name.startswith("own")) == ["own.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--length", str(POSITIONS + 1)], f"the model has {POSITIONS} positions"),
        (["--temperature", "0"], "temperature: Input should be greater than 0 (got 0.0)"),
        (["--sequences", "0"], "sequences: Input should be greater than 0 (got 0)"),
        (["--top-p", "1.5"], "top_p: Input should be less than or equal to 1 (got 1.5)"),
    ],
)
def test_what_cannot_be_is_one_line(place: Path, words: list[str], said: str) -> None:
    done = command(*CALL, *words)
    assert done.code == 1
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not Path("own.jsonl.work").exists()


def test_a_compressed_model_writes_too(tmp_path: Path) -> None:
    out = tmp_path / "own.jsonl"
    found = bolaco.generate_text(str(compressed("llama").path), 2, out, length=8, batch=2)
    assert found.texts == 2
    with pytest.raises(RecipeError, match="lenght: there is no such field; did you mean 'length'"):
        bolaco.generate_text("model", 2, tmp_path / "other.jsonl", lenght=8)


def test_text_like_other_text(place: Path) -> None:
    rows = [{"text": "cold winter river . cold winter river ."}, {"text": "cold river winter ."}] * 12
    Path("cold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["generate-text", "model", "--sequences", "12", "--length", "10", "--batch", "12"]
    ok(*words, "-o", "plain.jsonl")
    like = [*words, "--like", "cold.jsonl", "-o"]
    said = ok(*like, "cold-too.jsonl").out
    found = re.search(r"([\d.]+) nats a token behind the prompt, ([\d.]+) at first", said)
    assert float(found[1]) < 0.5 * float(found[2])

    def share(file: str) -> float:
        texts = [json.loads(line)["text"] for line in Path(file).read_text(encoding="utf-8").splitlines()]
        said = " ".join(texts).split()
        return sum(word in ("cold", "winter", "river") for word in said) / len(said)

    assert share("cold-too.jsonl") > share("plain.jsonl") + 0.3
    assert killed("bolaco.data.written.write_text", 1, "after", [*like, "x"]).returncode == -9
    ok(*like, "x")
    assert Path("x").read_bytes() == Path("cold-too.jsonl").read_bytes()
    Path("empty.txt").write_text("  ", encoding="utf-8")
    assert "empty.txt: there is no text in it" in command(*words, "--like", "empty.txt", "-o", "y").err


# --- calibration on it --------------------------------------------------------------------------------------------


def test_calibration_on_own_text_is_that_on_a_file_of_it(place: Path) -> None:
    ok(*compress("a", "--preset", "default", calibration="self", refinement_steps=2))
    ok("generate-text", "model", "--sequences", "40", "--length", "32", "-o", "own.jsonl")
    ok(*compress("b", "--preset", "default", calibration="own.jsonl", refinement_steps=2))
    ok(*compress("c", "--preset", "default", refinement_steps=2))
    a, b, c = map(what_counts, "abc")
    assert a["recipe"]["calibration"]["source"] == "self"
    assert a["weights"] == b["weights"] != c["weights"]
    assert a["ranks"] == b["ranks"]
    assert info("a")["seconds"]["own text"] > 0


def test_a_search_and_a_comparison_on_own_text(place: Path) -> None:
    ok(*compress("searched", calibration="self"))
    assert info("searched")["recipe"]["evaluation"]["source"] == "other.txt"
    words = ["--calibration", "self", "--eval", "other.txt", "--seq-len", "32", "--set", "calibration.sequences=8"]
    words += ["--set", "evaluation.windows=4"]
    ok("compare", "model", "--methods", "svd-llm,svd", "--keep", "0.8", *words, "-o", "compared")
    loaded = tiny_llama()
    text = Path("other.txt").read_text(encoding="utf-8").splitlines()
    sizes = {"calibration.sequences": 8, "evaluation.windows": 4, "refinement.steps": 0}
    given = {"calibration": "self", "evaluation": text, "seq_len": 32, "tokenizer": tiny_tokenizer()}
    assert bolaco.compress(loaded, 0.8, options=sizes, **given).info.recipe["calibration"]["source"] == "self"


def test_a_killed_run_writes_no_batch_twice(place: Path) -> None:
    words = compress("out", "--preset", "default", calibration="self", refinement_steps=2)
    ok(*compress("whole", "--preset", "default", calibration="self", refinement_steps=2))
    assert killed("bolaco.data.written.write_text", 1, "after", words).returncode == -9
    (file,) = Path("out.work").glob("written-*/batch-00000.json")
    written = file.stat().st_mtime_ns
    ok(*words, "--keep-work")
    assert file.stat().st_mtime_ns == written
    assert what_counts("out")["weights"] == what_counts("whole")["weights"]


def test_own_text_is_not_reported_on(place: Path) -> None:
    words = ["compress", "model", "--keep", "0.8", "--calibration", "self", "--seq-len", "32", "-o", "out"]
    for more in ([], ["--eval", "self"], ["--dry-run"]):
        done = command(*words, *more)
        assert done.code == 1
        assert "name another text with --eval" in done.err
    assert not Path("out.work").exists()
    done = command("eval", "model", "--data", "self", "--seq-len", "32")
    assert done.code == 1
    assert "self: text of the model itself is there for --calibration only" in done.err
    tuned = command(*compress("out", "--preset", "default", "--tune", "factors", calibration="self"))
    assert "tuning: data.source: text of the model itself calibrates only" in tuned.err
    said = ok(*compress("out", "--preset", "default", "--dry-run", calibration="self")).out
    assert "8 x 32 tokens of self, which the model writes in the run" in " ".join(said.split())


def test_what_else_is_wrong_is_said_before_anything_is_written(place: Path) -> None:
    done = command(*compress("out", "--preset", "default", "--eval", "nothing.txt", calibration="self"))
    assert done.code == 1
    assert "nothing.txt: no such file" in done.err
    assert not Path("out.work").exists()


def test_a_file_of_that_name_is_what_it_is(place: Path) -> None:
    Path("self").mkdir()
    Path("text.txt").rename("self/text.txt")
    ok(*compress("out", "--preset", "default", calibration="self", refinement_steps=2))
    assert "own text" not in info("out")["seconds"]
