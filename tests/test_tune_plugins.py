"""Tuning what other packages bring: matrices stored in a way of theirs, and a mode of theirs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bolaco.checkpoint.info import write_info
from bolaco.errors import RecipeError
from bolaco.layers import FactoredLinear, SketchLinear
from bolaco.layers.tensor_train import TrainAdapter
from bolaco.models.load import load_model
from bolaco.storage.storage import STORAGES
from bolaco.tune.mode import MODES, matrices_of
from tests.command import digest
from tests.models import FAMILIES, Compressed, compress_tiny, save_tiny, slow
from tests.processes import without_bolaco
from tests.test_checkpoint import must
from tests.test_docs import install as install_example
from tests.test_tune import LOAD, Stopped, logits, prepared, stop_at, tune

# Two storages of one package: "toy-scaled" has parts that are no Linears, and an entry that depends on the weights;
# "toy-ordered" is a subclass of the layer of two factors.
STORAGE = '''
import torch
from torch import Tensor, nn

from bolaco.layers import Entry, FactoredLinear, LowRankLinear, builds
from bolaco.models.structure import Site
from bolaco.storage.storage import Storage


class Lengths(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class ScaledLinear(FactoredLinear):
    """Two factors with columns and rows of length one, and the lengths."""

    kind = "toy-scaled"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, largest: int = 0) -> None:
        super().__init__(in_features, out_features, rank)
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.lengths = Lengths(rank)
        self.expand = nn.Linear(rank, out_features, bias=bias)
        self.largest = largest

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.lengths(self.reduce(x)))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.expand.weight * self.lengths.weight, self.reduce.weight

    def dense_bias(self) -> Tensor | None:
        return self.expand.bias

    def entry(self) -> Entry:
        return super().entry() | {"largest": self.largest}


class OrderedLinear(LowRankLinear):
    """Two factors in order of falling length of the columns of the first."""

    kind = "toy-ordered"


@builds(ScaledLinear.kind)
def _scaled(in_features: int, entry: Entry) -> ScaledLinear:
    return ScaledLinear(in_features, entry["out"], entry["rank"], entry["bias"], entry["largest"])


@builds(OrderedLinear.kind)
def _ordered(in_features: int, entry: Entry) -> OrderedLinear:
    return OrderedLinear(in_features, entry["out"], entry["rank"], entry["bias"])


class Scaled(Storage):
    name = ScaledLinear.kind
    paper = ""
    summary = "two factors and lengths"

    def cost(self, site: Site, rank: int) -> int:
        return rank * (site.out_features + site.in_features + 1)

    def max_rank(self, site: Site, multiple: int) -> int:
        return (site.size - 1) // (site.out_features + site.in_features + 1) // multiple * multiple

    def pack(self, layer: FactoredLinear) -> FactoredLinear:
        expand, reduce = (factor.detach() for factor in layer.factors())
        bias = layer.dense_bias()
        left, right = expand.norm(dim=0), reduce.norm(dim=1)
        largest = int((left * right).argmax())
        made = ScaledLinear(layer.in_features, layer.out_features, layer.rank, bias is not None, largest)
        state = {"expand.weight": expand / left, "reduce.weight": reduce / right[:, None]}
        state |= {"lengths.weight": left * right} | ({} if bias is None else {"expand.bias": bias.detach()})
        made.load_state_dict(state, assign=True)
        return made.requires_grad_(False)


class Ordered(Storage):
    name = OrderedLinear.kind
    paper = ""
    summary = "two factors in order"

    def cost(self, site: Site, rank: int) -> int:
        return rank * (site.out_features + site.in_features)

    def max_rank(self, site: Site, multiple: int) -> int:
        return (site.size - 1) // (site.out_features + site.in_features) // multiple * multiple

    def pack(self, layer: FactoredLinear) -> FactoredLinear:
        expand, reduce = (factor.detach() for factor in layer.factors())
        bias = layer.dense_bias()
        order = expand.norm(dim=0).argsort(descending=True)
        made = OrderedLinear(layer.in_features, layer.out_features, layer.rank, bias is not None)
        state = {"expand.weight": expand[:, order], "reduce.weight": reduce[order]}
        made.load_state_dict(state | ({} if bias is None else {"expand.bias": bias.detach()}), assign=True)
        return made.requires_grad_(False)


SCALED, ORDERED = Scaled(), Ordered()
'''
# What is trained is one number for each factored matrix, by which its output factor is multiplied.
MODE = """
import torch
from pydantic import Field
from torch import nn

