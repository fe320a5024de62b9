"""Matrices of a model in few bits: the layer, the rounding of a product, bits in the budget, and whole runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bolaco.allocate.allocators.spectral import coded_menu, coded_ranks
from bolaco.api import tune
from bolaco.checkpoint.export import export_dense
from bolaco.checkpoint.info import weight_bytes
from bolaco.errors import BudgetError, RecipeError, UnsupportedModelError
from bolaco.factorize.noise import Noise, matrix_noise
from bolaco.factorize.solver import InputMetric, low_rank
from bolaco.layers import LowRankLinear, QuantizedLinear, build_layer
from bolaco.layers.quantized import entry_of, quantized, unpacked
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model
from bolaco.models.size import coded_layers, parameters_in
from bolaco.models.structure import Site
from bolaco.models.subject import Subject
from bolaco.quantize.gptq import Feedback, gptq
from bolaco.quantize.matrix import round_to_nearest
from bolaco.quantize.packing import pack
from bolaco.quantize.settings import WHOLE, Quantization, grid_spec
from bolaco.recipe.recipe import load_recipe
from bolaco.refine.loss import relative_error
from bolaco.refine.quantize import scaled_codes, settle
from bolaco.refine.rounding import BlockRounding, InputFeedback, quantized_linear, round_pair
from bolaco.storage.budget import Budget, ratio_of
from bolaco.storage.coded import CodedStorage
from bolaco.storage.storage import STORAGES
from tests.models import (
    Compressed,
    compress_tiny,
    compressed_once,
    save_tiny,
    text_file,
    tiny_llama,
    tiny_recipe,
    token_blocks,
)
from tests.processes import without_bolaco
from tests.test_storage import units
from tests.types import of_type

MODEST = settings(deadline=None, max_examples=40, derandomize=True)
BITS = st.sampled_from([2, 3, 4, 5, 6, 7, 8])


def noise_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(size: int, seed: int = 1, decay: float = 2.0) -> Tensor:
    """A second moment whose directions differ much, as those of activations do."""
    x = noise_of(400, size, seed=seed) * torch.linspace(0, -decay, size, dtype=torch.float64).exp()
    x = x @ torch.linalg.qr(noise_of(size, size, seed=seed + 1))[0]
    return x.T @ x / len(x)


# --- the layer ----------------------------------------------------------------------------------------------------


@MODEST
@given(bits=st.integers(1, 8), count=st.integers(1, 70), seed=st.integers(0, 999))
def test_codes_are_read_as_they_are_packed(bits: int, count: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count,), generator=draw, dtype=torch.uint8)
    assert torch.equal(unpacked(pack(codes, bits), bits, count), codes)


@MODEST
@given(bits=BITS, out=st.integers(1, 12), inside=st.integers(1, 40), group=st.integers(1, 48), bias=st.booleans())
def test_the_layer_has_the_matrix_that_was_quantized(bits: int, out: int, inside: int, group: int, bias: bool) -> None:
    linear = nn.Linear(inside, out, bias=bias)
    matrix = round_to_nearest(linear.weight.detach(), grid_spec(bits, group))
    layer = quantized_linear(linear, matrix, group)
    assert torch.equal(layer.weight, matrix.dense())
    x = noise_of(3, inside).float()
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, matrix.dense(), linear.bias))
    # As a whole number of bits in a file: codes, scales of 16 bits, and the bias.
    assert 8 * layer.codes.nbytes + 16 * layer.scales.numel() == grid_spec(bits, group).stored_bits(out, inside)


@pytest.mark.parametrize("kind", ["dense", "two-factor", "lead", "split"])
def test_an_entry_makes_the_layer_again(kind: str) -> None:
    inner: dict[str, Any] = {"kind": kind, "out": 6, "rank": 3, "bias": True}
    if kind == "dense":
        del inner["rank"]
    entry = {"kind": "quantized", "bits": 3, "group": 4, "layer": inner}
    if kind == "split":
        part = {"kind": "quantized", "bits": 5, "group": 4, "layer": {"kind": "dense", "out": 6, "bias": True}}
        entry = {"kind": "split", "parts": [{"name": "q"} | part]}
    layer = build_layer(9, entry)
    codes = [module for module in layer.modules() if isinstance(module, QuantizedLinear)]
    assert len(codes) == (2 if kind in ("two-factor", "lead") else 1)
    assert not any(isinstance(module, nn.Linear) for module in layer.modules())
    draw = torch.Generator().manual_seed(0)
    for module in codes:
        module.codes.random_(0, 256, generator=draw)
        module.scales.data.uniform_(0.1, 1, generator=draw)
    if kind != "split":
        assert entry_of(layer) == entry
    again = build_layer(9, json.loads(json.dumps(entry)))
    again.load_state_dict(layer.state_dict())
    x = noise_of(2, 9).float()
    with torch.no_grad():
        assert torch.equal(again(x), layer(x))
    if kind == "two-factor":
        assert isinstance(layer, LowRankLinear)
        torch.testing.assert_close(layer(x), x @ layer.dense().T + layer.dense_bias())
        assert layer.linears() == {}


@pytest.mark.parametrize(
    "change", [{"bits": 9}, {"bits": 0}, {"group": 0}, {"group": None}, {"layer": 3}, {"lookup": "never"}]
)
def test_an_entry_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    entry = {"kind": "quantized", "bits": 4, "group": 8, "layer": {"kind": "dense", "out": 4, "bias": False}}
    with pytest.raises(ValueError, match=next(iter(change))):
        build_layer(8, entry | change)


def test_a_weight_is_looked_up_once_and_again_when_scales_change() -> None:
    layer = quantized(nn.Linear(8, 4), 4, 8).eval()
    assert isinstance(layer, QuantizedLinear)
    layer.scales.data.fill_(1.0)
    x = noise_of(2, 8).float()
    with torch.no_grad():
        first = layer(x)
        kept = layer._kept
        layer(x)
        assert layer._kept is kept
        layer.scales.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (first - layer.bias))
        layer.lookup = "always"
        layer.forget()
        layer(x)
        assert layer._kept is None


def test_gradients_reach_scales_and_inputs() -> None:
    layer = quantized_linear(
        linear := nn.Linear(12, 5), round_to_nearest(linear.weight.detach(), grid_spec(3, 4)), 4
    ).requires_grad_(True)
    x = noise_of(3, 12).float().requires_grad_(True)
    (found,) = torch.autograd.grad(layer(x).square().sum(), [layer.scales])
    with torch.no_grad():
        for at in ((0, 0), (4, 2)):
            step = torch.zeros_like(layer.scales)
            step[at] = 1e-3
            losses = []
            for sign in (1, -1):
                layer.scales.add_(sign * step)
                losses.append(float(layer(x).square().sum()))
                layer.scales.sub_(sign * step)
            assert float(found[at]) == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=1e-2, abs=1e-3)


# --- a product in few bits ----------------------------------------------------------------------------------------


def product_error(expand: Tensor, reduce: Tensor, pair: Any, moment: Tensor) -> float:
    """Share of the output's squared size that is lost, in float64."""
    wanted = expand.double() @ reduce.double()
    error = wanted - torch.cat([p.dense().double() for p in pair.expands]) @ pair.reduce.dense().double()
    return float(((error @ moment) * error).sum() / ((wanted @ moment) * wanted).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("seed", [0, 7])
def test_what_inputs_say_and_solving_again_both_help(bits: int, seed: int) -> None:
    moment = moment_of(48, seed + 20)
    weight = noise_of(40, 48, seed=seed)
    factors = low_rank(weight, InputMetric(moment), 20)
    expand, reduce = factors.expand_t.T, factors.reduce
    known, unknown = InputFeedback(moment, 0.01), InputFeedback(None, 0.01)
    plain = product_error(expand, reduce, round_pair([expand], reduce, unknown, bits, 16, correct=False), moment)
    aware = product_error(expand, reduce, round_pair([expand], reduce, known, bits, 16, correct=False), moment)
    solved = product_error(expand, reduce, round_pair([expand], reduce, known, bits, 16), moment)
    assert solved < aware < plain


@MODEST
@given(st.integers(0, 99), BITS)
def test_the_scales_of_components_do_not_matter(seed: int, bits: int) -> None:
    """Singular values are anywhere: powers of two in either factor give the very same codes."""
    expand, reduce = noise_of(10, 6, seed=seed), noise_of(6, 14, seed=seed + 1)
    powers = 2.0 ** torch.randint(-9, 9, (6,), generator=torch.Generator().manual_seed(seed)).double()
    inputs = InputFeedback(moment_of(14, seed), 0.01)
    one = round_pair([expand], reduce, inputs, bits, 8)
    other = round_pair([expand * powers], reduce / powers[:, None], inputs, bits, 8)
    assert torch.equal(one.reduce.codes, other.reduce.codes)
    torch.testing.assert_close(
        one.expands[0].dense().double() @ one.reduce.dense().double(),
        other.expands[0].dense().double() @ other.reduce.dense().double(),
    )


def test_several_output_factors_have_one_input_factor() -> None:
    expands = [noise_of(7, 5, seed=1), noise_of(9, 5, seed=2)]
    reduce, moment = noise_of(5, 12, seed=3), moment_of(12)
    pair = round_pair(expands, reduce, InputFeedback(moment, 0.01), 8, 8)
    assert [p.shape for p in pair.expands] == [(7, 5), (9, 5)]
    assert product_error(torch.cat(expands), reduce, pair, moment) < 1e-4


def test_components_without_weight_do_no_harm() -> None:
    expand, reduce = noise_of(6, 4), noise_of(4, 10, seed=1)
    expand[:, 2], reduce[3] = 0.0, 0.0
    pair = round_pair([expand], reduce, InputFeedback(torch.zeros(10, 10), 0.01), 4, 8)
    assert torch.isfinite(pair.expands[0].dense()).all()
    assert torch.isfinite(pair.reduce.dense()).all()


# --- costs, and what codes add ------------------------------------------------------------------------------------


@MODEST
@given(units(), BITS, st.integers(1, 20), st.data())
def test_a_cost_is_the_bits_of_the_layers(unit: Any, bits: int, group: int, data: st.DataObject) -> None:
    if unit.storage.fragile:
        return
    coded, site = CodedStorage(unit.storage, (bits, WHOLE), group, torch.bfloat16), unit.site
    top = coded.max_rank(site, 1)
    assert coded.parameters(site, None) == 16 * site.size
    dense = [quantized(nn.Linear(m.in_features, m.out_features), bits, group) for m in site.members]
    assert coded.at(bits).parameters(site, None) == sum(bits_in(layer) for layer in dense)
    if top:
        rank = data.draw(st.integers(1, top))
        assert coded.parameters(site, rank) == unit.storage.bits(site, rank, torch.bfloat16)
        layers = [quantized(layer, bits, group) for layer in unit.trained(rank)]
        assert coded.cheapest().parameters(site, rank) == sum(bits_in(layer) for layer in layers)


def bits_in(layer: nn.Module) -> int:
    return sum(8 * m.codes.nbytes + 16 * m.scales.numel() for m in layer.modules() if isinstance(m, QuantizedLinear))


def test_noise_is_read_off_the_quantizer() -> None:
    """With no more rows than are looked at it is what GPTQ loses, in the metric of both sides."""
    weight, moment, output = noise_of(14, 24), moment_of(24), moment_of(14, 5)
    factors = low_rank(weight, InputMetric(moment), 10)
    inputs = Feedback(moment)
    found = matrix_noise(weight, factors, inputs, output, (3, WHOLE), 8, 0.01)
    energy = float(torch.trace(output @ weight @ moment @ weight.T))
    assert found[3].energy == pytest.approx(energy)
    assert (found[WHOLE].dense, float(found[WHOLE].components.sum())) == (0.0, 0.0)
    lost = inputs.error(gptq(weight, inputs, grid_spec(3, 8)).dense().double() - weight)
    assert found[3].dense == pytest.approx(float(output.diagonal() @ lost) / energy)
    reduce = factors.reduce
    rows = inputs.error(gptq(reduce, inputs, grid_spec(3, 8)).dense().double() - reduce)
    sizes = ((reduce @ moment) * reduce).sum(1)
    # The output factor's share is the same for all components.
    rest = found[3].components - rows / sizes
    assert float(rest.std()) < 1e-9
    assert 0 < float(rest.mean()) < 0.3


def test_noise_falls_with_bits_as_levels_do() -> None:
    weight, moment = noise_of(40, 32), moment_of(32)
    factors = low_rank(weight, InputMetric(moment), 16)
    found = matrix_noise(weight, factors, Feedback(moment), None, (2, 4, 6), 16, 0.01)
    for less, more in itertools.pairwise((2, 4, 6)):
        for field in ("dense", "components"):
            few, many = (np.mean(np.array(getattr(found[bits], field))) for bits in (less, more))
            assert 6 < few / many < 40


# --- one price for ranks and bits ---------------------------------------------------------------------------------


def site_of(name: str, out: int, inside: int) -> Site:
    return Site(name, name, 0, "q", None, (0, out), out, inside, False)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(4, 10), st.integers(4, 10)), min_size=1, max_size=2),
    st.integers(0, 10**6),
    st.floats(0.15, 1.0),
    st.booleans(),
)
def test_ranks_and_bits_against_brute_force(shapes: list[Any], seed: int, keep: float, relative: bool) -> None:
    """Within the budget; and no other choice of no more bits, of all there are, has less error than one price finds."""
    draw = torch.Generator().manual_seed(seed)
    sites = [site_of(f"m{i}", *shape) for i, shape in enumerate(shapes)]
    spectra = {
        s.name: torch.rand(min(s.out_features, s.in_features), generator=draw).double().sort(descending=True)[0]
        for s in sites[:1]  # another one is not factored
    }
    choices = (2, 4, WHOLE)
    noise = {
        bits: {
            s.name: Noise(
                torch.rand(len(spectra.get(s.name, ())), generator=draw).double() / 4**bits * (bits != WHOLE),
                float(torch.rand(1, generator=draw)) / 4**bits * (bits != WHOLE),
                float(torch.rand(1, generator=draw)) + 0.1,
            )
            for s in sites
        }
        for bits in choices
    }
    storage = CodedStorage(STORAGES.get("two-factor"), choices, 4, torch.bfloat16)
    total = sum(storage.dense_cost(s) for s in sites)
    budget = Budget(sites, ratio_of(int(keep * total), total), storage)
    menus = [coded_menu(s, spectra.get(s.name), 1, storage, relative, noise) for s in sites]
    everything = [
        (sum(int(m.costs[i]) for m, i in zip(menus, at)), sum(float(m.errors[i]) for m, i in zip(menus, at)))
        for at in itertools.product(*(range(len(m.ranks)) for m in menus))
    ]
    affordable = [error for cost, error in everything if cost <= budget.limit]
    if not affordable:
        with pytest.raises(BudgetError, match="bits in the decoder linears"):
            coded_ranks(sites, spectra, budget, 1, relative, noise)
        return
    ranks, bits = coded_ranks(sites, spectra, budget, 1, relative, noise)
    cost = sum(storage.at(bits[s.name]).parameters(s, ranks[s.name]) for s in sites)
    assert cost <= budget.limit
    error = 0.0
    for s, menu in zip(sites, menus):
        places = list(zip(menu.ranks, menu.bits))
        error += float(menu.errors[places.index((ranks[s.name], bits[s.name]))])
    assert error >= min(affordable) - 1e-12
    # What one price misses is less than the step of one matrix between two neighbours of its frontier.
    assert error <= min(affordable) + max(largest_step(menu) for menu in menus)
    # Whatever is left buys nothing any more.
    for s, menu in zip(sites, menus):
        now = list(zip(menu.ranks, menu.bits)).index((ranks[s.name], bits[s.name]))
        extra = menu.costs - menu.costs[now]
        assert not ((extra > 0) & (extra <= budget.limit - cost) & (menu.errors <= menu.errors[now])).any()


