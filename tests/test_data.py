"""Text sources, packing, and the texts of a run."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bolaco.data.sources import TokenStream, adds_bos, fingerprint, read_documents
from bolaco.data.texts import Texts
from bolaco.errors import DataError
from bolaco.recipe.recipe import Recipe, make_recipe
from bolaco.runs.session import Source, texts_for
from tests.models import BOS, english, tiny_tokenizer, write_english

MODEST = settings(max_examples=40, deadline=None, derandomize=True)


def write_jsonl(path: Path, texts: Sequence[Any], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: Sequence[str], column: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({column: texts, "id": list(range(len(texts)))}), path)
    return path


def read(source: Path | str) -> list[str]:
    return list(read_documents(str(source)))


# --- sources


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree – ü\n", encoding="utf-8")
    assert read(path) == ["one\ntwo\n\nthree – ü\n"]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_rows_are_documents(tmp_path: Path, write: Any) -> None:
    suffix = write.__name__.removeprefix("write_")
    path = write(tmp_path / f"rows.{suffix}", ["one", "", "two\nlines", "  \n", "three"])
    assert read(path) == ["one", "two\nlines", "three"]


def test_a_json_array_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "array.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    assert read(path) == ["one", "two"]


def test_a_long_file_is_read_whole_and_in_order(tmp_path: Path) -> None:
    texts = [f"document {i} " + "word " * 50 for i in range(5000)]
    assert read(write_jsonl(tmp_path / "long.jsonl", texts)) == texts


def test_a_folder_is_read_file_by_file_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("C")
    (tmp_path / "b.txt").write_text("B")
    write_jsonl(tmp_path / "a.jsonl", ["A1", "A2"])
    write_parquet(tmp_path / "z.parquet", ["Z"])
    (tmp_path / "notes.md").write_text("not a source")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder.txt").mkdir()
    assert read(tmp_path) == ["A1", "A2", "B", "C", "Z"]
    assert read(f"{tmp_path}[1:3]") == ["A2", "B"]


@pytest.mark.parametrize(
    ("piece", "expected"),
    [("[:2]", [0, 1]), ("[3:]", [3, 4]), ("[1:3]", [1, 2]), ("[:]", [0, 1, 2, 3, 4]), ("[4:99]", [4]), ("[9:]", [])],
)
def test_slices_of_documents(tmp_path: Path, piece: str, expected: list[int]) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [f"text {i}" for i in range(5)])
    assert read(f"{path}{piece}") == [f"text {i}" for i in expected]


def test_pydoc_is_python_s_own_documentation() -> None:
    topics = pydoc_data.topics.topics
    assert read("pydoc") == [topics[name] for name in sorted(topics)]
    assert read("pydoc[:2]") == [topics[name] for name in sorted(topics)[:2]]
    assert sum(map(len, read("pydoc"))) > 400_000


def test_a_file_called_pydoc_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pydoc").mkdir()
    (tmp_path / "pydoc" / "a.txt").write_text("mine")
    assert read("pydoc") == ["mine"]


@pytest.mark.parametrize("name", ["a[1].txt", "a*.txt", "a?.txt", "a b.txt", "a#ü.txt", "a%20b.txt", "{a}.txt"])
def test_names_with_special_characters_are_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "a1.txt").write_text("another")
    (tmp_path / "ab.txt").write_text("another")
    (tmp_path / name).write_text("this one")
    assert read(tmp_path / name) == ["this one"]


def test_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("A")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("a.txt") == read("./a.txt") == read("~/a.txt") == ["A"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("missing/folder/", None, "no such file"),
        ("notes.md", b"text", r"unknown kind of file; known are \.txt, \.jsonl, \.json, \.parquet"),
        ("binary.txt", b"\xff\xfe\x00\x80", "cannot be read.*utf-8"),
        ("other.jsonl", b'{"content": "x", "id": 1}\n', r"rows have no 'text' string \(they have content, id\)"),
        ("number.jsonl", b'{"text": 3}\n', r"rows have no 'text' string \(text is int\)"),
        ("number.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"rows have no 'text' string \(text is int\)"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "cannot be read.*JSON"),
        ("strings.jsonl", b'"a"\n"b"\n', "line 1: a row is str"),
        ("binary.jsonl", b"\xff\xfe{}", "cannot be read"),
        ("broken.parquet", b"PAR1 and no more", "cannot be read.*Parquet"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    source = f"{tmp_path}/{name}"
    with pytest.raises(DataError, match=message) as caught:
        read(source)
    assert str(caught.value).startswith(str(Path(source)))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_text_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "titles.parquet", ["a"], column="title")
    with pytest.raises(DataError, match=r"titles\.parquet: rows have no 'text' string \(they have title, id\)"):
        read(path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("nothing to read")
    with pytest.raises(DataError, match=r"the folder holds no \.txt, \.jsonl, \.json, \.parquet file"):
        read(tmp_path)


@pytest.mark.parametrize("source", ["", "a data set", "a/b/c", "id:config:split:more"])
def test_what_is_neither_a_file_nor_an_id_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="neither a file, a folder nor a hub data set id"):
        read(source)


def test_files_are_read_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def unreachable(*address: object, **_: object) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    (tmp_path / "a.txt").write_text("A")
    write_jsonl(tmp_path / "b.jsonl", ["B"])
    write_parquet(tmp_path / "c.parquet", ["C"])
    assert read(tmp_path) == ["A", "B", "C"]
    assert asked == []


def test_a_source_is_opened_when_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "b.jsonl").write_text("broken")
    assert read(f"{tmp_path}[:1]") == ["A"]
    documents = read_documents(str(tmp_path / "missing.txt"))
    with pytest.raises(DataError):
        next(documents)


def test_a_hub_id_without_network_fails_soon_and_by_name(tmp_path: Path) -> None:
    program = """
