"""The examples of the documents, run as what they are: one file of a package that somebody has installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bolaco.models.load import load_model
from bolaco.testing import MethodConformance
from tests.command import compress, furnish, info, ok
from tests.models import save_tiny, tiny_llama, token_blocks

DOCS = Path(__file__).parents[1] / "docs"
# Document -> the registry's group, as the document says it too.
EXAMPLES = {
    "add-a-method.md": "bolaco.methods",
    "add-an-allocator.md": "bolaco.allocators",
    "add-a-storage.md": "bolaco.storages",
    "add-a-mode.md": "bolaco.modes",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A furnished folder as the current one; packages are installed in ``site`` beside it."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "place").mkdir()
    furnish(tmp_path / "place", save_tiny(tmp_path / "model", tiny_llama()))
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path


def install(document: str, place: Path) -> str:
    """Installs the first Python example of a document with its entry point; returns the name it has there."""
    text = (DOCS / document).read_text(encoding="utf-8")
    source = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL).group(1)
    group, name, attribute = re.search(
        r'^\[project\.entry-points\."([\w.]+)"\]\n([\w-]+) = "[\w.]+:(\w+)"$', text, re.MULTILINE
    ).groups()
    assert group == EXAMPLES[document]
    module = f"example_{name.replace('-', '_')}_{abs(hash(str(place)))}"
    (place / "site" / f"{module}.py").write_text(source, encoding="utf-8")
    metadata = place / "site" / "example-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n", encoding="utf-8")
    entry = f"[{group}]\n{name} = {module}:{attribute}\n"
    (metadata / "entry_points.txt").write_text(entry, encoding="utf-8")
    listed = ok("methods").out
    assert any(name in line and "example" in line for line in listed.splitlines())
    return name


def test_the_method(place: Path) -> None:
    class Mine(MethodConformance):
        method = install("add-a-method.md", place)

    for check in [name for name in dir(Mine) if name.startswith("test_")]:
        getattr(Mine(), check)()
    assert "method.power" in ok("methods", Mine.method).out
    ok(*compress("out", "--preset", "default", "--method", Mine.method, method_power=0.5, refinement_steps=2))
    assert info("out")["recipe"]["method"] == {"name": Mine.method, "power": 0.5}


def test_the_allocator(place: Path) -> None:
    name = install("add-an-allocator.md", place)
    assert "search.first" in ok("methods", name).out
    ok(*compress("out", "--preset", "default", "--search", name, search_first=1, refinement_steps=2))
    record = info("out")
    assert record["keep_linears"] <= record["keep"]
    ranks = record["ranks"].items()
    assert {rank for matrix, rank in ranks if ".0." in matrix} == {None}
    assert {rank for matrix, rank in ranks if ".1." in matrix} >= {4}


def test_the_storage(place: Path) -> None:
    name = install("add-a-storage.md", place)
    ok(*compress("out", "--preset", "default", "--storage", name, refinement_steps=2))
    record = info("out")
    assert record["storage"] == name
    assert 0.7 < record["keep_linears"] <= 0.8
    tokens = token_blocks(2, 24)
    with torch.no_grad():
        logits = load_model("out")(tokens, use_cache=False).logits
    assert torch.isfinite(logits).all()
    kinds = [type(module).__name__ for module in load_model("out").modules()]
    assert "ScaledLinear" in kinds


def test_the_mode(place: Path) -> None:
    name = install("add-a-mode.md", place)
    assert "options.biases" in ok("methods", name).out
    ok(*compress("out", "--preset", "default", refinement_steps=2))
    words = ["--data", "text.txt", "--eval", "other.txt", "--seq-len", "32", "--max-steps", "2"]
    ok("tune", "out", "--mode", name, *words, "--set", "evaluation.windows=2", "-o", "tuned")
    record = info("tuned")
    assert record["tuning"]["mode"] == name
    assert record["ranks"] == info("out")["ranks"]
