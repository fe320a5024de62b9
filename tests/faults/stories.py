"""The commands that faults happen to: tiny ones, whose outcome is known from a run that nothing disturbed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.command import SMALL, compress, digest, furnish
from tests.deltas import delta_words, save_pair
from tests.processes import Done, Server, ours

# Counts what the command does to files of its folder, and ends it before it does so for the given time, or after so
# many seconds; the watch is a process of its own, so that the moment does not depend on what is being computed.
DISTURBED = """
import json, os, signal, sys, time
from bolaco.cli import main
event, delay, name, words = json.loads(sys.argv[1])
number, here, mine, count = getattr(signal, name), os.getcwd() + os.sep, os.getpid(), 0
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree", "fcntl.flock")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def watched(kind, given):
    global count
    if kind == "open":
        if not isinstance(given[2], int) or not given[2] & WRITES or not isinstance(given[0], (str, bytes)):
            return
        if not os.path.abspath(os.fsdecode(given[0])).startswith(here):
            return
    elif kind not in CHANGES:
        return
    count += 1
    if count == event and os.getpid() == mine:
        os.kill(mine, number)

watch = 0
if delay is not None:
    watch = os.fork()
    if watch == 0:
        ends = time.monotonic() + delay
        while time.monotonic() < ends:
            time.sleep(max(0, min(0.05, ends - time.monotonic())))
            if os.getppid() != mine:
                os._exit(0)
        os.kill(mine, number)
        os._exit(0)
sys.addaudithook(watched)
code = main(words)
sys.stdout.flush()
sys.stderr.write(f"\\nevents {count}\\n")
sys.stderr.flush()
if watch:
    os.kill(watch, signal.SIGKILL)
os._exit(code)
"""
# Of records: what differs between two runs of the same.
MEASURED = ("seconds", "peak_bytes", "memory")
# Files that show such numbers to people.
SHOWN = (".md", ".html", ".csv")


@dataclass(frozen=True)
class Story:
    """A command in a folder of its own.

    Attributes:
        words: of the command line.
        furnish: makes what it reads.
        out: what it writes.
    """

    words: tuple[str, ...]
    furnish: Callable[[Path], object]
    out: str = "out"


@dataclass(frozen=True)
class Known:
    """What an undisturbed run of a story leaves.

    Attributes:
        result: of its output, see :func:`outcome`.
        events: how many times it changes files.
        seconds: how long it takes.
        names: what is in its folder then.
        inputs: digest of each file that was there before.
        bytes: of its folder, at the end.
    """

    result: Mapping[str, Any]
    events: int
    seconds: float
    names: frozenset[str]
    inputs: Mapping[str, str]
    bytes: int


def _tuned(folder: Path) -> None:
    furnish(folder)
    done = disturbed(ours(0), compress("small", "--search", "hand"), folder)
    assert done.returncode == 0, done.stderr


def _default(*more: str, **changes: Any) -> tuple[str, ...]:
    options: dict[str, Any] = {"refinement_steps": 2, "calibration_gradient_sequences": 4}
    return tuple(compress("out", "--preset", "default", *more, **(options | changes)))


def _comparison() -> tuple[str, ...]:
    words = ["compare", "model", "--methods", "default,svd", "--keep", "0.8", "--calibration", "text.txt"]
    words += ["--eval", "other.txt", "--seq-len", "32", "-o", "out", "--quantized", "int4"]
    settings = {name: value for name, value in SMALL.items() if name.startswith(("calibration", "evaluation"))}
    settings |= {"calibration.gradient_sequences": 4, "default:refinement.steps": 1}
    return (*words, *(word for name, value in settings.items() for word in ("--set", f"{name}={value}")))


STORIES = {
    "default": Story(_default(), furnish),
    "next tokens": Story(_default(refinement_logit_steps=3, refinement_scale_steps=2, refinement_held_out=2), furnish),
    "few bits": Story(_default("--quantize", "int8", quantization_steps=2), furnish),
    "search": Story(tuple(compress("out", "--trials", "4")), furnish),
    "compare": Story(_comparison(), furnish),
    "tune": Story(
        ("tune", "small", "--mode", "factors", "--data", "text.txt", "--max-steps", "3", "--batch", "2", "-o", "out")
        + ("--set", "training.autocast=false", "--set", "evaluation.windows=3", "--set", "data.seq_len=32"),
        _tuned,
    ),
    "delta": Story(tuple(delta_words("out", ratio="1/2", options_rounds=1)), save_pair),
}


def disturbed(
    server: Server,
    words: Sequence[str],
    folder: Path,
    event: int | None = None,
    delay: float | None = None,
    signal: str = "SIGKILL",
) -> Done:
    """A run in a folder, with a signal at a change of files, counted from 1, or after so many seconds."""
    return server.run_alone(DISTURBED, folder, json.dumps([event, delay, signal, list(words)]))


def events_in(done: Done) -> int:
    """How many changes of files a run that came to its end counted."""
    (found,) = re.findall(r"^events (\d+)$", done.stderr, re.MULTILINE)
    return int(found)


def outcome(folder: Path) -> dict[str, Any]:
    """What must be the same in two runs: records without what was measured of the machine, digests of other files."""
    found: dict[str, Any] = {}
    for path in filter(Path.is_file, sorted(folder.rglob("*"))):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            # Some name what they were made from by its place.
            found[name] = _without(json.loads(path.read_text().replace(str(folder.parent), ".")))
        else:
            found[name] = None if path.suffix in SHOWN else digest(path)
    return found


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without(part) for name, part in value.items() if name not in MEASURED}
    return [_without(part) for part in value] if isinstance(value, list) else value


def digests(folder: Path) -> dict[str, str]:
    """Of every file in a folder."""
    return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