from bolaco.tune import Context, Defaults, Mode, Options, Prepared, stored, two_factors


class SizeOptions(Options):
    start: float = Field(1.0, gt=0, description="the number at first")


class Sized(nn.Module):
    def __init__(self, layer, start):
        super().__init__()
        self.layer, self.size = layer, nn.Parameter(torch.tensor([start]))

    def forward(self, x):
        made = self.layer(x)
        bias = self.layer.dense_bias()
        return self.size * made if bias is None else self.size * (made - bias) + bias


def prepare(context: Context) -> Prepared:
    model, matrices = context.model, context.factored
    layers = two_factors(model, matrices)
    for matrix in matrices:
        matrix.put(model, Sized(layers[matrix.name], context.options.start))

    def finish():
        for matrix in matrices:
            sized = matrix.of(model)
            sized.layer.expand.weight.mul_(sized.size.detach())
            matrix.put(model, sized.layer)
        stored(model, matrices)
        return model

    return Prepared(finish, frozenset(matrix.name for matrix in matrices))


MODE = Mode(
    name="toy-size",
    paper="",
    summary="one number a matrix",
    defaults=Defaults(learning_rate=1e-2),
    prepare=prepare,
    options=SizeOptions,
    check=lambda context: context.factored,
)
"""
STORED_BY = ("toy-scaled", "toy-ordered")
# Modes that bring every matrix they train into its stored form again; the others leave factors where they are.
PACKING = ("continued", "diagonal", "factors", "mixed-rank")


def install(site: Path, module: str, source: str, group: str, **names: str) -> None:
    """A package with one module and entry points ``name=attribute``, as an installer leaves it."""
    site.mkdir(exist_ok=True)
    (site / f"{module}.py").write_text(source, encoding="utf-8")
    metadata = site / f"{module}-3.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 3.1\n", encoding="utf-8")
    lines = [f"{name.replace('_', '-')} = {module}:{attribute}" for name, attribute in names.items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages, not on the path yet."""
    folder = tmp_path_factory.mktemp("installed") / "site"
    install(folder, "toy_storages", STORAGE, "bolaco.storages", toy_scaled="SCALED", toy_ordered="ORDERED")
    install(folder, "toy_modes", MODE, "bolaco.modes", toy_size="MODE")
    return folder


