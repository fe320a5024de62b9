"""What can happen to a run, one function for each kind; each says how it ended."""

from __future__ import annotations

import atexit
import functools
import random
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.stories import STORIES, Known, Story, digests, disturbed, events_in, outcome
from tests.processes import Done, ours

# How a run of the command line can end when it is asked to, or is killed.
STOPPED = {-signal.SIGKILL: None, 128 + signal.SIGTERM: "bolaco: stopped", 128 + signal.SIGINT: "bolaco: stopped"}
IDENTICAL, ONE_LINE, FAULT, SKIPPED = "identical", "one line", "fault", "skipped"


@dataclass(frozen=True)
class Ended:
    """How a fault ended.

    Attributes:
        how: ``identical`` to the undisturbed run; ``one line`` of error with nothing damaged; ``fault``; ``skipped``.
        what: happened, in order.
        said: by the run that was wrong, or its error; the reason where it was skipped.
    """

    how: str
    what: tuple[str, ...]
    said: str = ""


class Wrong(Exception):
    """A run ended as none may."""


@functools.cache
def _furnished(story: Story) -> Path:
    """What a story reads, made once: records have seconds in them."""
    folder = Path(tempfile.mkdtemp(prefix="bolaco-story-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    story.furnish(folder)
    return folder


def known(story: Story) -> Known:
    """A run that nothing disturbs."""
    with _place(story) as place:
        before = digests(place)
        start = time.monotonic()
        done = disturbed(ours(0), story.words, place)
        seconds = time.monotonic() - start
        if done.returncode != 0:
            raise Wrong(done.stderr)
        names = frozenset(path.name for path in place.iterdir())
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        return Known(outcome(place / story.out), events_in(done), seconds, names, before, size)


@contextmanager
def _place(story: Story) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bolaco-faults-") as folder:
        place = Path(folder).resolve()
        shutil.copytree(_furnished(story), place, dirs_exist_ok=True)
        yield place


def _checked(done: Done, what: str) -> Done:
    """A run that ended in one of the ways that it may."""
    text = done.stdout + done.stderr
    if "Traceback" in text or "Exception ignored" in text:
        raise Wrong(f"{what}: a traceback\n{text}")
    if done.returncode in STOPPED:
        expected = STOPPED[done.returncode]
        if expected is not None and expected not in done.stderr:
            raise Wrong(f"{what}: does not say that it stopped\n{text}")
    elif done.returncode == 1:
        if len(re.findall(r"^bolaco: error: ", done.stderr, re.MULTILINE)) != 1:
            raise Wrong(f"{what}: not one line of error\n{text}")
    elif done.returncode != 0:
        raise Wrong(f"{what}: exit status {done.returncode}\n{text}")
    return done


def _error(done: Done) -> str:
    (line,) = re.findall(r"^bolaco: error: (.*)$", done.stderr, re.MULTILINE)
    return str(line)


def _compare(story: Story, whole: Known, place: Path, spare: frozenset[str] = frozenset()) -> None:
    """Raises if a finished run left something else than the undisturbed one; names in ``spare`` may stay."""
    found = outcome(place / story.out)
    if found != whole.result:
        names = [name for name in found.keys() | whole.result.keys() if found.get(name) != whole.result.get(name)]
        raise Wrong(f"not the undisturbed run's: {', '.join(sorted(names))}")
    there = {path.name for path in place.iterdir()}
    if there - spare != whole.names:
        raise Wrong(f"left behind: {sorted(there ^ whole.names)}")


def _unharmed(whole: Known, place: Path) -> None:
    """Raises if what was there before is not as it was."""
    now = digests(place)
    harmed = [name for name, value in whole.inputs.items() if now.get(name) != value]
    if harmed:
        raise Wrong(f"what was there before is damaged: {', '.join(harmed)}")


def _to_the_end(story: Story, whole: Known, place: Path, what: list[str], spare: frozenset[str] = frozenset()) -> Ended:
    """The same command again, now undisturbed."""
    done = _checked(disturbed(ours(0), story.words, place), "given again")
    _unharmed(whole, place)
    if done.returncode == 0:
        _compare(story, whole, place, spare)
        return Ended(IDENTICAL, tuple(what))
    if (place / story.out).exists() and "exists" in _error(done):
        # The signal came after the last thing that the command does.
        _compare(story, whole, place, spare)
        return Ended(IDENTICAL, (*what, "was finished"))
    return Ended(ONE_LINE, tuple(what), _error(done))


def _signalled(draw: random.Random, story: Story, whole: Known, place: Path, what: list[str]) -> Done:
    """A run that a signal ends at a change of files, or at any time."""
    name = draw.choice(("SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"))
    event = draw.randint(1, whole.events) if draw.random() < 0.6 else None
    delay = None if event is not None else draw.uniform(0.02, 1.0) * whole.seconds
    what.append(f"{name} at change {event}" if event is not None else f"{name} after {delay:.2f} s")
    return _checked(disturbed(ours(0), story.words, place, event, delay, name), what[-1])


def kill(story: Story, whole: Known, draw: random.Random, what: list[str]) -> Ended:
    """One to three signals, one after the other; then the run goes on to its end."""
    with _place(story) as place:
        for _ in range(draw.choice((1, 1, 2, 3))):
            if _signalled(draw, story, whole, place, what).returncode == 0:
                _unharmed(whole, place)
                _compare(story, whole, place)
                return Ended(IDENTICAL, (*what, "was finished"))
            _unharmed(whole, place)
        return _required(_to_the_end(story, whole, place, what))


def _required(ended: Ended) -> Ended:
    """After a signal alone there is no reason for an error."""
    if ended.how == ONE_LINE:
        raise Wrong(f"{'; '.join(ended.what)}: {ended.said}")
    return ended


def damage(story: Story, whole: Known, draw: random.Random, what: list[str]) -> Ended:
    """A file of the work folder loses its end, or a bit of it is another, after a kill."""
    with _place(story) as place:
        if _signalled(draw, story, whole, place, what).returncode == 0:
            return Ended(SKIPPED, tuple(what), "was finished")
        work = place / f"{story.out}.work"
        files = sorted(path for path in work.rglob("*") if path.is_file() and path.stat().st_size)
        if not files:
            return Ended(SKIPPED, tuple(what), "nothing was in the work folder")
        file = draw.choice(files)
        content = bytearray(file.read_bytes())
        at = draw.randrange(len(content))
        if draw.random() < 0.4:
            content = content[:at]
            what.append(f"{file.relative_to(work)} cut off at {at}")
        else:
            content[at] ^= 1 << draw.randrange(8)
            what.append(f"a bit of byte {at} of {file.relative_to(work)}")
        file.write_bytes(content)
        # A folder that is no more known to be the work of this run is not removed.
        spare = frozenset({work.name, work.name + ".lock"}) if file.name == "recipe.json" else frozenset()
        ended = _to_the_end(story, whole, place, what, spare)
        if ended.how == ONE_LINE:
            # The line says what to do: without that work, the run is as any.
            shutil.rmtree(work)
            _required(_to_the_end(story, whole, place, [*what, "work folder removed"]))
        return ended


@contextmanager
def _disk(size: int) -> Iterator[Path]:
    """A disk of so many bytes in memory."""
    folder = Path(tempfile.mkdtemp(prefix="bolaco-disk-"))
    options = f"size={size}"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "bolaco", str(folder)], capture_output=True, text=True
    )
    try:
        if done.returncode != 0:
            raise PermissionError(done.stderr.strip() or "mount failed")
        yield folder
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def full_disk(story: Story, whole: Known, draw: random.Random, what: list[str]) -> Ended:
    """A disk that is too small, and is made larger afterwards."""
    inputs = sum(len(name) for name in whole.inputs)  # a few bytes, for the entries
    with _place(story) as made:
        needed = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        # Files of a tmpfs take whole pages.
        pages = sum(-(-path.stat().st_size // 4096) + 1 for path in made.rglob("*")) * 4096
        size = pages + inputs + int(draw.random() * 1.5 * max(whole.bytes - needed, 1 << 18))
        what.append(f"a disk with {(size - pages) // 1024} KiB left")
        try:
            with _disk(size) as disk:
                shutil.copytree(made, disk, dirs_exist_ok=True)
                done = _checked(disturbed(ours(0), story.words, disk), what[0])
                _unharmed(whole, disk)
                if done.returncode == 0:
                    _compare(story, whole, disk)
                    return Ended(IDENTICAL, (*what, "was enough"))
                if "space" not in _error(done):
                    raise Wrong(f"{what[0]}: does not say so: {_error(done)}")
                subprocess.run(["mount", "-o", "remount,size=1G", str(disk)], check=True)
                return _required(_to_the_end(story, whole, disk, [*what, _error(done)]))
        except PermissionError as error:
            return Ended(SKIPPED, tuple(what), f"no disk could be made: {error}")


def two_at_once(story: Story, whole: Known, draw: random.Random, what: list[str]) -> Ended:
    """The same command twice at the same time: one does it, the other says so."""
    delay = draw.uniform(0, whole.seconds)
    what.append(f"a second one after {delay:.2f} s")
    with _place(story) as place:
        found: list[Done] = []

        def run(number: int) -> None:
            found.append(disturbed(ours(number), story.words, place))

        threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
        threads[0].start()
        time.sleep(delay)
        threads[1].start()
        for thread in threads:
            thread.join()
        ended = sorted((_checked(done, what[0]) for done in found), key=lambda done: done.returncode)
        _unharmed(whole, place)
        if [done.returncode for done in ended] == [1, 1]:
            raise Wrong(f"{what[0]}: neither of two runs did it: {_error(ended[0])}; {_error(ended[1])}")
        _compare(story, whole, place)
        return Ended(IDENTICAL, tuple(what), _error(ended[1]) if ended[1].returncode else "")


KINDS: dict[str, Callable[[Story, Known, random.Random, list[str]], Ended]] = {
    "kill": kill,
    "damage": damage,
    "full disk": full_disk,
    "two at once": two_at_once,
}


def happened(kind: str, story: str, number: int, seed: int, whole: Known) -> Ended:
    """One fault; which one depends on the words only, and on how fast this machine is."""
    what: list[str] = []
    try:
        return KINDS[kind](STORIES[story], whole, random.Random(f"{kind} {story} {number} {seed}"), what)
    except Wrong as wrong:
        return Ended(FAULT, tuple(what), f"{'; '.join(what)}\n{wrong}")
