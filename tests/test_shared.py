"""Two matrices on one input with one input factor (arXiv 2402.16319): the optimum, the layers, whole runs."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import replicate
from transformers import AutoModelForCausalLM

import bolaco.factorize.run as factorize_run
from bolaco.checkpoint.export import export_dense
from bolaco.errors import RecipeError
from bolaco.factorize import InputMetric, low_rank
from bolaco.layers import FollowerLinear, LeadLinear, LowRankLinear, SplitLinear, install_layers
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model
from bolaco.models.structure import Stack, stacked
from bolaco.models.subject import Subject
from bolaco.recipe.recipe import make_recipe
from bolaco.statistics.fisher import FISHER
from bolaco.statistics.gradient import GRADIENT
from bolaco.statistics.stored import StatisticStore, site_statistics
from bolaco.storage.budget import Budget
from bolaco.storage.storage import STORAGES
from tests.command import furnish, ok
from tests.models import (
    FAMILIES,
    Compressed,
    compress_tiny,
    compressed_once,
    mostly_slow,
    slow,
    tiny_llama,
    token_blocks,
)

SHARED = STORAGES.get("shared")


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _pair(rank: int = 4) -> tuple[LeadLinear, FollowerLinear]:
    lead, follower = LeadLinear(12, 10, rank, bias=False), FollowerLinear(12, 6, rank, bias=True)
    follower.follow(lead)
    return lead, follower


def _count(module: torch.nn.Module) -> list[int]:
    calls = [0]
    module.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


def _joint(family: str, **values: object) -> Compressed:
    return compressed_once(family, **({"preset": "joint", "search": None, "keep": 0.75} | values))


# --- the mathematics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [(16, 4, 12), (24, 24, 10), (5, 5, 20)])
@pytest.mark.parametrize("keep", [0.8, 0.6, 0.4])
def test_the_optimum_of_the_stack(shapes: tuple[int, int, int], keep: float) -> None:
    """Eckart-Young on the stack, at the rank of the paper's formula; shared columns help, the budget is the same."""
    first, second, inside = shapes
    structure = stacked(inspect_structure(tiny_llama()))
    site = next(site for site in structure.sites if isinstance(site, Stack))
    site = Stack(**(vars(site) | {"out_features": first + second, "in_features": inside}))
    rank = SHARED.rank_for(site, keep, 1)
    assert rank == math.floor(keep * (first + second) * inside / (first + second + inside))
    assert SHARED.parameters(site, rank) == rank * (first + second + inside) <= keep * site.size
    weight = torch.cat([_noise(first, inside, seed=1), _noise(second, inside, seed=2)])
    factors = low_rank(weight, InputMetric(None), rank)
    exact = torch.linalg.svdvals(weight)[rank:].square().sum()
    torch.testing.assert_close((weight - factors.product(rank)).square().sum(), exact, rtol=1e-9, atol=1e-12)
    assert factors.error(rank) == pytest.approx(float(exact), rel=1e-9)


def test_no_worse_than_separate_factors_of_the_same_rank() -> None:
    """One input factor for two matrices, at a rank that costs as much as two factors of each: the union of spaces.

    Matrices with a common row space lose nothing at its dimension, where separate factors of equal parameters do.
    """
    common = _noise(4, 16, seed=3)
    q, k = _noise(16, 4, seed=4) @ common, _noise(16, 4, seed=5) @ common
    stack = low_rank(torch.cat([q, k]), InputMetric(None), 4)
    assert stack.error(4) < 1e-14 * float(stack.spectrum.sum())
    cost = 4 * (16 + 16 + 16)
    separate = cost // 2 // (16 + 16)
    assert separate == 3
    assert low_rank(q, InputMetric(None), 3).error(3) > 1e-2


def test_gradient_statistics_of_a_stack(tmp_path: Path) -> None:
    structure = stacked(inspect_structure(tiny_llama()), ("v", "o", "down"))
    site = structure.sites[0]
    q, k = site.members
    stores = [StatisticStore(tmp_path / kind.name, kind) for kind in (GRADIENT, FISHER)]
    stores[0].put(0, {q.name: 2 * torch.ones(32, 32), k.name: 3 * torch.ones(16, 16)})
    stores[1].put(0, {q.name: torch.ones(32), k.name: torch.ones(32)})
    joined = site_statistics(0, [site], stores, torch.device("cpu"))[site.name]
    assert joined[GRADIENT].shape == (48, 48)
    assert joined[GRADIENT][:32, :32].eq(2).all()
    assert joined[GRADIENT][32:, 32:].eq(3).all()
    assert not joined[GRADIENT][:32, 32:].any()
    assert joined[FISHER].eq(2).all()