@pytest.fixture(autouse=True)
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts it on the path while a test runs."""
    monkeypatch.syspath_prepend(site)


@pytest.fixture(scope="module")
def made(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Compressed]]:
    """Tiny models by family and storage; leave the folders as they are."""
    folder, found = tmp_path_factory.mktemp("stored"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        for family, names in {"llama": STORED_BY, "phi3": STORED_BY[:1]}.items():
            original = FAMILIES[family]()
            kept = save_tiny(folder / family, original)
            for name in names:
                result = compress_tiny(original, folder / f"{family}-{name}", method="afm", storage=name)
                write_info(result.path, result.info.model_copy(update={"model": str(kept)}))
                found[family, name] = result
    return found


def kinds(model: Any) -> dict[str, str]:
    """By matrix, the kind of its entry; of a coded one, of the layer inside."""
    entries = {matrix.name: matrix.entry for matrix in matrices_of(model) if matrix.entry is not None}
    return {name: entry.get("layer", entry)["kind"] for name, entry in entries.items()}


def factored(model: Any) -> dict[str, FactoredLinear]:
    """The factored layers by the names of their matrices."""
    layers = {matrix.name: matrix.of(model) for matrix in matrices_of(model)}
    return {name: layer for name, layer in layers.items() if isinstance(layer, FactoredLinear)}


@pytest.mark.parametrize(
    ("name", "family", "storage"),
    [
        ("lora", "llama", "toy-scaled"),
        ("tt-lora", "llama", "toy-scaled"),
        ("factors", "phi3", "toy-scaled"),
        ("mixed-rank", "llama", "toy-ordered"),
        ("sketch", "llama", "toy-ordered"),
        *(slow(name, "llama", "toy-scaled") for name in MODES.built_in if name not in ("lora", "tt-lora")),
        *(slow(name, "phi3", "toy-scaled") for name in MODES.built_in if name != "factors"),
        *(slow(name, "llama", "toy-ordered") for name in PACKING if name not in ("mixed-rank", "sketch")),
    ],
)
def test_every_mode_tunes_what_a_package_has_stored(
    name: str, family: str, storage: str, made: dict[tuple[str, str], Compressed], tmp_path: Path
) -> None:
    source, mode = made[family, storage], MODES.get(name)
    old = load_model(str(source.path))
    before = logits(old)
    assert storage in kinds(old).values()
    if mode.exact_start:
        ready = prepared(mode, load_model(str(source.path)), source)
        with torch.no_grad():
            finished = ready.finish()
        torch.testing.assert_close(logits(finished), before, rtol=1e-4, atol=1e-4)
        assert kinds(finished) == kinds(old)

    record = tune(source.path, tmp_path / "out", name).info
    assert record.storage == storage
    assert record.ranks == source.info.ranks
    assert record.tuning.frozen_sha256["before"] == record.tuning.frozen_sha256["after"]
    assert record.tuning.perplexity.after != record.tuning.perplexity.before
    new = load_model(str(tmp_path / "out"))
    if name != "sketch":  # which codes what was dense too
        assert kinds(new) == kinds(old)
    assert {key: kind for key, kind in kinds(new).items() if kind != "dense"} == {
        key: kind for key, kind in kinds(old).items() if kind != "dense"
    }
    if name == "tt-lora":  # the model itself is the input, and has adapters around it
        assert not list((tmp_path / "out").glob("model*"))
        adapted = [module.layer for module in new.modules() if isinstance(module, TrainAdapter)]
        assert storage in {getattr(layer, "kind", None) for layer in adapted}
        return
    ours, theirs = factored(new), factored(old)
    assert {key: (type(layer), layer.rank) for key, layer in ours.items()} == {
        key: (type(layer), layer.rank) for key, layer in theirs.items()
    }
    if mode.same_ranks:
        assert sum(p.numel() for p in new.parameters()) == sum(p.numel() for p in old.parameters())
    assert all(not torch.equal(layer.dense(), theirs[key].dense()) for key, layer in ours.items())
    if name == "sketch":
        coded = [module for layer in ours.values() for module in layer.children()]
        assert {type(module).__name__ for module in coded} <= {"SketchLinear", "Lengths"}
        assert any(isinstance(module, SketchLinear) for module in coded)
        return
    # The entry of every matrix is that of the layer which its tensors are of.
    for matrix in matrices_of(new):
        if matrix.name in ours:
            part = {"name": matrix.entry["name"]} if "name" in matrix.entry else {}
            assert matrix.entry == part | ours[matrix.name].entry()
    if name in PACKING:
        for layer in ours.values():
            lengths = layer.expand.weight.norm(dim=0)
            if storage == "toy-scaled":
                torch.testing.assert_close(lengths, torch.ones_like(lengths))
                assert layer.largest == int(layer.lengths.weight.argmax())
            else:
                assert torch.equal(lengths, lengths.sort(descending=True).values)


@pytest.mark.parametrize("on", ["all", "factored"])
def test_adapters_go_on_its_linears_only(on: str, made: dict[tuple[str, str], Compressed], tmp_path: Path) -> None:
    source = made["llama", "toy-scaled"]
    result = tune(source.path, tmp_path / "out", "lora", {"options.on": on})
    before, after = load_file(source.path / "model.safetensors"), load_file(result.path / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {
        key for key in before if key.endswith(("reduce.weight", "expand.weight") + ("v_proj.weight",) * (on == "all"))
    }


def test_the_result_loads_where_neither_bolaco_nor_the_package_is(
    made: dict[tuple[str, str], Compressed], tmp_path: Path
) -> None:
    """Coded, so that the package's layer is described inside the entry of another one."""
    result = tune(made["llama", "toy-scaled"].path, tmp_path / "out", "sketch")
    must(without_bolaco(LOAD, tmp_path, result.path, tmp_path / "logits"))
    with torch.no_grad():
        ours = load_model(str(result.path))(input_ids=torch.arange(12)[None], use_cache=False).logits
    torch.testing.assert_close(load_file(tmp_path / "logits")["logits"], ours)