def largest_step(menu: Any) -> float:
    """Of the entries that are best at some price, the largest difference in error of two that follow each other."""
    at = {menu.choose(price) for price in np.concatenate([[0.0], np.logspace(-12, 3, 4000)])}
    errors = sorted(float(menu.errors[i]) for i in at)
    return max((b - a for a, b in itertools.pairwise(errors)), default=0.0) + 1e-12


def test_an_entry_is_the_error_of_rank_and_codes() -> None:
    site, spectrum = site_of("a", 8, 8), torch.tensor([4.0, 2.0, 1.0, 0.5, 0, 0, 0, 0]).double()
    noise = {4: {"a": Noise(torch.full((3,), 0.1).double(), 0.2, 9.0)}}
    storage = CodedStorage(STORAGES.get("two-factor"), (4,), 4, torch.bfloat16)
    menu = coded_menu(site, spectrum, 1, storage, False, noise)
    assert menu.ranks == (1, 2, 3, None)
    np.testing.assert_allclose(menu.errors, [3.5 + 0.4, 1.5 + 0.6, 0.5 + 0.7, 0.2 * 7.5])
    np.testing.assert_allclose(coded_menu(site, None, 1, storage, False, noise).errors, [0.2 * 9.0])
    np.testing.assert_allclose(coded_menu(site, None, 1, storage, True, noise).errors, [0.2])


