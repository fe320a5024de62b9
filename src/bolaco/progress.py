"""Progress of long stages: a bar with the remaining time in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from bolaco.errors import printable


class _PlainConsole(Console):
    """Prints text as it is: what a terminal would obey in a name from outside is shown as its code."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed comes by here, those in tables too."""
        return super().render_str(printable(text), **options)


def plain_console(**options: Any) -> Console:
    """A console for names of models and files: no markup, no emoji codes, no control characters in them."""
    return _PlainConsole(highlight=False, markup=False, emoji=False, **options)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class Tick(Protocol):
    """Advances a stage by ``n`` units, with an optional note on the latest one."""

    def __call__(self, n: int = 1, note: str = "") -> None:
        """Advances the stage."""


class Reporter:
    """Where a run says what it is doing. ``Reporter(quiet=True)`` says nothing (the Python API's default)."""

    # Without a terminal a line is printed at most this often, so that logs stay short.
    seconds_between_lines = 10.0

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or plain_console(stderr=True, quiet=quiet)
        self.quiet = quiet

    def say(self, text: str) -> None:
        """Prints one line."""
        if not self.quiet:
            self.console.print(text, soft_wrap=True, markup=False)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Tick]:
        """Shows a stage of ``total`` units, if any; the value given to the ``with`` block advances it."""
        if self.quiet or total == 0:
            yield lambda n=1, note="": None
        elif self.console.is_terminal:
            yield from self._bar(title, total)
        else:
            yield from self._lines(title, total)

    def _bar(self, title: str, total: int) -> Iterator[Tick]:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(title, total=total, note="")

            def tick(n: int = 1, note: str = "") -> None:
                bar.update(task, advance=n, note=note)

            yield tick

    def _lines(self, title: str, total: int) -> Iterator[Tick]:
        start = last = time.monotonic()
        done = 0

        def tick(n: int = 1, note: str = "") -> None:
            nonlocal done, last
            done += n
            now = time.monotonic()
            if now - last >= self.seconds_between_lines and done < total:
                last = now
                left = (now - start) / done * (total - done)
                self.say(
                    f"{title}: {done}/{total}, {_clock(now - start)} gone, about {_clock(left)} left  {note}".rstrip()
                )

        yield tick
        self.say(f"{title}: {done}/{total} in {_clock(time.monotonic() - start)}")
