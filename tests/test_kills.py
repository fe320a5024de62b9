"""A handful of the faults of `make test-faults`: the command given again ends as if nothing had happened."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from tests.faults.happen import FAULT, IDENTICAL, KINDS, ONE_LINE, SKIPPED, Ended, Known, happened, known
from tests.faults.stories import STORIES
from tests.models import slow

# Each kind once in the fast tests, each story once.
QUICK = {
    "kill": ("next tokens", "few bits", "search", "tune", "delta"),
    "damage": ("compare",),
    "full disk": ("default",),
    "two at once": ("default",),
}
ROWS = [(kind, story) for kind in KINDS for story in STORIES]


@functools.cache
def whole(story: str) -> Known:
    return known(STORIES[story])


def expected(kind: str) -> set[str]:
    return {"kill": {IDENTICAL}, "damage": {IDENTICAL, ONE_LINE, SKIPPED}, "two at once": {IDENTICAL}}.get(
        kind, {IDENTICAL, SKIPPED}
    )


@pytest.mark.parametrize(("kind", "story"), [row if row[1] in QUICK[row[0]] else slow(*row) for row in ROWS])
def test_a_fault(kind: str, story: str) -> None:
    ended = happened(kind, story, 0, 1, whole(story))
    assert ended.how in expected(kind), ended
    if ended.how == SKIPPED and "no disk" in ended.said:
        pytest.skip(ended.said)


def test_a_difference_is_a_fault() -> None:
    """The harness sees what it is there to see."""
    true = whole("default")
    assert isinstance(happened("kill", "default", 0, 1, true), Ended)

    def said(**changes: object) -> str:
        ended = happened("kill", "default", 0, 1, replace(true, **changes))  # type: ignore[arg-type]
        assert ended.how == FAULT
        return ended.said

    assert "not the undisturbed run's: config.json" in said(result={**true.result, "config.json": "another"})
    assert "what was there before is damaged: text.txt" in said(inputs={**true.inputs, "text.txt": "0"})
    assert "left behind: ['more']" in said(names=true.names | {"more"})
