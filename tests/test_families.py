"""Every family through the whole pipeline: exactness, budget, reload, generation, and the original left alone."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import bolaco  # noqa: F401 - teaches the auto classes
from bolaco.allocate.search.elastic import ElasticModel
from bolaco.checkpoint.write import compressed_state
from bolaco.layers import LowRankLinear, SplitLinear
from bolaco.models.find import inspect_structure
from bolaco.models.lowrank import FORMAT, config_class, model_classes
from bolaco.models.structure import Site
from bolaco.models.subject import Subject
from bolaco.storage.block import compressed_block
from tests.models import (
    FAMILIES,
    QUICK_FAMILIES,
    Compressed,
    compress_tiny,
    compressed,
    mostly_slow,
    slow,
    tiny_llama,
    token_blocks,
)

# A run that searches, beside the ones that take the hand allocation.
RUNS = [
    *((family, "hand") if family in QUICK_FAMILIES else slow(family, "hand") for family in FAMILIES),
    ("llama", "5x1"),
    slow("gemma2", "5x1"),
    ("gpt2", "5x1"),
]

families = pytest.mark.parametrize("family", mostly_slow(FAMILIES, *QUICK_FAMILIES))
runs = pytest.mark.parametrize(("family", "search"), RUNS)


def reload(run: Compressed) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(run.path).eval()


def logits(model: PreTrainedModel, blocks: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_blocks(2, 48, seed=7) if blocks is None else blocks, use_cache=False).logits


def layer_of(model: PreTrainedModel, site: Site) -> nn.Module:
    """The layer of a compressed model that holds a site."""
    module = model.base_model.get_submodule(site.module)
    return module.parts[site.part] if isinstance(module, SplitLinear) else module


def linear_parameters(model: PreTrainedModel, modules: set[str]) -> int:
    """Weights, biases not counted, of everything inside the named modules."""
    found = [model.base_model.get_submodule(name) for name in modules]
    return sum(p.numel() for module in found for name, p in module.named_parameters() if name.endswith("weight"))


@families
def test_keep_one_is_exact(family: str) -> None:
    run = compressed(family, keep=1.0)
    assert run.info.keep_linears == 1.0
    assert set(run.info.ranks.values()) == {None}
    assert torch.equal(logits(reload(run)), logits(run.original))


FEW = ("llama", "phi3")


@pytest.mark.parametrize(
    ("family", "keep"),
    [
        *((family, 0.7) if family in QUICK_FAMILIES else slow(family, 0.7) for family in FAMILIES),
        *((family, keep) for family in FEW for keep in (0.9, 0.5)),
        *(slow(family, keep) for family in FAMILIES if family not in FEW for keep in (0.9, 0.5)),
    ],
)
def test_budget_in_the_reloaded_model(family: str, keep: float) -> None:
    check_budget(compressed(family, keep=keep), keep)


@pytest.mark.parametrize("family", ["llama", slow("gemma2"), "gpt2"])
def test_budget_after_a_search(family: str) -> None:
    run = compressed(family, search="5x1")
    check_budget(run, 0.7)
    trials = run.info.trials
    assert len(trials) == 3
    best = min(trials, key=lambda trial: trial.objective)
    for site in inspect_structure(run.original).sites:
        dimension, index = {"q": ("qk", 0), "k": ("qk", 1)}.get(site.type, (site.type, 0))
        expected = None if site.type == "v" else best.ranks[dimension][index]
        assert run.info.ranks[site.name] == expected


def check_budget(run: Compressed, keep: float) -> None:
    model, info = reload(run), run.info
    structure = inspect_structure(run.original)
    modules = {site.module for site in structure.sites}
    dense, kept = linear_parameters(run.original, modules), linear_parameters(model, modules)
    assert kept <= math.floor(Fraction(str(keep)) * dense)
    assert kept < dense
    assert (info.parameters_linears, info.parameters_linears_dense) == (kept, dense)
    assert info.keep_linears == kept / dense
    whole, whole_dense = (sum(p.numel() for p in m.parameters()) for m in (model, run.original))
    assert (info.parameters, info.parameters_dense) == (whole, whole_dense)
    assert info.keep_model == whole / whole_dense
    assert info.ranks.keys() == {site.name for site in structure.sites}
    for site in structure.sites:
        layer, rank = layer_of(model, site), info.ranks[site.name]
        assert (layer.rank if isinstance(layer, LowRankLinear) else None) == rank
        assert rank is None or (rank % 4 == 0 and rank * (site.out_features + site.in_features) < site.size)


@runs
def test_reload_equals_the_model_before_saving(family: str, search: str) -> None:
    run = compressed(family, search=search)
    original, ranks = run.original, run.info.ranks
    assert any(ranks.values())
    structure, store = inspect_structure(original), run.factors
    subject = Subject(original, structure)
    blocks = (compressed_block(subject, layer, store.load(layer), ranks) for layer in range(structure.num_layers))
    state = compressed_state(original, structure, blocks, run.recipe.form)
    model_type = original.config.model_type
    values = original.config.to_dict() | {
        "model_type": f"lowrank_{model_type}",
        "lowrank": {"format": FORMAT, "matrices": state.matrices},
    }
    built = model_classes(model_type)[1](config_class(model_type).from_dict(values)).eval()
    built.load_state_dict(state.tensors, assign=True)
    built.tie_weights()
    expected = logits(built)
    assert torch.equal(logits(reload(run)), expected)
    assert torch.equal(logits(reload(run)), expected)
    assert not torch.allclose(expected, logits(original), atol=0.05)


@runs
def test_reload_equals_what_the_search_measured(family: str, search: str) -> None:
    run = compressed(family, search=search)
    subject = Subject(run.original, inspect_structure(run.original))
    before = logits(run.original)
    with ElasticModel(subject, run.factors) as elastic:
        assert torch.equal(logits(run.original), before)
        elastic.set_ranks(run.info.ranks)
        measured = logits(run.original)
        elastic.set_ranks({})
        assert torch.equal(logits(run.original), before)
    assert torch.equal(logits(run.original), before)
    torch.testing.assert_close(logits(reload(run)), measured, rtol=1e-5, atol=1e-5)


@families
def test_factors_are_optimal_for_the_inputs_of_the_original(family: str) -> None:
    """Against inputs recorded from one plain forward pass in float64: no rank-r map leaves less output variance, and
    the mean output is kept."""
    run = compressed(family)
    original, model = copy.deepcopy(run.original).double(), reload(run)
    structure = inspect_structure(original)
    subject = Subject(original, structure)
    inputs: dict[str, Tensor] = {}
    for name in {site.module for site in structure.sites}:

        def keep_input(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            inputs[name] = args[0].reshape(8, 32, -1)

        original.base_model.get_submodule(name).register_forward_pre_hook(keep_input)
    logits(original, run.texts.calibration)
    factored = 0
    for site in structure.sites:
        layer = layer_of(model, site)
        if not isinstance(layer, LowRankLinear):
            continue
        factored += 1
        x = inputs[site.module]
        covariance = torch.stack([sequence.T.cov() for sequence in x]).mean(dim=0)
        weight, bias = subject.weight(site), subject.bias(site)
        spectrum = torch.linalg.eigvalsh(weight @ covariance @ weight.T).flip(0)
        change = weight - layer.dense().detach().double()
        lost, least = float(torch.trace(change @ covariance @ change.T)), float(spectrum[layer.rank :].sum())
        assert lost == pytest.approx(least, rel=1e-3, abs=1e-6 * float(spectrum.sum()))
        mean = x.mean(dim=(0, 1))
        kept = layer.dense().double() @ mean + layer.expand.bias.double()
        torch.testing.assert_close(kept, weight @ mean + (0 if bias is None else bias), rtol=1e-3, atol=1e-4)
    assert factored >= 3


@runs
def test_generation_with_and_without_cache(family: str, search: str) -> None:
    model = reload(compressed(family, search=search))
    prompt = token_blocks(2, 8, seed=3)
    settings: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    settings |= {"attention_mask": torch.ones_like(prompt), "return_dict_in_generate": True, "output_logits": True}
    with_cache = model.generate(prompt, use_cache=True, **settings)
    without = model.generate(prompt, use_cache=False, **settings)
    assert with_cache.sequences.shape == (2, 24)  # twice the sliding window
    assert torch.equal(with_cache.sequences, without.sequences)
    # Random models repeat themselves, so the numbers behind the tokens are compared too.
    steps = torch.stack(without.logits)
    torch.testing.assert_close(torch.stack(with_cache.logits), steps, rtol=1e-4, atol=1e-4)
    assert (steps[1:] - steps[:-1]).abs().amax(dim=-1).min() > 1e-3


@pytest.mark.parametrize(
    ("family", "search"),
    [
        *((family, "hand") for family in ("llama", "phi3", "gpt2")),
        ("llama", "5x1"),
        slow("opt", "hand"),
        slow("gpt2", "5x1"),
        slow("phi3", "5x1"),
        slow("opt", "5x1"),
    ],
)
def test_the_callers_model_is_left_as_it_is(family: str, search: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    modules = {name: (type(module), module.training) for name, module in model.named_modules()}
    before = logits(model)
    compress_tiny(model, tmp_path / "out", search=search, trials=2)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation)
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model), before)
    # Nothing of the run's inference mode sticks to it: it can still be trained.
    model(input_ids=token_blocks(1, 16), labels=token_blocks(1, 16)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow  # test_resume.py says it of the command line
def test_two_runs_write_the_same_weights(tmp_path: Path) -> None:
    first, second = (compress_tiny(tiny_llama(), tmp_path / name, search="5x1", trials=3) for name in "ab")
    assert first.info.ranks == second.info.ranks
    files = [(run.path / "model.safetensors").read_bytes() for run in (first, second)]
    assert files[0] == files[1]


def test_a_model_in_training_mode_is_measured_without_dropout_and_given_back(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"]()
    expected = compress_tiny(model, tmp_path / "evaluating").info.perplexity
    model.train()
    model.base_model.ln_f.eval()
    assert compress_tiny(model, tmp_path / "training").info.perplexity == expected
    assert model.training
    assert model.base_model.h[0].training
    assert not model.base_model.ln_f.training
