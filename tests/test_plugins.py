"""Methods of other packages: a toy one on the path, as an installer would leave it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from bolaco.errors import RecipeError
from bolaco.factorize import METHODS, get_method, list_methods
from bolaco.models.load import load_model
from bolaco.testing import MethodConformance
from tests.command import bolaco, compress, furnish, info, ok
from tests.models import save_tiny, tiny_llama, token_blocks

CHECKS = [name for name in dir(MethodConformance) if name.startswith("test_")]
TOY = """
from bolaco.factorize import InputMetric, Method, low_rank


def metric(moments):
    return InputMetric(moments.covariance.diagonal())


def prepare(weight, metric, statistics, max_rank):
    return low_rank(weight, metric, max_rank)


METHOD = Method(name="toy", paper="none", summary="variances of the inputs", prepare=prepare, metric=metric)
NO_METHOD = 3
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, on the path."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def install(site: Path, package: str, entries: dict[str, str], source: str = TOY) -> str:
    """A distribution with one module and its entry points; the module's name differs from test to test."""
    module = f"{package.replace('-', '_')}_{abs(hash(str(site)))}"
    (site / f"{module}.py").write_text(textwrap.dedent(source))
    metadata = site / f"{package.replace('-', '_')}-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    lines = [f"{name} = {module}:{attribute}" for name, attribute in entries.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[bolaco.methods]", *lines]) + "\n")
    return module


def test_a_package_s_method_compresses_a_model(site: Path, tmp_path: Path, monkeypatch) -> None:
    install(site, "toy-package", {"toy": "METHOD"})
    listed = ok("methods").out
    row = next(line for line in listed.splitlines() if line.startswith("│ toy "))
    assert "toy-package" in row
    assert "variances of the inputs" in row
    assert get_method("toy").package == "toy-package"

    model = tiny_llama()
    place = tmp_path / "place"
    place.mkdir()
    furnish(place, save_tiny(tmp_path / "model", model))
    monkeypatch.chdir(place)
    ok(*compress("out", "--method", "toy", "--search", "uniform"))
    record = info("out")
    assert record["method"] == "toy"
    assert record["versions"]["toy-package"] == "1.2"
    assert record["keep_linears"] <= 0.8
    # The result is the method's own, not another one's, and needs the package no longer.
    ok(*compress("plain", "--method", "svd", "--search", "uniform"))
    monkeypatch.undo()
    with pytest.raises(RecipeError, match="unknown method 'toy'"):
        get_method("toy")
    tokens = token_blocks(2, 24)
    with torch.no_grad():
        original, found, plain = (
            m(tokens, use_cache=False).logits
            for m in (model, load_model(str(place / "out")), load_model(str(place / "plain")))
        )
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, original, atol=1e-2)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_a_package_tests_its_method_with_our_class(site: Path) -> None:
    class Toy(MethodConformance):
        method = "toy"

    install(site, "toy-package", {"toy": "METHOD"})
    for name in CHECKS:
        getattr(Toy(), name)()


def test_a_typo_in_a_package_s_method_gets_a_hint(site: Path) -> None:
    install(site, "toy-package", {"bandwidth": "METHOD"})
    with pytest.raises(RecipeError, match="did you mean 'bandwidth'"):
        get_method("bandwith")


@pytest.mark.parametrize(
    ("name", "attribute", "source", "said"),
    [
        ("kfac", "METHOD", TOY, "method 'kfac' of other-package 1.2 is refused: bolaco has one of that name"),
        ("other", "METHOD", "import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_n"),
        ("other", "METHOD", "raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("other", "METHOD", "raise SystemExit(3)", "SystemExit: 3"),
        ("other", "ABSENT", TOY, "AttributeError: module"),
        ("other", "NO_METHOD", TOY, "NO_METHOD is a int, not a bolaco.factorize.Method"),
        ("other", "METHOD", TOY, "method 'other' of other-package 1.2 calls itself 'toy'"),
        ("other", "a b:c!!", TOY, "cannot be loaded from"),
    ],
)
def test_one_that_cannot_be_used_is_named_and_harms_no_other(
    site: Path, name: str, attribute: str, source: str, said: str
) -> None:
    install(site, "toy-package", {"toy": "METHOD"})
    install(site, "other-package", {name: attribute}, source)
    done = ok("methods")
    (line,) = [line for line in done.out.splitlines() if said in line]
    assert "other-package 1.2" in line
    assert f"'{name}'" in line
    assert {*METHODS, "toy"} == set(list_methods().methods)
    assert get_method("toy").name == "toy"
    if name in METHODS:
        assert get_method(name).package == "bolaco"
    else:
        with pytest.raises(RecipeError) as caught:
            get_method(name)
        assert str(caught.value) in done.out
        assert "\n" not in str(caught.value)


def test_two_packages_with_one_name(site: Path) -> None:
    install(site, "b-package", {"toy": "METHOD"})
    install(site, "a-package", {"toy": "METHOD"})
    with pytest.raises(RecipeError, match=r"'toy' is refused: a-package 1\.2 and b-package 1\.2 bring one"):
        get_method("toy")
    assert set(list_methods().methods) == set(METHODS)


def test_a_broken_method_stops_compress_in_one_line(site: Path, tmp_path: Path, monkeypatch) -> None:
    install(site, "toy-package", {"toy": "METHOD"}, "import nothing_of_that_name")
    monkeypatch.chdir(tmp_path)
    done = bolaco(*compress("out", "--method", "toy", model="nowhere"))
    assert done.code == 1
    assert done.err.startswith("bolaco: error: method 'toy' of toy-package 1.2 cannot be loaded")
    assert done.err.count("\n") == 1