def test_which_matrices_are_stacked() -> None:
    structure = inspect_structure(tiny_llama())
    units = stacked(structure, ("v", "o", "down"))
    assert [site.type for site in units.of_layer(0)] == ["qk", "v", "o", "gate_up", "down"]
    assert units.sites[0].name == "model.layers.0.self_attn.q_proj+k_proj"
    assert [m.name for site in units.sites for m in site.members] == [site.name for site in structure.sites]
    assert sum(site.size for site in units.sites) == sum(site.size for site in structure.sites)
    assert [site.type for site in stacked(structure, ("k",)).of_layer(1)] == ["q", "k", "v", "o", "gate_up", "down"]
    opt = stacked(inspect_structure(FAMILIES["opt"]()))
    assert [site.type for site in opt.of_layer(0)] == ["qk", "v", "o", "up", "down"]


# --- the layers --------------------------------------------------------------------------------------------------


def test_the_shared_product_is_computed_once() -> None:
    lead, follower = _pair()
    calls = _count(lead.reduce)
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(lead(x), x @ lead.dense().T)
    torch.testing.assert_close(follower(x), x @ follower.dense().T + follower.expand.bias)
    assert calls == [1]
    assert lead._kept is None


def test_a_follower_on_its_own() -> None:
    """Called first, twice, or with another tensor of the same values, it computes the product itself."""
    lead, follower = _pair()
    calls = _count(lead.reduce)
    x = torch.randn(2, 12)
    expected = x @ follower.dense().T + follower.expand.bias
    torch.testing.assert_close(follower(x), expected)
    lead(x)
    torch.testing.assert_close(follower(x), expected)
    torch.testing.assert_close(follower(x), expected)
    assert calls == [3]
    other = torch.randn(2, 12)
    lead(x)
    torch.testing.assert_close(follower(other), other @ follower.dense().T + follower.expand.bias)
    assert calls == [5]


def test_nothing_is_held_after_use() -> None:
    lead, follower = _pair()
    x = torch.randn(2, 12)
    follower(lead(x)[:, :0].new_zeros(2, 12))  # another tensor
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_gradients_are_those_of_the_products() -> None:
    lead, follower = _pair()
    x = torch.randn(3, 12, requires_grad=True)
    (lead(x).sum() + follower(x).square().sum()).backward()
    found = x.grad.clone(), lead.reduce.weight.grad.clone()
    x.grad = None
    lead.zero_grad()
    follower.zero_grad()
    reduced = x @ lead.reduce.weight.T
    (lead.expand(reduced).sum() + follower.expand(reduced).square().sum()).backward()
    torch.testing.assert_close(found, (x.grad, lead.reduce.weight.grad))


def test_copies_precisions_and_states() -> None:
    pair = torch.nn.ModuleDict(dict(zip(("q", "k"), _pair(), strict=True)))
    x = torch.randn(2, 12, requires_grad=True)
    pair["q"](x)  # what is kept is no leaf, which deepcopy refuses
    clone = copy.deepcopy(pair)
    assert clone["k"].lead is clone["q"]
    assert clone["k"].lead is not pair["q"]
    assert sorted(pair.state_dict()) == ["k.expand.bias", "k.expand.weight", "q.expand.weight", "q.reduce.weight"]
    assert len(list(pair.parameters())) == 4
    clone.to(torch.bfloat16)
    assert clone["k"](x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="cannot share"):
        pair["k"].follow(LowRankLinear(12, 10, 4, bias=False))


def replicas(module: torch.nn.Module, count: int) -> list[torch.nn.Module]:
    """As DataParallel makes them for so many devices, with what it copies to a device cloned here."""

    def clones(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[replicate.__module__], "_broadcast_coalesced_reshape", clones)
        return replicate(module, list(range(count)))


def own_leads(module: torch.nn.Module) -> list[bool]:
    """For each follower in a model or a copy of it, whether its lead is that of the same copy."""
    inside = set(map(id, module.modules()))
    return [id(m.lead) in inside for m in module.modules() if isinstance(m, FollowerLinear)]


