"""Values from files and words before they are settings, and text from outside on the terminal."""

from __future__ import annotations

import io
import math
import tracemalloc

import pytest
from rich.table import Table

from bolaco.errors import RecipeError, printable
from bolaco.progress import Reporter, plain_console
from bolaco.settings import parsed_json, parsed_yaml, unflatten
from tests.command import bolaco

# --- YAML and JSON ----------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (LAUGHS, "line 2: aliases (*a) are not read; write it out"),
        ("&a [*a]", "line 1: aliases (*a) are not read"),
        ("x:\n  y: &a {z: *a}", "line 2: aliases"),
        ("!!python/object/apply:os.getcwd []", "line 1: tags (tag:yaml.org,2002:python/object/apply:os.getcwd)"),
        ("!!timestamp x", "are not read"),
        ("!!int ''", "are not read"),
        ("!!bool x", "are not read"),
        ("!mine x", "line 1: tags (!mine) are not read"),
        ("[" * 1000, "nested too deeply"),
        ("{a: " * 60 + "1" + "}" * 60, "nested too deeply"),
        ("- " * 1000 + "x", "nested too deeply"),
        ("a: 1\nb: 2\na: 3", "line 3: a is there twice"),
        ("{1: 2}", "a key is a name in quotes or without, not '1'"),
        ("{yes: 2}", "a key is a name in quotes or without, not 'yes'"),
        ("{[1]: 2}", "a key is a name"),
        ("<<: {a: 1}", "a key is a name in quotes or without, not '<<'"),
        ("9" * 5000, "4300 digits"),
        ('"\\ud800"', "half a character"),
        ("[1", "while parsing a flow sequence"),
        ("--- 1\n--- 2", "expected a single document"),
    ],
)
def test_yaml_that_is_more_than_values_is_refused(text: str, part: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r".+") as caught:
            parsed_yaml(text)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("{a: 1, b: [x, 'y', 2.5, yes, ~]}", {"a": 1, "b": ["x", "y", 2.5, True, None]}),
        ("2020-13-45", "2020-13-45"),  # a folder can be called so
        ("2020-01-01", "2020-01-01"),
        ("'1': x", {"1": "x"}),
        ("&a x", "x"),
        (".inf", math.inf),
        ("\ufeffa: é", {"a": "é"}),
        ("{a: " * 40 + "1" + "}" * 40, eval("{'a': " * 40 + "1" + "}" * 40)),  # noqa: S307
    ],
)
def test_yaml_that_is_values(text: str, value: object) -> None:
    assert parsed_yaml(text) == value


def test_json_is_values_that_can_be_written() -> None:
    assert parsed_json('\ufeff{"a": [1, null, "\\u00e9"]}') == {"a": [1, None, "é"]}
    for text in ("[" * 60 + "]" * 60, "[" * 10**5, '"\\ud800"', '{"\\udfff": 1}', "9" * 5000, "{", ""):
        with pytest.raises(ValueError, match=r".+") as caught:
            parsed_json(text)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["[" * 10**4, "&a [*a]", "!!timestamp x", "2020-13-45", "9" * 5000, "'", "\x1b[2J"])
def test_words_of_set_are_one_line(value: str) -> None:
    done = bolaco("compress", "gone", "--keep", "0.5", "--set", f"calibration.seq_len={value}", "--dry-run")
    assert (done.code, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1
    assert "calibration.seq_len" in done.err
    assert len(done.err) < 500


@pytest.mark.parametrize("name", ["a" + ".a" * 5000, "search" + ".trials" * 60])
def test_a_name_of_more_parts_than_any_field_has(name: str) -> None:
    with pytest.raises(RecipeError, match=r"there is no such field$") as caught:
        unflatten({name: 1})
    assert len(str(caught.value)) < 200
    for words in (
        ["compress", "gone", "--keep", "0.5"],
        ["tune", "gone", "--mode", "factors", "--data", "x", "-o", "y"],
    ):
        done = bolaco(*words, "--set", f"{name}=1")
        assert (done.code, len(done.err.splitlines())) == (1, 1)


# --- the terminal -----------------------------------------------------------------------------------------------------

HOSTILE = "a\x1b[31mred\x07\x9b2J\u202e\x00[bold]b[/bold] :smile: \ud800"
SHOWN = "a\\x1b[31mred\\x07\\x9b2J\\u202e\\x00[bold]b[/bold] :smile: \\ud800"


def test_what_a_terminal_obeys_is_shown_as_its_code() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("naïve 漢字 😀\ttab\nline") == "naïve 漢字 😀\ttab\nline"


@pytest.mark.parametrize("terminal", [True, False])
def test_names_on_the_console(terminal: bool) -> None:
    said = io.StringIO()
    console = plain_console(file=said, force_terminal=terminal, width=200, soft_wrap=True)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console.print(HOSTILE)
    console.print(table)
    Reporter(console).say(HOSTILE)
    assert said.getvalue().count(SHOWN) == 5
    said.getvalue().encode()  # it can be written
    # What is left of the terminal's own are rich's styles.
    assert ("\x1b[" in said.getvalue()) == terminal
    assert not {"\x07", "\x9b", "\u202e", "\x00"} & set(said.getvalue())
    assert "\x1b[31m" not in said.getvalue()