# --- recipes ------------------------------------------------------------------------------------------------------

DEFAULT: dict[str, Any] = {"preset": "default", "search": None}


def test_few_bits_mean_two_factors_unless_a_storage_is_named() -> None:
    assert tiny_recipe(**DEFAULT).storage == "pivoted"
    assert tiny_recipe(**DEFAULT, quantize="int4").storage == "two-factor"
    with pytest.raises(RecipeError, match=r"storage pivoted .* rounding of both adds up; leave it out"):
        tiny_recipe(**DEFAULT, quantize="int4", storage="pivoted")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"quantize": "auto"}, "--target-size"),
        ({"quantize": "auto", "keep": None, "target_size": "1MB", "search": "uniform"}, "chooses no bits"),
        ({"quantize": "auto", "keep": None, "target_size": "1MB", "storage": "shared"}, "shared storage"),
        ({"quantize": "int4", "tune": "factors"}, "--tune"),
        ({"quantize": "int9"}, "int2"),
        ({"options": {"quantization.group": 16}}, "quantization.format"),
        ({"quantize": "auto", "options": {"quantization.choices": [4, 12]}}, "not 12"),
        ({"quantize": "int4", "preset": "chop"}, "quantization"),
    ],
)
def test_what_does_not_go_with_bits_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(**(DEFAULT | words))


