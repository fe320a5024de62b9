"""What other packages bring: each toy is one file of an installed package, the example of its page in docs/."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from bolaco.allocate.allocator import ALLOCATORS
from bolaco.errors import CheckpointError, RecipeError
from bolaco.factorize import METHODS
from bolaco.layers import BUILDERS, FactoredLinear
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model
from bolaco.plugins import Registry
from bolaco.storage.storage import STORAGES
from bolaco.testing import MethodConformance
from bolaco.tune.mode import MODES
from tests.command import bolaco, compress, furnish, info, ok
from tests.models import save_tiny, slow, tiny_llama, token_blocks
from tests.processes import without_bolaco
from tests.test_checkpoint import MEASURE, logits, must

DOCS = Path(__file__).parents[1] / "docs"
CHECKS = [name for name in dir(MethodConformance) if name.startswith("test_")]


@dataclass(frozen=True)
class Kind:
    """One kind of thing that packages bring.

    Attributes:
        registry: where it is found.
        page: of docs/, whose first Python example is the toy.
        name, attribute: of the toy.
        of: what it must be.
        ours: the name of a built-in one.
        option: one of the toy's, as `bolaco methods` names it; None where there are none.
    """

    registry: Registry[Any]
    page: str
    name: str
    attribute: str
    of: str
    ours: str
    option: str | None = None

    @property
    def source(self) -> str:
        """The toy, and beside it something that it is not."""
        code = re.search(r"```python\n(.*?)```", (DOCS / self.page).read_text(encoding="utf-8"), re.DOTALL)
        assert code is not None
        return code[1] + "\nNOTHING_OF_THE_KIND = 3\n"


KINDS = {
    "method": Kind(METHODS, "add-a-method.md", "mine", "METHOD", "Method", "kfac", "method.power"),
    "search": Kind(ALLOCATORS, "add-an-allocator.md", "every-other", "ALLOCATOR", "Allocator", "5x1", "search.first"),
    "storage": Kind(STORAGES, "add-a-storage.md", "scaled", "STORAGE", "Storage", "pivoted"),
    "mode": Kind(MODES, "add-a-mode.md", "expand", "MODE", "Mode", "tt-lora", "options.biases"),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, on the path; layers that they bring are forgotten afterwards."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = dict(BUILDERS)
    yield folder
    BUILDERS.clear()
    BUILDERS.update(before)


def install(site: Path, kind: Kind, package: str = "toy-package", **what: str) -> str:
    """A distribution with one module and one entry point, by default for the toy; returns the module's name.

    It differs from test to test, as modules stay imported. ``what`` may name ``name``, ``attribute`` and ``source``.
    """
    name, attribute = what.get("name", kind.name), what.get("attribute", kind.attribute)
    module = f"{package.replace('-', '_')}_{abs(hash(str(site)))}"
    (site / f"{module}.py").write_text(textwrap.dedent(what.get("source", kind.source)), encoding="utf-8")
    metadata = site / f"{package.replace('-', '_')}-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    group = f"[{kind.registry.group}]\n{name} = {module}:{attribute}\n"
    (metadata / "entry_points.txt").write_text(group)
    return module


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A furnished folder of the test's own, as the current one."""
    folder = tmp_path / "place"
    folder.mkdir()
    furnish(folder, save_tiny(tmp_path / "model", tiny_llama()))
    monkeypatch.chdir(folder)
    return folder


def tuning(out: str, *more: str, mode: str = "expand") -> list[str]:
    """The words of a small `tune` of ``small``."""
    words = ["tune", "small", "--mode", mode, "--data", "text.txt", "--max-steps", "3", "--batch", "2", "-o", out]
    for setting in ("training.autocast=false", "evaluation.windows=3", "data.seq_len=32"):
        words += ["--set", setting]
    return [*words, *more]


# --- each of them is there ----------------------------------------------------------------------------------------


