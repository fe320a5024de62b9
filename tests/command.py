"""Running the command line in process, on a tiny model and with settings that take a fraction of a second."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bolaco.cli import main
from bolaco.errors import RecipeError
from bolaco.recipe.recipe import applicable, recipe_values
from tests.models import english, save_tiny

# Those of a search are for recipes that search.
SMALL = {
    "calibration.sequences": 8,
    "validation.candidates": 6,
    "validation.sequences": 3,
    "validation.allocations": 2,
    "search.trials": 3,
    "search.initial": 2,
    "search.rank_multiple": 4,
    "evaluation.windows": 4,
}
# What a run says on its way, one line each, when there is no terminal.
PROGRESS = re.compile(
    r"^loading \S+$|^recipe [^:]+: method [^:]+(: [a-z0-9 ]+)?$|^search: \d+ trials are in the ledger already$"
    r"|^training: \d+ of \d+ steps are done already$"
    r"|^[a-z ]+: \d+/\d+( in \d+:\d\d|, \d+:\d\d gone, about \d+:\d\d left)$"
)


@dataclass(frozen=True)
class Done:
    """What one call of the command line left."""

    code: int
    out: str
    err: str


def bolaco(*words: str | Path) -> Done:
    """``bolaco WORDS`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse: --help and wrong usage
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def ok(*words: str | Path) -> Done:
    """The same, and it must succeed."""
    done = bolaco(*words)
    assert done.code == 0, done.err
    return done


def compress(
    out: str | Path, *more: str | Path, model: str = "model", calibration: str = "text.txt", **changes: Any
) -> list[str]:
    """The words of a small `compress`; ``search_min_keep=0.3`` adds ``--set search.min_keep=0.3``.

    Of :data:`SMALL` those that its recipe has; ``more`` and ``changes`` are passed on as they are.
    """
    words = ["compress", model, "--keep", "0.8", "--calibration", calibration, "--eval", "other.txt", "--seq-len", "32"]
    settings = _sizes(*map(str, more)) | {name.replace("_", ".", 1): value for name, value in changes.items()}
    if "search.trials" in settings:
        words += ["--trials", str(settings.pop("search.trials"))]
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    words += [] if "--preset" in more else ["--preset", "bolaco-5x1"]
    return [*words, "-o", str(out), *map(str, more)]


def _sizes(*words: str) -> dict[str, Any]:
    """Of :data:`SMALL` the fields that the recipe of these words has; none of its search where they make no recipe."""
    chosen = {
        name: words[words.index(f"--{name}") + 1] for name in ("method", "search", "storage") if f"--{name}" in words
    }
    preset = words[words.index("--preset") + 1] if "--preset" in words else "bolaco-5x1"
    try:
        return applicable(SMALL, recipe_values(**chosen), preset)
    except RecipeError:
        return {name: value for name, value in SMALL.items() if not name.startswith("search.")}


def furnish(folder: Path, model: Path | None = None) -> Path:
    """A folder to work in: ``model`` (linked if given, else made), ``text.txt`` and ``other.txt``."""
    if model is None:
        save_tiny(folder / "model")
    else:
        (folder / "model").symlink_to(model)
    (folder / "text.txt").write_text(english(1200, 1), encoding="utf-8")
    (folder / "other.txt").write_text(english(400, 2), encoding="utf-8")
    return folder


def info(folder: str | Path) -> dict[str, Any]:
    """``bolaco.json``."""
    result: dict[str, Any] = json.loads((Path(folder) / "bolaco.json").read_text(encoding="utf-8"))
    return result


def digest(file: str | Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def snapshot(folder: str | Path = ".") -> dict[str, str | None]:
    """Everything in a folder: path -> digest of a file, None for folders."""
    paths = sorted(Path(folder).rglob("*"))
    return {str(path): digest(path) if path.is_file() else None for path in paths}


def what_counts(folder: str | Path) -> dict[str, Any]:
    """What must be the same in two runs of one recipe: all of ``bolaco.json`` but seconds, and every weight."""
    record = info(folder)
    del record["seconds"]
    for trial in record["trials"]:
        del trial["seconds"]
    record["recipe"].get("search", {}).pop("trials", None)
    return record | {"weights": digest(Path(folder) / "model.safetensors")}