COPIES = {
    "deepcopy": lambda module: [copy.deepcopy(module)],
    "pickle": lambda module: [pickle.loads(pickle.dumps(module))],  # noqa: S301 - our own
    "replicate": lambda module: replicas(module, 3),
    "deepcopy of a replica": lambda module: [copy.deepcopy(module), *replicas(copy.deepcopy(module), 2)],
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_copy_follows_its_own_leads(family: str, how: str) -> None:
    """Whichever way it is made, and again after that; the original stays as it is."""
    model = load_model(str(_joint(family).path))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        for made in COPIES[how](model):
            found = own_leads(made)
            assert found
            assert all(found)
            assert not {id(m) for m in made.modules()} & {id(m) for m in model.modules()}
    assert all(own_leads(model))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_replicas_compute_what_the_original_does_and_send_gradients_back() -> None:
    pair = torch.nn.ModuleDict(dict(zip(("q", "k"), _pair(), strict=True)))
    x = torch.randn(2, 12)
    expected = pair["q"](x), pair["k"](x)
    for made in replicas(pair, 2):
        torch.testing.assert_close((made["q"](x), made["k"](x)), expected)
        calls = _count(made["k"].lead.reduce)
        made["k"](x).sum().backward()
        assert calls == [1]
    assert pair["q"].reduce.weight.grad.ne(0).any()


def test_a_follower_that_is_replicated_without_its_lead() -> None:
    lead, follower = _pair()
    assert [made.lead for made in replicas(follower, 2)] == [lead, lead]


def test_a_configuration_that_shares_with_nothing_fit() -> None:
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(12, 10), "k": torch.nn.Linear(12, 6)})
    lead = {"kind": "two-factor", "out": 10, "rank": 4, "bias": False}
    entries = {"q": lead, "k": {"kind": "follower", "out": 6, "rank": 4, "bias": False, "lead": "q"}}
    with pytest.raises(ValueError, match="cannot share"):
        install_layers(model, entries)


# --- runs --------------------------------------------------------------------------------------------------------


def _layer(model: torch.nn.Module, site: object) -> torch.nn.Module:
    module = model.base_model.get_submodule(site.module)
    return module.parts[site.part] if isinstance(module, SplitLinear) else module


@pytest.mark.parametrize(
    "family", mostly_slow(FAMILIES, "llama_biased", "gemma3_text", "phi3", "gpt2", "opt_post_norm")
)
def test_every_family(family: str, tmp_path: Path) -> None:
    """Loaded weights are the optimum of each stack; one product for both; dense export computes the same."""
    run = _joint(family)
    model = load_model(str(run.path))
    structure = inspect_structure(run.original)
    units = stacked(structure, run.recipe.dense_types)
    ranks = run.info.ranks
    assert set(ranks) == {site.name for site in structure.sites}
    cost = 0
    for unit in units.sites:
        rank = ranks[unit.members[0].name]
        assert {ranks[member.name] for member in unit.members} == {rank}
        cost += SHARED.parameters(unit, rank)
        if rank is None:
            continue
        layers = [_layer(model, member) for member in unit.members]
        if isinstance(unit, Stack):
            assert isinstance(layers[0], LeadLinear)
            assert layers[1].lead is layers[0]
        weight = Subject(run.original, units).weight(unit)
        product = torch.cat([layer.dense().detach() for layer in layers])
        exact = torch.linalg.svdvals(weight.double())[rank:].square().sum()
        assert float((weight - product).double().square().sum()) == pytest.approx(float(exact), rel=1e-4)
    assert run.info.parameters_linears == cost <= 0.75 * run.info.parameters_linears_dense
    assert any(isinstance(module, FollowerLinear) for module in model.modules())

    tokens = token_blocks(2, 24, seed=5)
    counts = [_count(module.reduce) for module in model.modules() if isinstance(module, LeadLinear)]
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    assert counts == [[1]] * len(counts)
    assert all(m._kept is None for m in model.modules() if isinstance(m, LeadLinear))
    export_dense(str(run.path), tmp_path / "stock")
    with torch.no_grad():
        stock = load_model(str(tmp_path / "stock"))(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(stock, logits, rtol=1e-4, atol=1e-4)


def test_no_text_is_read_and_no_pass_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With text for the final table alone; the calibration source of the default is not there."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a data-free method looks at activations")

    monkeypatch.setattr(factorize_run, "input_walk", refuse)
    monkeypatch.chdir(furnish(tmp_path))
    words = ["compress", "model", "--eval", "other.txt", "--seq-len", "32"]
    words += ["--set", "search.rank_multiple=4", "--set", "evaluation.windows=4"]
    for method in ("joint", "svd", "welore"):
        more = ["--set", "refinement.steps=0"] if method == "svd" else []
        ok(*words, "--keep", "0.75", "--method", method, *more, "-o", method)
    assert "gate_up" in ok(*words, "--keep", "0.75", "--method", "joint", "--dry-run").out
    assert "rank of each matrix" in ok("inspect", "joint").out