@kinds
def test_a_package_s_own_is_listed_with_its_options(kind: Kind, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, kind)
    monkeypatch.setenv("COLUMNS", "160")
    row = next(line for line in ok("methods").out.splitlines() if line.startswith(f"│ {kind.name} "))
    assert [cell.strip() for cell in row.split("│")][3:5] == [kind.registry.get(kind.name).summary, "toy-package"]
    first, *rows = ok("methods", kind.name).out.splitlines()
    assert first.startswith(f"{kind.registry.kind} {kind.name}")
    assert first.endswith(f": {kind.registry.get(kind.name).summary}")
    assert [row.split("│")[1].strip() for row in rows if "│" in row] == ([] if kind.option is None else [kind.option])
    assert kind.registry.package(kind.name) == "toy-package"
    assert kind.registry.package(kind.ours) == "bolaco"
    assert kind.name in kind.registry
    monkeypatch.undo()
    assert kind.name not in kind.registry
    with pytest.raises(RecipeError, match=f"unknown {kind.registry.kind} '{kind.name}'"):
        kind.registry.get(kind.name)


def test_a_package_s_method_compresses_a_model(site: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, KINDS["method"])
    words = ("--search", "uniform", "--method")
    ok(*compress("out", *words, "mine"))
    record = info("out")
    assert record["method"] == "mine"
    assert record["recipe"]["method"] == {"name": "mine", "power": 1.0}
    assert record["versions"]["toy-package"] == "1.2"
    assert record["keep_linears"] <= 0.8
    ok(*compress("weighed", *words, "mine", method_power=0.3))
    assert info("weighed")["recipe"]["method"]["power"] == 0.3
    done = bolaco(*compress("no", *words, "mine", method_power=-1))
    assert "method.power: Input should be greater than or equal to 0 (got -1)" in done.err
    # The result is the method's own, not another one's, and needs the package no longer.
    ok(*compress("plain", *words, "svd"))
    monkeypatch.undo()
    original = load_model(str(place / "model"))
    found = [logits(load_model(str(place / name))) for name in ("out", "weighed", "plain")]
    assert torch.isfinite(found[0]).all()
    assert not torch.allclose(found[0], logits(original), atol=1e-2)
    for i, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(found[i], found[other], atol=1e-2)
    ok("inspect", place / "out")


@pytest.mark.slow  # as in test_docs.py, which runs the same checks of the same method
def test_a_package_tests_its_method_with_our_class(site: Path) -> None:
    class Mine(MethodConformance):
        method = "mine"

    install(site, KINDS["method"])
    for name in CHECKS:
        getattr(Mine(), name)()


def test_a_package_s_allocator_gives_the_ranks(site: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, KINDS["search"])
    words = compress("out", "--search", "every-other", search_first=1)
    said = ok(*words, "--dry-run").out
    assert "the uniform allocation is shown for its size" in said
    ok(*words)
    record = info("out")
    assert record["recipe"]["search"]["name"] == "every-other"
    assert record["recipe"]["search"]["first"] == 1
    assert record["versions"]["toy-package"] == "1.2"
    assert record["keep_linears"] <= 0.8
    first = {name: rank for name, rank in record["ranks"].items() if ".layers.0." in name}
    assert set(first.values()) == {None}
    assert {rank for name, rank in record["ranks"].items() if name not in first} - {None} == {4}
    done = bolaco(*compress("no", "--search", "every-other", "--keep", "0.4"))
    assert "keep 0.4 allows 6,144 parameters" in done.err.splitlines()[-1]
    done = bolaco(*compress("no", "--search", "every-other", search_last=1))
    assert "search.last: search 'every-other' has no such option; known are first" in done.err
    monkeypatch.undo()
    assert torch.isfinite(logits(load_model(str(place / "out")))).all()
    assert "every-other" not in ok("methods").out
    ok("inspect", place / "out")


