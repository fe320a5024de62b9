"""The commands of docs/delta.md, run on a tiny pair."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.command import ok
from tests.deltas import SMALL, save_pair

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "delta.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are added: those of the page are for a model with a thousand positions."""
    monkeypatch.chdir(save_pair(tmp_path))
    small = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    added = {
        "delta base": ["--seq-len", "32", "--set", "options.rounds=1", *small],
        "eval": ["--seq-len", "32"],
        "bench": ["--prompt", "8", "--new-tokens", "2"],
    }
    served: list[tuple[str, int]] = []
    (commands,) = blocks("sh")
    lines = commands.splitlines()
    assert len(lines) == 5
    for line in [line.replace("1/16", "1/4") for line in lines]:
        program, *words = line.split()
        more = next((extra for start, extra in added.items() if line.startswith(f"bolaco {start}")), [])
        if program == "bolaco":
            ok(*words, *more)
            continue
        pytest.importorskip("fastapi", reason="pip install 'bolaco[serve]'")
        uvicorn = pytest.importorskip("uvicorn", reason="pip install 'bolaco[serve]'")
        monkeypatch.setattr(uvicorn, "run", lambda app, **given: served.append((app.title, given["port"])))
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        assert served == [("bolaco deltas", 8000)]
    assert Path("merged/config.json").is_file()
    (python,) = blocks("python")
    exec(compile(python, "delta.md", "exec"), {})  # noqa: S102 - it is ours
    words = "delta export delta --peft -o adapter"
    assert f"bolaco {words}" in TEXT
    ok(*words.split())
