"""Model cards and tables in Markdown: what comes from outside says nothing but itself, as a parser reads it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from bolaco.checkpoint.info import CompressedInfo, TunedInfo
from bolaco.report.card import model_card, tuned_card
from bolaco.report.comparison import markdown
from bolaco.report.markdown import code, fenced, plain
from bolaco.report.record import ComparisonRecord

V1 = Path(__file__).parent / "golden" / "v1"
HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a|b",
    "`",
    "``` <b>bold</b>",
    "a\n\n```\n<script>alert(1)</script>\n```\n",
    "[click](javascript:alert(1))",
    "![](https://example.org/pixel.png)",
    "\x1b[31mred\x1b[0m\x07",
    "&lt;b&gt; & <b>",
    "x\u202ey",
)


def tokens(text: str) -> Iterator[Token]:
    """Everything that a page of this Markdown would have, in order."""
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(text):
        yield token
        yield from token.children or ()


def harmless(text: str) -> list[Token]:
    """The same, once nothing from outside is in it but text."""
    found = list(tokens(text))
    assert not [token for token in found if token.type in ("html_block", "html_inline", "image")]
    links = [token.attrs["href"] for token in found if token.type == "link_open"]
    assert set(links) <= {"report.html"}
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    return found


def values(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((V1 / name).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_of_hostile_names(name: str) -> None:
    record = values("tuned/bolaco.json")
    record |= {"model": name, "method": name, "storage": name}
    record["perplexity"]["data"] = name
    record["seconds"] = {name: 1.0}
    record["recipe"] |= {"model": name}
    record["tuning"] |= {"model": name, "mode": name, "paper": name, "note": name}
    record["tuning"]["perplexity"]["data"] = name
    record["tuning"]["settings"]["data"]["source"] = name
    folder = " ".join(name.split())  # as a folder can be called
    card = model_card(CompressedInfo.model_validate(record), folder)
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert set(yaml.safe_load(front)) <= {"library_name", "pipeline_tag", "tags", "base_model"}
    found = harmless(body)
    assert [token.info for token in found if token.type == "fence"] == ["python", "yaml"]
    assert sum(token.type == "heading_open" for token in found) == 4
    assert sum(token.type == "table_open" for token in found) == 1
    tuned = TunedInfo.model_validate({key: record[key] for key in ("format", "model_type", "tuning")})
    harmless(tuned_card(tuned, folder).removeprefix("---\n").partition("\n---\n")[2])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_table_of_hostile_names(name: str) -> None:
    record = values("compared/results.json")
    plain_tokens = harmless(markdown(ComparisonRecord.model_validate(record)))
    hostile = copy.deepcopy(record)
    hostile |= {"model": name, "calibration": [name], "seconds": {name: 1.0}}
    hostile["texts"][0]["source"] = name
    row = hostile["rows"][0]
    hostile["rows"][0] = row | {"method": name}
    hostile["rows"][1] = {key: row[key] for key in ("name", "keep", "recipe", "recipe_yaml")} | {
        "method": name,
        "error": name,
    }
    found = harmless(markdown(ComparisonRecord.model_validate(hostile)))
    kinds = ("tr_open", "td_open", "th_open", "heading_open", "paragraph_open")
    assert [t.type for t in found if t.type in kinds] == [t.type for t in plain_tokens if t.type in kinds]


@settings(deadline=None)
@given(st.text(alphabet="`|<>&[]()!*_ab\n\\\x1b", max_size=20))
def test_any_text_says_itself(text: str) -> None:
    shown = text.replace("\x1b", "\\x1b")
    (inline,) = [t for t in tokens(f"x {code(text)} y") if t.type == "code_inline"]
    # A table's cell takes the backslash away again.
    assert " ".join(inline.content.split()) == " ".join(shown.split()).replace("|", "\\|")
    assert not [t for t in tokens(f"x {plain(text)} y") if t.type in ("html_inline", "html_block", "code_inline")]
    lines = shown.rstrip("\n") + "\n"
    (fence,) = [t for t in tokens(f"{fenced(text.rstrip(chr(10)) + chr(10), 'yaml')}\n\nmore") if t.type == "fence"]
    assert fence.content == lines