def test_the_evaluation_text_does_not_depend_on_what_is_read(tmp_path: Path) -> None:
    """From the same source, a data-free method is measured on the same tokens as the others."""
    found = [
        compress_tiny(tiny_llama(), tmp_path / method, method=method, preset="svd-llm", search="uniform").info
        for method in ("svd", "svd-llm")
    ]
    assert found[0].perplexity.dense == found[1].perplexity.dense


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "afm"),
        ("phi3", "kfac"),
        ("llama_biased", "fwsvd"),
        ("gpt2", "fwsvd"),
        slow("phi3", "afm"),
        slow("llama_biased", "kfac"),
        slow("gpt2", "kfac"),
        slow("llama_biased", "afm"),
        slow("gpt2", "afm"),
        slow("llama", "kfac"),
        slow("llama", "fwsvd"),
        slow("phi3", "fwsvd"),
    ],
)
def test_other_metrics_and_closed_form_ranks(family: str, method: str) -> None:
    """The stack is factored in each metric; a bias is added to both matrices."""
    options = {"calibration.gradient_sequences": 4, "search.dense_types": []}
    run = _joint(family, method=method, search="spectral", keep=0.7, options=options)
    assert (run.info.method, run.info.storage) == (method, "shared")
    assert 0.6 < run.info.keep_linears <= 0.7
    gap = run.info.perplexity.compressed / run.info.perplexity.dense
    assert gap < 3
    model = load_model(str(run.path))
    followers = [m for m in model.modules() if isinstance(m, FollowerLinear)]
    assert followers
    if method != "fwsvd":
        assert all(m.expand.bias is not None and m.lead.expand.bias is not None for m in followers)


def test_blocks_are_refined_as_they_are_stored() -> None:
    run = _joint("llama", method="afm", options={"refinement.steps": 3})
    plain = _joint("llama", method="afm")
    assert run.info.ranks == plain.info.ranks
    assert run.info.parameters == plain.info.parameters
    changed = 0
    pairs = zip(load_model(str(run.path)).state_dict().items(), load_model(str(plain.path)).state_dict().values())
    for (name, left), right in pairs:
        changed += not torch.equal(left, right) and "reduce" in name
    assert changed
    assert run.info.perplexity.compressed < 1.2 * plain.info.perplexity.compressed


def test_training_with_gradient_checkpointing() -> None:
    run = _joint("llama")
    tokens = token_blocks(2, 16)
    grads = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(run.path).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_saved_again_it_is_the_same(tmp_path: Path) -> None:
    model = load_model(str(_joint("phi3").path))
    model.save_pretrained(tmp_path)
    tokens = token_blocks(1, 16)
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path))(tokens).logits, model(tokens).logits)


def test_the_store_holds_stacks() -> None:
    run = _joint("llama")
    names = run.factors.load(0)
    assert sorted(name.rpartition(".")[2] for name in names) == ["gate_proj+up_proj", "q_proj+k_proj"]
    units = stacked(inspect_structure(run.original), run.recipe.dense_types)
    assert Budget(units.sites, 0.75, SHARED).total == run.info.parameters_linears_dense


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"storage": "pivoted", "method": "joint"}, "storage pivoted contradicts method joint"),
        (
            {"method": "joint", "search": "5x4"},
            r"search\.name 5x4 .* with shared storage; there is spectral, uniform, welore",
        ),
        ({"storage": "shared", "search": "hand"}, "search.name hand is not possible with shared storage"),
        ({"storage": "dense"}, "storage: unknown storage 'dense'; known are pivoted, shared, two-factor"),
    ],
)
def test_contradictions(values: dict[str, str], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        make_recipe({"model": "m", "keep": 0.5} | values)
    with pytest.raises(RecipeError, match=r"refinement\.fit is not possible with shared storage"):
        make_recipe({"model": "m", "keep": 0.5, "refinement": {"fit": True}}, "joint")