def stored_as(model: PreTrainedModel, kind: str) -> dict[str, FactoredLinear]:
    """Layers of a model that call themselves ``kind``."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
    return {name: layer for name, layer in layers.items() if layer.kind == kind}


def test_a_package_s_storage_is_written_loaded_and_tuned(site: Path, place: Path) -> None:
    install(site, KINDS["storage"])
    ok(*compress("small", "--storage", "scaled", "--method", "svd-llm", "--search", "uniform"))
    record = info("small")
    ranks = {name: rank for name, rank in record["ranks"].items() if rank is not None}
    model = load_model("small")
    layers = stored_as(model, "scaled")
    assert layers.keys() == ranks.keys() != set()
    sites = {site.name: site for site in inspect_structure(tiny_llama()).sites}
    for name, layer in layers.items():
        assert sum(p.numel() for p in layer.parameters()) == STORAGES.get("scaled").cost(sites[name], ranks[name])
    assert record["versions"]["toy-package"] == "1.2"
    # The product of two factors of these ranks.
    ok(*compress("plain", "--storage", "two-factor", "--method", "svd-llm", "--search", "uniform"))
    plain = stored_as(load_model("plain"), "two-factor")
    same = [name for name in ranks if info("plain")["ranks"][name] == ranks[name]]
    assert same
    for name in same:
        torch.testing.assert_close(layers[name].dense(), plain[name].dense(), atol=1e-5, rtol=1e-4)
    ok("export", "small", "--dense", "-o", "stock")
    torch.testing.assert_close(logits(load_model("stock")), logits(model), atol=1e-4, rtol=1e-4)
    # Trained as two factors, and stored in its own form again.
    ok(*tuning("tuned", mode="factors"))
    tuned = stored_as(load_model("tuned"), "scaled")
    assert {name: layer.rank for name, layer in tuned.items()} == ranks
    assert not torch.allclose(logits(load_model("tuned")), logits(model))
    lengths = next(iter(tuned.values())).expand.weight.norm(dim=0)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


# Things around a layer that its checkpoint has to carry: constants, functions, imports, another class, quoted names.
AROUND = '''
from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bolaco.layers import Entry, FactoredLinear, builds
from bolaco.storage.storage import Storage

if TYPE_CHECKING:
    from bolaco.models.structure import Site

_UNIT: float = 1.0
NOT_NEEDED = object()


def _ones(rank: int) -> Tensor:
    return torch.full((rank,), _UNIT * math.sqrt(1))


class Lengths(nn.Module):
    """A diagonal."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.value = nn.Parameter(_ones(rank))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value


class ScaledLinear(FactoredLinear):
    kind = "scaled"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__(in_features, out_features, rank)
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.scale = Lengths(rank)
        self.expand = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.scale(F.linear(x, self.reduce.weight)))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.expand.weight * self.scale.value, self.reduce.weight

    def dense_bias(self) -> Tensor | None:
        return self.expand.bias

    def same(self) -> ScaledLinear:
        return self


@builds(ScaledLinear.kind)
def _scaled(in_features: int, entry: Entry) -> ScaledLinear:
    return ScaledLinear(in_features, entry["out"], entry["rank"], entry["bias"])


class Scaled(Storage):
    name = ScaledLinear.kind
    paper = ""
    summary = "one line"

    def cost(self, site: Site, rank: int) -> int:
        return rank * (site.out_features + site.in_features + 1)

    def max_rank(self, site: Site, multiple: int) -> int:
        return (site.size - 1) // (site.out_features + site.in_features + 1) // multiple * multiple

    def pack(self, layer: FactoredLinear) -> FactoredLinear:
        expand, reduce = (factor.detach() for factor in layer.factors())
        bias = layer.dense_bias()
        made = ScaledLinear(layer.in_features, layer.out_features, layer.rank, bias is not None)
        lengths = expand.norm(dim=0)
        state = {"expand.weight": expand / lengths, "scale.value": lengths, "reduce.weight": reduce}
        made.load_state_dict(state | ({} if bias is None else {"expand.bias": bias.detach()}), assign=True)
        return made.to(expand.device).requires_grad_(False)