def test_a_recipe_without_bits_does_not_speak_of_them(tmp_path: Path) -> None:
    assert "quantization" not in tiny_recipe(**DEFAULT).to_yaml()
    recipe = tiny_recipe(**DEFAULT, quantize="int4", options={"quantization.group": 16})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


# --- runs ---------------------------------------------------------------------------------------------------------

SMALL = {"quantization.group": 16, "quantization.steps": 4}


def coded_run(family: str = "llama", quantize: str = "int4", **values: Any) -> Compressed:
    return compressed_once(family, **DEFAULT, quantize=quantize, options=SMALL, **values)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_model_in_few_bits_is_what_was_measured(family: str, tmp_path: Path) -> None:
    run = coded_run(family)
    model = load_model(str(run.path))
    structure = inspect_structure(run.original)
    codes = coded_layers(model)
    factored = [name for name, rank in run.info.ranks.items() if rank is not None]
    assert len(codes) == len(structure.sites) + len(factored)
    assert factored
    assert set(run.info.bits) == {site.name for site in structure.sites}
    assert set(run.info.bits.values()) == {4}
    # No matrix of the decoder is left in whole numbers, and all count as what they stand for.
    assert not [module for module in model.base_model.modules() if isinstance(module, nn.Linear | Conv1D)]
    assert run.info.parameters == parameters_in(model)
    assert run.info.bytes == weight_bytes(run.path) < 0.6 * run.info.bytes_dense
    tokens = token_blocks(2, 16, seed=3)
    with torch.no_grad():
        expected = model(tokens).logits
    if family != "phi3":  # it has no place for biases
        export_dense(str(run.path), tmp_path / "dense")
        with torch.no_grad():
            found = load_model(str(tmp_path / "dense"))(tokens).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_scales_are_stored_in_16_bits_whatever_the_model_is() -> None:
    from safetensors import safe_open

    run = coded_run()
    with safe_open(run.path / "model.safetensors", "pt") as file:
        dtypes = {name.rpartition(".")[2]: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes["scales"] == torch.bfloat16
    assert dtypes["codes"] == torch.uint8
    assert dtypes["weight"] == torch.float32


PLAIN = """
import sys, torch
sys.modules["bolaco"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = torch.arange(32).view(2, 16)
torch.save(model(tokens).logits.detach(), sys.argv[2])
"""


def test_the_folder_loads_where_bolaco_is_not_installed(tmp_path: Path) -> None:
    run = coded_run()
    with torch.no_grad():
        expected = load_model(str(run.path))(torch.arange(32).view(2, 16)).logits
    (code,) = run.path.glob("*.py")
    assert "class QuantizedLinear" in code.read_text()
    done = without_bolaco(PLAIN, tmp_path, run.path, tmp_path / "logits")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits", weights_only=True), expected)


@pytest.mark.parametrize("quantize", ["int4", "auto"])
def test_a_target_size_is_kept_to_with_bits(quantize: str) -> None:
    for target in (46_000, 60_000):
        run = compressed_once("llama", **DEFAULT, keep=None, target_size=target, quantize=quantize, options=SMALL)
        assert run.info.bytes <= target
        assert run.info.recipe["target_size"] == target
        if quantize == "auto":
            assert set(run.info.bits.values()) <= set(Quantization(format="auto").choices)


def test_too_small_is_refused_with_the_smallest_there_is(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="too small, the smallest possible is") as caught:
        compress_tiny(tiny_llama(), tmp_path / "out", **DEFAULT, keep=None, target_size=9000, quantize="auto")
    least = int(str(caught.value).partition("smallest possible is ")[2].split()[0])
    run = compress_tiny(
        tiny_llama(), tmp_path / "out", **DEFAULT, keep=None, target_size=least, quantize="auto",
        options={"quantization.steps": 0},
    )  # fmt: skip
    assert run.info.bytes <= least
    assert set(run.info.bits.values()) == {3}


def test_more_bits_lose_less_and_training_makes_up_for_some() -> None:
    """Of the first block's output, against the original's."""
    lost = {}
    for bits, steps in itertools.product((2, 4), (0, 40)):
        options = SMALL | {"quantization.steps": steps, "quantization.learning_rate": 3e-3}
        run = compressed_once("llama", **DEFAULT, keep=0.9, quantize=f"int{bits}", options=options)
        subject = Subject(run.original, inspect_structure(run.original))
        tokens = run.texts.calibration
        model = load_model(str(run.path))
        with torch.no_grad():
            wanted = subject.model(tokens, output_hidden_states=True).hidden_states[1]
            found = model(tokens, output_hidden_states=True).hidden_states[1]
        lost[bits, steps] = float(relative_error(found, wanted))
    assert lost[4, 0] < lost[2, 0]
    for bits in (2, 4):
        assert lost[bits, 40] < lost[bits, 0]


def test_training_changes_scales_and_vectors_and_no_code() -> None:
    linear = nn.Linear(16, 8)
    layer = quantized_linear(linear, round_to_nearest(linear.weight.detach(), grid_spec(4, 8)), 8)
    block = nn.ModuleDict({"it": layer, "norm": nn.LayerNorm(8)})
    codes, scales = layer.codes.clone(), layer.scales.clone()
    with scaled_codes(block) as parameters:
        assert {tuple(p.shape) for p in parameters} == {(8, 2), (8,)}
        with torch.no_grad():
            parameters[0].fill_(1.5)
    assert torch.equal(layer.scales, 1.5 * scales)
    layer.scales.data *= 1 + 1e-4
    settle(block)
    assert torch.equal(layer.scales, layer.scales.bfloat16().float())
    assert torch.equal(layer.codes, codes)
    assert set(block.state_dict()) == {"it.codes", "it.scales", "it.bias", "norm.weight", "norm.bias"}


def test_models_with_experts_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"experts cannot be quantized; leave out --quantize"):
        compress_tiny(of_type("mixtral"), tmp_path / "out", **DEFAULT, quantize="int4")


