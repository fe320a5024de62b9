"""Gradual first-order pruning and the SVD of sparse weights by their importance (arXiv 2306.14152)."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bolaco.errors import NonFiniteError, RecipeError
from bolaco.evaluation.losses import summed_losses
from bolaco.evaluation.objective import SLAB
from bolaco.factorize import (
    INPUT_IMPORTANCE,
    METHODS,
    OUTPUT_IMPORTANCE,
    ChosenMethod,
    InputMetric,
    SiteStatistics,
    low_rank,
)
from bolaco.factorize.methods.fwsvd import importance
from bolaco.factorize.store import FactorStore
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model
from bolaco.models.subject import Subject
from bolaco.recipe.recipe import make_recipe
from bolaco.transform.prune import (
    SPARSE_FILE,
    PruningOptions,
    _Matrix,
    kept_elements,
    prune,
    sparsity_at,
    with_weights,
)
from bolaco.tune.loss import Student
from tests.models import FAMILIES, compress_tiny, compressed_once, slow, tiny_llama, token_blocks

SHORT = PruningOptions(steps=6, batch=2, learning_rate=1e-3)


def test_the_schedule_is_cubic() -> None:
    assert [sparsity_at(t, 0.8) for t in (0.0, 0.5, 1.0, 3.0)] == pytest.approx([0.0, 0.8 * 0.875, 0.8, 0.8])
    steps = [sparsity_at(i / 50, 0.6) for i in range(51)]
    assert steps == sorted(steps)
    first, last = steps[1] - steps[0], steps[50] - steps[49]
    assert first > 100 * last  # most of it early, when the network can still recover


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 0.999), st.integers(0, 99), st.booleans())
def test_masks_have_the_exact_sparsity(out: int, inside: int, sparsity: float, seed: int, ties: bool) -> None:
    scores = torch.randn(out, inside, generator=torch.Generator().manual_seed(seed))
    scores = scores.round() if ties else scores
    mask = kept_elements(scores, sparsity)
    assert int((~mask).sum()) == math.floor(sparsity * scores.numel() + 1e-9)
    if 0 < int(mask.sum()) < mask.numel():
        assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_pruning(family: str) -> None:
    """The sparsity that was asked for, in every matrix, and a lower loss than without the training."""
    model = FAMILIES[family]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    structure, tokens = inspect_structure(model), token_blocks(6, 24)
    found = prune(model, structure, tokens, 0.5, SHORT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for site in structure.sites:
        pruned = found[site.name]
        assert int((pruned.weight == 0).sum()) == site.size // 2
        assert (pruned.outputs.shape, pruned.inputs.shape) == ((site.out_features,), (site.in_features,))
        assert float(pruned.outputs.sum()) == pytest.approx(float(pruned.inputs.sum()), rel=1e-4)
    sparse = with_weights(model, structure, {name: item.weight for name, item in found.items()})
    zeros = Subject(sparse, structure)
    assert all(torch.equal(zeros.weight(s), found[s.name].weight) for s in structure.sites)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    dense = Subject(model, structure)
    untrained = {s.name: dense.weight(s) * (found[s.name].weight != 0) for s in structure.sites}
    with torch.no_grad():
        losses = [
            float(m(input_ids=tokens, labels=tokens, use_cache=False).loss)
            for m in (sparse, with_weights(model, structure, untrained))
        ]
    assert losses[0] < losses[1]
    again = prune(model, structure, tokens, 0.5, SHORT)
    assert all(torch.equal(again[name].weight, found[name].weight) for name in found)


@pytest.mark.parametrize("score", ["sensitivity", "movement"])
def test_scores_of_one_step(score: str) -> None:
    """After one step, the elements that stay are those of the largest |dL/dW W| or -(dL/dW) W."""
    model = tiny_llama()
    structure, tokens = inspect_structure(model), token_blocks(2, 16)
    short = PruningOptions(steps=1, batch=2, learning_rate=1e-9, score=score)
    found = prune(model, structure, tokens, 0.3, short)
    model.requires_grad_(True)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    norm = torch.cat([model.base_model.get_submodule(s.module).weight.grad.flatten() for s in structure.sites]).norm()
    for site in structure.sites:
        weight = model.base_model.get_submodule(site.module).weight
        gain = (weight.grad * weight).detach()
        assert torch.equal(
            found[site.name].weight != 0, kept_elements(gain.abs() if score == "sensitivity" else -gain, 0.3)
        )
        torch.testing.assert_close(
            found[site.name].inputs, gain.abs().sum(dim=0) / max(float(norm), 1.0), rtol=1e-3, atol=1e-9
        )


def test_masked_elements_come_back() -> None:
    """Scores go on while an element is masked, and it returns with the value it had."""
    site = inspect_structure(tiny_llama()).sites[0]
    parameter = nn.Parameter(torch.ones(32, 32))
    matrix = _Matrix(site, parameter, transposed=False)
    low = torch.ones(32, 32)
    low[0] = 5.0  # moving these towards zero would help: the lowest scores
    parameter.grad = low.clone()
    matrix.observe("movement")
    matrix.update(1 / 32)
    assert not parameter.data[0].any()
    parameter.grad = torch.ones(32, 32)
    parameter.grad[0] = -20.0
    matrix.observe("movement")
    assert not parameter.grad[0].any()
    matrix.update(1 / 32)
    assert parameter.data[0].eq(1).all()
    assert int((parameter.data == 0).sum()) == 32


def test_a_loss_that_is_not_finite() -> None:
    model = tiny_llama()
    model.model.norm.weight.data[0] = math.inf
    with pytest.raises(NonFiniteError, match="step 0"):
        prune(model, inspect_structure(model), token_blocks(2, 8), 0.5, SHORT)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_less_weighted_error_than_plain_svd_of_the_same_weights(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    weight = torch.randn(20, 14, generator=generator, dtype=torch.float64)
    weight *= torch.rand(20, 14, generator=generator) > 0.6
    outputs, inputs = torch.rand(20, generator=generator) ** 4, torch.rand(14, generator=generator) ** 4
    chosen = ChosenMethod(METHODS.get("lpaf"), PruningOptions())
    own = SiteStatistics({OUTPUT_IMPORTANCE: outputs, INPUT_IMPORTANCE: inputs})
    factors = chosen.prepare(weight, chosen.metric(SiteStatistics({})), own, rank)
    metric = importance(outputs)[:, None] * importance(inputs)

    def error(product: torch.Tensor) -> float:
        return float(((weight - product).square() * metric).sum())

    plain = low_rank(weight, InputMetric(None), rank)
    assert error(factors.product(rank)) <= error(plain.product(rank))
    exact = torch.linalg.svdvals(weight * metric.sqrt())[rank:].square().sum()
    assert error(factors.product(rank)) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("family", [slow("llama"), "phi3", "gpt2"])
def test_a_run(family: str) -> None:
    """Factors are those of the sparse weights; the sparse matrices lie beside the checkpoint."""
    options = {"method.steps": 6, "method.keep_sparse": True, "method.sparsity": 0.25}
    run = compressed_once(family, preset="lpaf", search=None, options=options)
    assert (run.info.method, run.info.storage) == ("lpaf", "two-factor")
    assert 0.6 < run.info.keep_linears <= 0.7
    sparse = load_file(run.path / SPARSE_FILE)
    structure = inspect_structure(run.original)
    assert set(sparse) == {site.name for site in structure.sites} == set(run.info.ranks)
    assert run.info.bytes == (run.path / "model.safetensors").stat().st_size
    factors, original = FactorStore(run.stage("factors")).load(0), Subject(run.original, structure)
    for site in structure.of_layer(0):
        assert int((sparse[site.name] == 0).sum()) == site.size // 4
        full = factors[site.name]
        exact = torch.linalg.matrix_norm(sparse[site.name] - full.product(full.max_rank))
        other = torch.linalg.matrix_norm(original.weight(site) - full.product(full.max_rank))
        assert exact < other
    model = load_model(str(run.path))
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=token_blocks(1, 16)).logits).all()


def test_the_same_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the pruning, a run goes on from its weights."""
    values = {"preset": "lpaf", "search": None, "options": {"method.steps": 4}}
    whole = compress_tiny(tiny_llama(), tmp_path / "whole", **values)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bolaco.runs.factors.factorize", killed)
        with pytest.raises(KeyboardInterrupt):
            compress_tiny(tiny_llama(), tmp_path / "again", **values)
    monkeypatch.setattr("bolaco.transform.prune.prune", killed)
    compress_tiny(tiny_llama(), tmp_path / "again", **values)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert files[0] == files[1]
    assert whole.info.perplexity.dense != whole.info.perplexity.compressed