@pytest.mark.parametrize("name", [*PACKING, "lora"])
def test_a_missing_package_is_noticed_before_training(
    name: str,
    made: dict[tuple[str, str], Compressed],
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the modes that need it; the layers are known still, as they are where they were imported once."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(site)])
    assert "toy-scaled" not in STORAGES
    if name not in PACKING:
        tune(made["llama", "toy-scaled"].path, tmp_path / "out", name)
        return
    monkeypatch.setattr("bolaco.tune.run.train", lambda *_: pytest.fail("trained"))
    with pytest.raises(RecipeError, match="unknown storage 'toy-scaled'"):
        tune(made["llama", "toy-scaled"].path, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


# --- a mode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["pivoted", "toy-scaled", slow("two-factor"), slow("toy-ordered")])
def test_a_mode_of_a_package(storage: str, made: dict[tuple[str, str], Compressed], tmp_path: Path) -> None:
    source = made.get(("llama", storage)) or compress_tiny(FAMILIES["llama"](), tmp_path / "in", storage=storage)
    mode = MODES.get("toy-size")
    model = load_model(str(source.path))
    before = logits(model)
    ready = prepared(mode, model, source)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [p.numel() for p in trained] == [1] * len(ready.touched)
    with torch.no_grad():
        trained[0].fill_(1.5)
    changed = logits(model)
    assert not torch.allclose(changed, before, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(logits(ready.finish()), changed, rtol=1e-4, atol=1e-4)

    record = tune(source.path, tmp_path / "out", "toy-size").info
    assert record.tuning.mode == "toy-size"
    assert record.tuning.trainable_parameters == len(trained)
    assert record.tuning.settings["options"] == {"start": 1.0}
    assert record.tuning.settings["training"]["learning_rate"] == 1e-3
    assert record.tuning.versions["toy_modes"] == "3.1"
    assert record.ranks == source.info.ranks
    assert kinds(load_model(str(tmp_path / "out"))) == kinds(load_model(str(source.path)))


def test_a_run_of_it_that_was_interrupted_goes_on(
    made: dict[tuple[str, str], Compressed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, words = made["llama", "toy-scaled"].path, {"options": {"training.save_steps": 2}, "max_steps": 4}
    whole = tune(model, tmp_path / "whole", "toy-size", **words)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, False)
        with pytest.raises(Stopped):
            tune(model, tmp_path / "out", "toy-size", **words)
    again = tune(model, tmp_path / "out", "toy-size", **words)
    assert again.info.tuning.curve == whole.info.tuning.curve
    assert digest(again.path / "model.safetensors") == digest(whole.path / "model.safetensors")


def test_its_options_are_checked(made: dict[tuple[str, str], Compressed], tmp_path: Path) -> None:
    model = made["llama", "toy-scaled"].path
    with pytest.raises(RecipeError, match=r"options\.strat: mode 'toy-size' has no such option; did you mean 'start'"):
        tune(model, tmp_path / "out", "toy-size", {"options.strat": 2})
    with pytest.raises(RecipeError, match=r"options\.start: .* greater than 0 \(got -1\)"):
        tune(model, tmp_path / "out", "toy-size", {"options.start": -1})
    tune(model, tmp_path / "out", "toy-size", {"options.start": 1.5}, max_steps=1)
    settings = json.loads((tmp_path / "out" / "bolaco.json").read_text())["tuning"]["settings"]
    assert settings["options"] == {"start": 1.5}


@pytest.mark.parametrize("biases", [True, slow(False)])
def test_the_mode_of_the_document(
    biases: bool, made: dict[tuple[str, str], Compressed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/add-a-mode.md keeps the promises it lists, on matrices of another package too."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    mode = MODES.get(install_example("add-a-mode.md", tmp_path))
    source = made["phi3", "toy-scaled"]
    model = load_model(str(source.path))
    before = logits(model)
    ready = prepared(mode, model, source, biases=biases)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    weights = {f"{name}.expand.weight" for name in ready.touched}
    assert weights <= trained
    assert {name.removesuffix("bias") for name in trained - weights} == (
        {name.removesuffix("weight") for name in weights} if biases else set()
    )
    with torch.no_grad():
        torch.testing.assert_close(logits(ready.finish()), before, rtol=1e-4, atol=1e-4)

    options = {"options.biases": biases, "training.save_steps": 1}
    whole = tune(source.path, tmp_path / "whole", mode.name, options)
    with monkeypatch.context() as patch:
        stop_at(patch, 2, True)
        with pytest.raises(Stopped):
            tune(source.path, tmp_path / "out", mode.name, options)
    again = tune(source.path, tmp_path / "out", mode.name, options)
    assert digest(again.path / "model.safetensors") == digest(whole.path / "model.safetensors")
    assert again.info.ranks == source.info.ranks
    assert kinds(load_model(str(again.path))) == kinds(load_model(str(source.path)))