def test_a_dry_run_counts_the_bits(tmp_path: Path) -> None:
    from bolaco.recipe.recipe import make_recipe
    from bolaco.runs.dry_run import values

    folder = save_tiny(tmp_path / "model")
    said = {}
    for quantize in (None, "int4"):
        recipe = tiny_recipe(**DEFAULT, quantize=quantize, options=SMALL if quantize else {})
        said[quantize] = values(make_recipe(recipe.model_dump(mode="json") | {"model": str(folder)}))
    assert said["int4"]["bytes"] < 0.7 * said[None]["bytes"]


def test_what_is_quantized_is_not_tuned(tmp_path: Path) -> None:
    """Not by the mode for coded models either: its tables are other ones."""
    run = coded_run()
    for mode in ("factors", "sketch"):
        with pytest.raises(UnsupportedModelError, match="quantized, and no mode trains codes"):
            tune(str(run.path), mode, str(text_file()), tmp_path / "out", options={"data.seq_len": 16})


@pytest.mark.parametrize("steps", [0, 3])
def test_a_run_that_ends_between_two_quantized_blocks_goes_on(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bytes of a run that nothing disturbed; the first block is not quantized again."""
    values = DEFAULT | {"quantize": "int3", "options": SMALL | {"quantization.steps": steps, "refinement.steps": 0}}
    whole = compress_tiny(tiny_llama(), tmp_path / "whole", **values)
    run, rounded = BlockRounding.run, []

    def ending(self: BlockRounding, layer: int, *args: Any) -> None:
        rounded.append(layer)
        if rounded == [0, 1]:
            raise KeyboardInterrupt
        run(self, layer, *args)

    monkeypatch.setattr(BlockRounding, "run", ending)
    with pytest.raises(KeyboardInterrupt):
        compress_tiny(tiny_llama(), tmp_path / "out", **values)
    again = compress_tiny(tiny_llama(), tmp_path / "out", **values)
    assert rounded == [0, 1, 1]
    for file in ("model.safetensors", "config.json"):
        assert (again.path / file).read_bytes() == (whole.path / file).read_bytes()