def test_stacks_and_closed_form_ranks_of_pruned_weights() -> None:
    options = {"method.steps": 3, "search.dense_types": []}
    run = compressed_once("llama", preset="lpaf", search="spectral", storage="shared", options=options)
    assert 0.6 < run.info.keep_linears <= 0.7


def test_options_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"method\.keep_sparse: method 'afm' has no such option"):
        compress_tiny(tiny_llama(), tmp_path / "out", options={"method.keep_sparse": True})
    values = {"model": "m", "keep": 0.5, "method": "lpaf"}
    with pytest.raises(RecipeError, match=r"search\.name 5x1 contradicts method lpaf"):
        make_recipe(values | {"search": "5x1"})
    for method in ({"sparsity": 1.0}, {"sparsity": 0}, {"steps": 0}, {"score": "guess"}, {"keep_sparse": 3}):
        with pytest.raises(RecipeError, match=rf"^method\.{next(iter(method))}: "):
            make_recipe(values | {"method": {"name": "lpaf"} | method})


# --- memory -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made while this lasts."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor):
                self.bytes = max(self.bytes, one.nbytes)
        return made


def test_no_step_holds_the_logits_of_a_large_vocabulary() -> None:
    """Neither the first stage nor the third, whose loss can have a teacher: a slab of them at a time."""
    sizes = {"vocab_size": 262_144, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = tiny_llama(**sizes, num_attention_heads=1, num_key_value_heads=1)
    tokens = token_blocks(1, 40)
    logits = tokens.numel() * 262_144 * 4
    with Largest() as first:
        prune(model, inspect_structure(model), tokens, 0.5, PruningOptions(steps=1, batch=1))
    student, teacher = Student(copy.deepcopy(model).requires_grad_(True), 0.5, model), model.get_output_embeddings()
    with Largest() as third:
        student(input_ids=tokens, labels=tokens)["loss"].backward()
    assert teacher.weight.nbytes < first.bytes <= SLAB < logits
    assert third.bytes <= SLAB


def test_the_loss_of_pruning_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    tokens = token_blocks(2, 24)
    losses = []
    monkeypatch.setattr(
        "bolaco.transform.prune.summed_losses", lambda *args: losses.append(summed_losses(*args)[0]) or (losses[-1],)
    )
    prune(model, inspect_structure(model), tokens, 0.5, PruningOptions(steps=1, batch=2))
    expected = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    torch.testing.assert_close(losses[0] / (2 * 23), expected)