import sys
from bolaco.data.sources import read_documents
from bolaco.errors import DataError
for source in sys.argv[1:]:
    try:
        next(iter(read_documents(source)))
    except DataError as error:
        print(error)
"""
    broken = tmp_path / "broken.jsonl"
    broken.write_text("broken\n")
    sources = ["no-such-owner/no-such-data:config:test", str(broken)]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, *sources],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    errors = done.stdout.splitlines()
    assert len(errors) == 2
    assert all(error.startswith(f"{name}: cannot be read") for name, error in zip(sources, errors, strict=True))
    assert done.stderr == ""  # the libraries say nothing of their own
    assert time.monotonic() - start < 60


def test_hub_ids_carry_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(builder: str, **arguments: Any) -> list[dict[str, str]]:
        asked.append((builder, arguments))
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("bolaco.data.sources.check_hub", lambda *_: None)
    for source in ("allenai/c4", "owner/data:config:test", "wikitext:raw", "owner/data::validation"):
        assert read(f"{source}[:1]") == ["a"]
    assert [(name, a["name"], a["split"]) for name, a in asked] == [
        ("allenai/c4", "en", "train"),
        ("owner/data", "config", "test"),
        ("wikitext", "raw", "train"),
        ("owner/data", None, "validation"),
    ]
    assert all(a["streaming"] for _, a in asked)


# --- columns and conversations

TURNS = [{"role": "user", "content": "the old river"}, {"role": "assistant", "content": "sees a house", "note": None}]
TEMPLATE = (
    "<s>{% for m in messages %} {{ m.role }} , {{ m.content }}{% if m.note is defined %} no{% endif %}{% endfor %}"
)


def write_saved(path: Path, rows: Sequence[Any], column: str = "text") -> Path:
    datasets.Dataset.from_list([{column: row, "id": i} for i, row in enumerate(rows)]).save_to_disk(path)
    return path


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet, "saved": write_saved}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_column_of_another_name(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / f"rows.{kind}", ["one", None, "two", ""], column="body")
    assert list(read_documents(str(path), "body")) == ["one", "two"]
    for column, names in ((None, "text"), ("other", "other")):
        message = rf"rows have no '{names}' string \(they have body, id\); name the column with --text-column"
        with pytest.raises(DataError, match=message):
            list(read_documents(str(path), column))


def test_a_column_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"body": "a", "text": "b"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    monkeypatch.setattr("bolaco.data.sources.check_hub", lambda *_: None)
    assert list(read_documents("owner/data", "body")) == ["a"]
    assert list(read_documents("owner/data")) == ["b"]


def test_files_of_text_have_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A")
    write_jsonl(tmp_path / "b.jsonl", ["B"], column="body")
    assert list(read_documents(str(tmp_path), "body")) == ["A", "B"]
    assert next(iter(read_documents("pydoc", "body")))


def chatting(template: str | None = TEMPLATE, **options: Any) -> Any:
    tokenizer = tiny_tokenizer(**options)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("column", ["messages", "dialogue"])
def test_conversations_are_written_by_the_chat_template(tmp_path: Path, kind: str, column: str) -> None:
    path = WRITERS[kind](tmp_path / f"rows.{kind}", [TURNS, None, TURNS, []], column=column)
    tokenizer = chatting(bos=True)
    expected = tokenizer("<s> user , the old river assistant , sees a house", add_special_tokens=False).input_ids
    named = None if column == "messages" else column
    blocks = TokenStream(str(path), tokenizer, "text", column=named).take(None, len(expected), "test")
    assert blocks.tolist() == [expected, expected]  # one BOS each, that of the template
    (block,) = TokenStream(str(path), tokenizer, "window", column=named).take(1, len(expected) + 3, "test").tolist()
    assert block == [*expected, *expected[1:4]]  # BOS is the window's alone


def test_text_comes_before_conversations(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": TURNS, "text": "river"}) + "\n")
    assert read(tmp_path / "rows.jsonl") == ["river"]


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        ([TURNS], None, "rows are conversations, but the tokenizer has no chat template"),
        ([TURNS], "{{ raise_exception('no such role') }}", "the chat template refuses a conversation: no such"),
        ([[{"from": "human", "value": "x"}]], TEMPLATE, "messages must be a list of turns, each with a role and its"),
        ([["a", "b"]], TEMPLATE, r"rows have no 'messages' string \(messages is list\)"),
    ],
)
def test_conversations_that_cannot_be_written(tmp_path: Path, rows: Any, template: str | None, message: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows, column="messages")
    with pytest.raises(DataError, match=message) as caught:
        TokenStream(str(path), chatting(template)).take(1, 2, "test")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_conversation_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="by the template of a tokenizer only"):
        read(write_jsonl(tmp_path / "rows.jsonl", [TURNS], column="messages"))


def test_a_slice_behind_the_last_document(tmp_path: Path) -> None:
    path = write_english(tmp_path / "text.txt", 200)
    message = (
        r"takes what follows document 70, but .*text\.txt has 1 in all; a slice counts documents, and a \.txt file"
    )
    with pytest.raises(DataError, match=message):
        TokenStream(f"{path}[70:]", tiny_tokenizer()).take(1, 8, "test")
    with pytest.raises(DataError, match="too short for test"):  # there is such a document, but it is short
        TokenStream(f"{write_jsonl(tmp_path / 'a.jsonl', ['river'] * 3)}[2:]", tiny_tokenizer()).take(1, 8, "test")


# --- packing


class Letters:
    """A tokenizer of one token per character, with a BOS token it does or does not add itself."""

    def __init__(self, bos: int | None = 0, adds: bool = False) -> None:
        self.bos_token_id, self.adds = bos, adds

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        start = [self.bos_token_id] if self.adds and add_special_tokens else []
        return SimpleNamespace(input_ids=[*start, *(ord(c) for c in text)])


def stream(tmp_path: Path, documents: Sequence[str], tokenizer: Any = None, **options: Any) -> TokenStream:
    return TokenStream(str(write_jsonl(tmp_path / "text.jsonl", documents)), tokenizer or Letters(), **options)


def text_of(blocks: torch.Tensor) -> list[str]:
    return ["".join(chr(i) if i else "^" for i in row.tolist()) for row in blocks]


def test_documents_are_packed_without_separators_and_the_rest_is_dropped(tmp_path: Path) -> None:
    blocks = stream(tmp_path, ["abc", "de", "fghij", "kl"]).take(None, 5, "test")
    assert text_of(blocks) == ["abcde", "fghij"]
    assert blocks.dtype == torch.int64


@MODEST
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    takes=st.lists(st.tuples(st.integers(1, 4), st.integers(2, 9)), max_size=6),
)
def test_takes_are_disjoint_and_in_order(
    tmp_path_factory: Any, lengths: list[int], takes: list[tuple[int, int]]
) -> None:
    letters = [chr(0x4E00 + i) for i in range(sum(lengths))]
    whole = "".join(letters)
    documents = []
    for length in lengths:
        documents.append("".join(letters[:length]))
        letters = letters[length:]
    source = stream(tmp_path_factory.mktemp("takes"), documents)
    taken = ""
    for count, length in takes:
        if len(whole) - len(taken) < count * length:
            with pytest.raises(DataError, match=f"{count} x {length} tokens are needed, {len(whole) - len(taken)} are"):
                source.take(count, length, "test")
            return
        blocks = source.take(count, length, "test")
        assert blocks.shape == (count, length)
        taken += "".join(text_of(blocks))
        assert whole.startswith(taken)
    left = len(whole) - len(taken)
    if left >= 2:
        rest = source.take(None, 2, "test")
        assert whole[len(taken) :][: left // 2 * 2] == "".join(text_of(rest))


def test_no_more_is_read_than_is_needed(tmp_path: Path) -> None:
    source = stream(tmp_path, ["abcd"] * 100)
    source.take(2, 5, "test")
    assert source.tokens_read == 12


def test_a_text_too_short_is_refused_with_both_numbers(tmp_path: Path) -> None:
    source = stream(tmp_path, ["abcdefg"])
    with pytest.raises(DataError, match=r"too short for calibration: 2 x 4 tokens are needed, 7 are left") as caught:
        source.take(2, 4, "calibration")
    assert str(caught.value).startswith(str(tmp_path / "text.jsonl"))
    with pytest.raises(DataError, match="1 x 9 tokens are needed, 7 are left"):
        stream(tmp_path, ["abcdefg"]).take(None, 9, "evaluation")
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(DataError, match=r"empty\.txt: too short for calibration: 1 x 4 .* 0 are left"):
        TokenStream(str(empty), Letters()).take(1, 4, "calibration")


def test_after_a_refusal_nothing_is_lost(tmp_path: Path) -> None:
    source = stream(tmp_path, ["abc", "defg"])
    with pytest.raises(DataError):
        source.take(2, 4, "calibration")
    assert text_of(source.take(1, 4, "calibration")) == ["abcd"]


def test_bos_as_the_tokenizer_adds_it_or_once_per_window(tmp_path: Path) -> None:
    documents = ["abc", "de", "fghijk"]
    adding = Letters(adds=True)
    assert text_of(stream(tmp_path, documents, adding, bos="text").take(2, 5, "t")) == ["^abc^", "de^fg"]
    assert text_of(stream(tmp_path, documents, adding, bos="window").take(2, 5, "t")) == ["^abcd", "^efgh"]
    plain = Letters(adds=False)
    assert text_of(stream(tmp_path, documents, plain, bos="text").take(2, 5, "t")) == ["abcde", "fghij"]
    assert text_of(stream(tmp_path, documents, plain, bos="window").take(None, 6, "t")) == ["^abcde", "^fghij"]


def test_auto_takes_a_bos_per_window_for_gemma_only(tmp_path: Path) -> None:
    for model_type, window in [("gemma2", True), ("gemma3_text", True), ("llama", False), ("", False)]:
        assert stream(tmp_path, ["abc"], model_type=model_type).window_bos is window
        assert stream(tmp_path, ["abc"], bos="text", model_type=model_type).window_bos is False
    with pytest.raises(DataError, match="needs a tokenizer with a BOS token"):
        stream(tmp_path, ["abc"], Letters(bos=None), bos="window")


def test_a_real_tokenizer_packs_the_same_way(tmp_path: Path) -> None:
    texts = [english(40, seed) for seed in range(3)]
    plain, adding = tiny_tokenizer(), tiny_tokenizer(bos=True)
    assert not adds_bos(plain)
    assert adds_bos(adding)
    ids = [plain(text).input_ids for text in texts]
    whole = [i for part in ids for i in part]
    blocks = stream(tmp_path, texts, plain).take(None, 16, "test")
    assert blocks.flatten().tolist() == whole[: len(whole) // 16 * 16]
    with_bos = stream(tmp_path, texts, adding, bos="text").take(None, 16, "test")
    expected = [i for part in ids for i in (BOS, *part)]
    assert with_bos.flatten().tolist() == expected[: len(expected) // 16 * 16]
    windows = stream(tmp_path, texts, adding, bos="window").take(3, 16, "test")
    assert windows[:, 0].tolist() == [BOS] * 3
    assert windows[:, 1:].flatten().tolist() == whole[:45]


# --- fingerprints


def test_the_fingerprint_changes_with_any_token_and_with_the_shape() -> None:
    blocks = torch.arange(12).view(3, 4)
    first = fingerprint(blocks)
    assert fingerprint(blocks.clone()) == first
    assert fingerprint(blocks.T.contiguous().T) == first  # layout in memory is no content
    for i in range(12):
        other = blocks.clone()
        other.view(-1)[i] += 1
        assert fingerprint(other) != first
    assert fingerprint(blocks.view(4, 3)) != first
    assert fingerprint(blocks[:2], blocks[2:]) != first
    assert fingerprint(blocks, blocks) != first


# --- the texts of a run


def recipe(source: Path | str, **values: Any) -> Recipe:
    base = {
        "model": "m",
        "keep": 0.8,
        "calibration": {"source": str(source), "sequences": 4, "seq_len": 16},
        "validation": {"candidates": 3, "sequences": 2},
        "evaluation": {"windows": 2},
    }
    for name, section in values.items():
        base[name] = (base.get(name) or {}) | section
    return make_recipe(base, "bolaco-5x1")


def texts_of(given: Recipe, **words: Any) -> Texts:
    """The texts of a recipe for a model of 64 positions."""
    config = SimpleNamespace(model_type="llama", max_position_embeddings=64)
    return texts_for(given, Source("m", None, config, tiny_tokenizer()), **words)


def test_one_source_serves_all_purposes_with_disjoint_tokens(tmp_path: Path) -> None:
    path = write_english(tmp_path / "a.txt", 400)
    texts = texts_of(recipe(path))
    assert texts.candidates is not None
    shapes = [tuple(t.shape) for t in (texts.calibration, texts.candidates, texts.evaluation)]
    assert shapes == [(4, 16), (3, 16), (2, 16)]
    together = torch.cat([texts.calibration, texts.candidates, texts.evaluation]).flatten().tolist()
    assert together == tiny_tokenizer()(path.read_text()).input_ids[: 9 * 16]
    assert texts.evaluation_source == str(path)


def test_each_purpose_may_have_its_own_source_and_length(tmp_path: Path) -> None:
    paths = [write_english(tmp_path / f"{i}.txt", 300, seed=i) for i in range(3)]
    values = {"source": str(paths[1]), "seq_len": 12}, {"source": str(paths[2]), "seq_len": 20, "windows": None}
    texts = texts_of(recipe(paths[0], validation=values[0], evaluation=values[1]))
    ids = [tiny_tokenizer()(path.read_text()).input_ids for path in paths]
    assert texts.candidates is not None
    assert texts.calibration.flatten().tolist() == ids[0][:64]
    assert texts.candidates.flatten().tolist() == ids[1][:36]
    assert texts.evaluation.flatten().tolist() == ids[2][: len(ids[2]) // 20 * 20]
    assert texts.evaluation_source == str(paths[2])


def test_the_column_of_the_calibration_is_that_of_the_others(tmp_path: Path) -> None:
    """As its length is; a run that reads another column computes everything anew."""
    path = tmp_path / "rows.jsonl"
    rows = [{"a": english(200, 1), "b": english(200, 2), "text": english(200, 3)}]
    path.write_text(json.dumps(rows[0]) + "\n")
    ids = {name: tiny_tokenizer()(text).input_ids for name, text in rows[0].items()}
    plain, other = recipe(path), recipe(path, calibration={"text_column": "a"})
    found = [texts_of(given) for given in (plain, other)]
    assert found[0].calibration.flatten().tolist() == ids["text"][:64]
    together = torch.cat([found[1].calibration, found[1].candidates, found[1].evaluation]).flatten().tolist()
    assert together == ids["a"][:144]
    assert fingerprint(found[0].calibration) != fingerprint(found[1].calibration)
    third = texts_of(recipe(path, calibration={"text_column": "a"}, evaluation={"text_column": "b"}))
    assert torch.equal(third.candidates, found[1].candidates)
    assert third.evaluation.flatten().tolist() == ids["b"][:32]


def test_without_a_search_no_validation_text_is_read(tmp_path: Path) -> None:
    path = write_english(tmp_path / "a.txt", 300)
    texts = texts_of(recipe(path, search={"name": "hand"}))
    assert texts.candidates is None
    ids = tiny_tokenizer()(path.read_text()).input_ids
    assert texts.evaluation.flatten().tolist() == ids[64:96]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"calibration": {"sequences": 100}}, "too short for calibration: 100 x 16"),
        ({"validation": {"candidates": 100}}, "too short for validation: 100 x 16"),
        ({"evaluation": {"windows": 100}}, "too short for evaluation: 100 x 16"),
        ({"calibration": {"seq_len": 65}}, "calibration: sequences of 65 tokens, but the model has 64 positions"),
        ({"validation": {"seq_len": 70}}, "validation: sequences of 70 tokens, but the model has 64"),
        ({"evaluation": {"seq_len": 70}}, "evaluation: sequences of 70 tokens, but the model has 64"),
    ],
)
def test_texts_that_do_not_do_are_refused_by_purpose(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = write_english(tmp_path / "a.txt", 400)
    with pytest.raises(DataError, match=message):
        texts_of(recipe(path, **values))


def test_the_fingerprint_of_texts_changes_with_the_file(tmp_path: Path) -> None:
    """Each purpose has its own, so that a change repeats what depends on it and nothing else."""
    path = write_english(tmp_path / "a.txt", 400)

    def found() -> tuple[str, ...]:
        texts = texts_of(recipe(path))
        assert texts.candidates is not None
        return fingerprint(texts.calibration), fingerprint(texts.candidates), texts.measured

    first = found()
    assert len(set(first)) == 3
    assert found() == first
    ids = tiny_tokenizer()(path.read_text()).input_ids
    # One word in the text of each purpose; no word has another length in tokens.
    for position, changes in ((3, 0), (70, 1), (120, 2)):
        words = path.read_text().replace(".", " . ").replace(",", " , ").split()
        assert len(words) == len(ids)
        original, words[position] = path.read_text(), "teacher" if words[position] != "teacher" else "doctor"
        path.write_text(" ".join(words))
        assert [a != b for a, b in zip(found(), first, strict=True)] == [i == changes for i in range(3)]
        path.write_text(original)


def test_what_is_measured_includes_the_further_texts(tmp_path: Path) -> None:
    path, other = write_english(tmp_path / "a.txt", 400), write_english(tmp_path / "b.txt", 400, seed=1)
    plain, more = (texts_of(recipe(path), more=words) for words in ((), (str(other),)))
    assert torch.equal(plain.evaluation, more.evaluation)
    assert [source for source, _ in more.others] == [str(other)]
    assert more.others[0][1].shape == more.evaluation.shape
    assert plain.measured != more.measured
    write_english(other, 400, seed=2)
    assert texts_of(recipe(path), more=(str(other),)).measured not in (plain.measured, more.measured)


def test_a_calibration_text_that_nobody_reads_is_left_alone(tmp_path: Path) -> None:
    """Unless other text comes from the same source: that is then the same as in a run that calibrates."""
    path, other = write_english(tmp_path / "a.txt", 400), write_english(tmp_path / "b.txt", 400, seed=1)
    nowhere = recipe(
        tmp_path / "nothing.txt", method={"name": "svd"}, search={"name": "hand"}, evaluation={"source": str(other)}
    )
    assert not nowhere.calibrates
    assert texts_of(nowhere).calibration.shape == (0, 16)
    with pytest.raises(DataError, match=r"nothing\.txt: no such file"):
        texts_of(nowhere, calibrates=True)
    alone = recipe(path, method={"name": "svd"}, search={"name": "hand"})
    calibrating = recipe(path, search={"name": "hand"})
    assert torch.equal(texts_of(alone).evaluation, texts_of(calibrating).evaluation)
