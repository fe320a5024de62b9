"""Progress of long stages: a bar with the remaining time in a terminal or a notebook, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

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
    """Where a run says what it is doing: on a screen, and in its log while there is one (:meth:`logged`).

    Args:
        console: the screen; the standard error by default.
        quiet: nothing is shown.
        verbose: the screen shows what else only the log holds.
    """

    # Without a terminal a line is printed at most this often, so that logs stay short.
    seconds_between_lines = 10.0

    def __init__(self, console: Console | None = None, quiet: bool = False, verbose: bool = False) -> None:
        self.console = console or plain_console(stderr=True, quiet=quiet)
        self.quiet, self.verbose = quiet, verbose
        self._log: TextIO | None = None

    @classmethod
    def watched(cls, console: Console | None = None) -> Reporter:
        """What functions of Python use by default: it speaks in a terminal and in a notebook, and nowhere else."""
        console = console or plain_console(stderr=True)
        return cls(console, quiet=not (console.is_terminal or console.is_jupyter))

    def say(self, text: str) -> None:
        """Prints one line."""
        self._write(text)
        self._show(text)

    def detail(self, text: str) -> None:
        """Says what is of use only to somebody who looks for the reason of something."""
        self._write(text)
        if self.verbose:
            self._show(text)

    @contextmanager
    def logged(self, file: Path) -> Iterator[None]:
        """While this lasts, all that is said is added to ``file`` with its time, and the traceback of a failure."""
        # A line at a time, so that what a kill leaves is whole.
        self._log = file.open("a", encoding="utf-8", buffering=1)
        try:
            yield
        except BaseException as error:
            self._write("".join(traceback.format_exception(error)).rstrip())
            raise
        finally:
            log, self._log = self._log, None
            with suppress(OSError):
                log.close()

    def _show(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, soft_wrap=True, markup=False)

    def _write(self, text: str) -> None:
        if self._log is not None:
            # A full disk is somebody else's to report.
            with suppress(OSError):
                self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Tick]:
        """Shows a stage of ``total`` units, if any; the value given to the ``with`` block advances it."""
        self._write(f"{title}: begins, {total} to do")
        if self.quiet or total == 0:
            yield lambda n=1, note="": None
        elif self._draws():
            yield from self._bar(title, total)
        else:
            yield from self._lines(title, total)
        self._write(f"{title}: done")

    def _draws(self) -> bool:
        """Whether there can be a bar; rich draws it with ipywidgets in a notebook."""
        if self.console.is_jupyter:
            return importlib.util.find_spec("ipywidgets") is not None
        return self.console.is_terminal

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
                self._show(
                    f"{title}: {done}/{total}, {_clock(now - start)} gone, about {_clock(left)} left  {note}".rstrip()
                )

        yield tick
        self._show(f"{title}: {done}/{total} in {_clock(time.monotonic() - start)}")