STORAGE = Scaled()
'''


@pytest.mark.parametrize(
    ("source", "method"),
    [  # with a bias and without
        pytest.param(KINDS["storage"].source, "kfac", id="of the docs"),
        slow(AROUND, "svd-llm", id="with more around"),
    ],
)
def test_a_package_s_storage_loads_with_the_package_and_without(
    source: str, method: str, site: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(site, KINDS["storage"], source=source)
    ok(*compress("out", "--preset", "default", "--method", method, "--storage", "scaled", refinement_steps=1))
    kinds_of_layers = {
        e["kind"] for e in json.loads(Path("out/config.json").read_text())["lowrank"]["matrices"].values()
    }
    assert kinds_of_layers == {"scaled"}
    expected = logits(load_model("out"))
    save_file({"value": token_blocks(2, 24, seed=5)}, tmp_path / "tokens")
    with_it = f"""
{MEASURE}
sys.path.insert(0, sys.argv[4])
import bolaco
measure(bolaco.load(sys.argv[2]), sys.argv[3])
assert {module!r} in sys.modules
"""
    without = f"""
{MEASURE}
sys.modules["bolaco"] = sys.modules[{module!r}] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
measure(model, sys.argv[3])
model.save_pretrained(sys.argv[3] + "-again")
"""
    for name, code in (("with", with_it), ("without", without)):
        must(without_bolaco(code, tmp_path, tmp_path / "tokens", place / "out", tmp_path / name, site))
        assert torch.equal(load_file(tmp_path / name)["value"], expected), name
    # What the carried code saved is the package's to load again.
    assert torch.equal(logits(load_model(str(tmp_path / "without-again"))), expected)
    carried = (place / "out" / "modeling_lowrank.py").read_text()
    assert "NOTHING_OF_THE_KIND" not in carried
    assert "NOT_NEEDED" not in carried
    assert "class Scaled(" not in carried


def test_a_package_s_layer_without_the_package_is_refused_in_one_line(
    site: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(site, KINDS["storage"])
    ok(*compress("small", "--storage", "scaled", "--search", "uniform"))
    del BUILDERS["scaled"]
    monkeypatch.undo()
    monkeypatch.chdir(place)
    with pytest.raises(
        CheckpointError, match=r"^small: config\.json: .* is a layer of kind 'scaled', which no install"
    ):
        load_model("small")
    # Nor by a package that is broken by now; it is named.
    (site / f"{module}.py").unlink()
    shutil.rmtree(site / "__pycache__", ignore_errors=True)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(__import__("sys").modules, module)
    with pytest.raises(
        CheckpointError, match=r"^small: config\.json: .*'scaled'.* of toy-package 1\.2 cannot be loaded"
    ):
        load_model("small")
    done = bolaco("eval", "small", "--data", "other.txt", "--seq-len", "32")
    assert done.code == 1
    assert done.err.count("\n") == 1
    ok("inspect", "small")


def test_a_package_s_mode_tunes_a_model(site: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, KINDS["mode"])
    ok(*compress("small", "--search", "uniform"))
    ok(*tuning("out", "--set", "options.biases=true"))
    record = info("out")["tuning"]
    assert record["mode"] == "expand"
    assert record["settings"]["options"] == {"biases": True}
    assert record["versions"]["toy-package"] == "1.2"
    before, after = (load_file(f"{name}/model.safetensors") for name in ("small", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    factors = {name for name in before if name.endswith((".expand.weight", ".expand.bias", ".reduce.weight"))}
    assert {name for name in factors if ".expand." in name} <= changed <= factors  # reduce is balanced anew
    done = bolaco(*tuning("no", "--set", "options.bias=true"))
    assert done.code == 1
    assert "options.bias" in done.err.splitlines()[-1]
    monkeypatch.undo()
    assert torch.isfinite(logits(load_model(str(place / "out")))).all()
    ok("inspect", place / "out")


# --- broken ones --------------------------------------------------------------------------------------------------


@kinds
def test_a_typo_in_a_package_s_name_gets_a_hint(kind: Kind, site: Path) -> None:
    install(site, kind, name="bandwidth")
    with pytest.raises(RecipeError, match="did you mean 'bandwidth'"):
        kind.registry.get("bandwith")


BROKEN = {
    "a name of ours": (
        {"name": "{ours}"},
        "{kind} '{ours}' of other-package 1.2 is refused: bolaco has one of that name",
    ),
    "no import": (
        {"source": "import nothing_of_that_name"},
        "ModuleNotFoundError: No module named 'nothing_of_that_n",
    ),
    "error": ({"source": "raise ValueError('two\\nlines')"}, "ValueError: two lines"),
    "exit": ({"source": "raise SystemExit(3)"}, "SystemExit: 3"),
    "absent": ({"attribute": "ABSENT"}, "AttributeError: module"),
    "another thing": ({"attribute": "NOTHING_OF_THE_KIND"}, "NOTHING_OF_THE_KIND is a int, not a bolaco {of}"),
    "another name": ({}, "{kind} 'other' of other-package 1.2 calls itself '{name}'"),
    "no attribute": ({"attribute": "a b:c!!"}, "cannot be loaded from"),
}
# Of every kind what its registry and its class decide; the rest is the same for all.
OF_ALL_KINDS = ("a name of ours", "another thing")


@pytest.mark.parametrize(
    ("kind", "what", "said"),
    [
        (pytest.param if name == "method" or case in OF_ALL_KINDS else slow)(kind, *row, id=f"{name}-{case}")
        for name, kind in KINDS.items()
        for case, row in BROKEN.items()
    ],
)
def test_one_that_cannot_be_used_is_named_and_harms_no_other(
    kind: Kind, what: dict[str, str], said: str, site: Path
) -> None:
    said = said.format(kind=kind.registry.kind, ours=kind.ours, name=kind.name, of=kind.of)
    name = what.get("name", "other").format(ours=kind.ours)
    install(site, kind)
    install(site, kind, "other-package", **(what | {"name": name}))
    done = ok("methods")
    (line,) = [line for line in done.out.splitlines() if said in line]
    assert "other-package 1.2" in line
    assert f"'{name}'" in line
    listing = kind.registry.listing()
    assert {*kind.registry.built_in, kind.name} == set(listing.items)
    assert list(listing.refused) == [line]
    assert kind.registry.get(kind.name).name == kind.name
    if name in kind.registry.built_in:
        assert kind.registry.package(name) == "bolaco"
    else:
        with pytest.raises(RecipeError) as caught:
            kind.registry.get(name)
        assert str(caught.value) == line


@pytest.mark.parametrize("lacks", ["name", "paper", "summary"])
def test_a_storage_that_does_not_describe_itself_is_named_too(lacks: str, site: Path) -> None:
    """Of the others their classes see to it."""
    kind = KINDS["storage"]
    source = re.sub(rf"(class Scaled\(Storage\):.*?)    {lacks} = [^\n]*\n", r"\1", kind.source, flags=re.DOTALL)
    assert source != kind.source
    install(site, kind, source=source)
    (line,) = [line for line in ok("methods").out.splitlines() if "toy-package 1.2" in line]
    assert line.startswith("storage 'scaled' of toy-package 1.2: ")
    assert line.endswith(f"has no {lacks}")


@kinds
def test_two_packages_with_one_name(kind: Kind, site: Path) -> None:
    install(site, kind, "b-package")
    install(site, kind, "a-package")
    with pytest.raises(RecipeError, match=rf"'{kind.name}' is refused: a-package 1\.2 and b-package 1\.2 bring one"):
        kind.registry.get(kind.name)
    assert set(kind.registry.listing().items) == set(kind.registry.built_in)


@kinds
def test_a_broken_one_stops_a_run_in_one_line(
    kind: Kind, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(site, kind, source="import nothing_of_that_name")
    monkeypatch.chdir(tmp_path)
    named = compress("out", f"--{kind.registry.kind}", kind.name, model="nowhere")
    done = bolaco(*(tuning("out", mode=kind.name) if kind is KINDS["mode"] else named))
    assert done.code == 1
    assert done.err.startswith(f"bolaco: error: {kind.registry.kind} '{kind.name}' of toy-package 1.2 cannot be loaded")
    assert done.err.count("\n") == 1
