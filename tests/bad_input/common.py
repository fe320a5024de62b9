"""What wrong input must come to."""

from __future__ import annotations

from tests.command import PROGRESS, Done, bolaco, snapshot


def one_line(done: Done, *parts: str) -> None:
    """Status 1 and one line of error with these parts, after nothing but progress."""
    *before, last = done.err.splitlines()
    assert done.code == 1
    assert last.startswith("bolaco: error: ")
    assert [line for line in before if not PROGRESS.match(line)] == []
    assert done.out == ""
    for part in parts:
        assert part in last
    assert len(last) < 500


def refused(words: list[str], *parts: str) -> None:
    """Running ``words`` gives one line of error, and every file and folder is as before."""
    before = contents()
    one_line(bolaco(*words), *parts)
    assert contents() == before


def contents() -> dict[str, str | None]:
    """Of the current folder, but for the seconds that a work folder counts, and its log."""
    return {name: value for name, value in snapshot().items() if not name.endswith((".seconds.json", "/log.txt"))}
