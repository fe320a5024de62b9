"""Error-aware fitting and block refinement."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bolaco.errors import ResumeError
from bolaco.factorize import METHODS, ChosenMethod, SiteStatistics
from bolaco.factorize.solver import InputMetric, corrected, low_rank
from bolaco.factorize.store import FactorStore
from bolaco.layers import LowRankLinear
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model
from bolaco.models.subject import Subject
from bolaco.models.walk import BlockRunner
from bolaco.progress import Reporter
from bolaco.refine.fit import BlockFit
from bolaco.refine.loss import OutputLoss
from bolaco.refine.run import Refiner
from bolaco.refine.settings import Refinement
from bolaco.refine.train import BlockTrainer, Stretch, balance, fast_bfloat16
from bolaco.statistics.drift import DriftMoments
from bolaco.statistics.moments import PooledMoments
from bolaco.statistics.stored import site_statistics
from bolaco.storage.block import compressed_block, restored_block, trainable_copy
from bolaco.work.blockstore import BlockStore
from tests.models import FAMILIES, Compressed, compress_tiny, compressed, slow, tiny_llama, token_blocks


def _pairs(count: int, dim: int, seed: int, drift: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    x = torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + 3
    return x, x + drift * torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix.T - drift


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 4])
def test_drift_is_the_pooled_cross_covariance(groups: int) -> None:
    x, other = _pairs(400, 7, groups)
    moments, plain = DriftMoments(7, groups), PooledMoments(7, groups)
    scatter, freedom = torch.zeros(7, 7, dtype=torch.float64), 0
    for group, (a, b) in enumerate(zip(x.chunk(groups), other.chunk(groups), strict=True)):
        for rows in (slice(0, 30), slice(30, None)):
            moments.update(a[rows], b[rows], group)
            plain.update(b[rows], group)
        delta = a - b
        scatter += (delta - delta.mean(0)).T @ (b - b.mean(0))
        freedom += len(a) - 1
    drift = moments.finalize()
    torch.testing.assert_close(drift.covariance, scatter / freedom)
    torch.testing.assert_close(drift.mean, (x - other).mean(0))
    torch.testing.assert_close(drift.second_moment, (x - other).T @ other / len(x))
    torch.testing.assert_close(drift.inputs.covariance, plain.finalize().covariance)


def test_no_drift_where_inputs_agree() -> None:
    x, _ = _pairs(100, 5, 0)
    moments = DriftMoments(5, 2)
    moments.update(x[:50].float(), x[:50].float(), 0)
    moments.update(x[50:].float(), x[50:].float(), 1)
    drift = moments.finalize()
    assert not drift.covariance.any()
    assert not drift.mean.any()
    assert not drift.second_moment.any()


# --- the least-squares target -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(out=st.integers(1, 9), inside=st.integers(1, 9), seed=st.integers(0, 999))
def test_corrected_weight_is_least_squares(out: int, inside: int, seed: int) -> None:
    x, other = _pairs(60, inside, seed)
    weight = torch.randn(out, inside, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = corrected(weight, (x - other).T @ other / 60, other.T @ other / 60)
    expected = torch.linalg.lstsq(other, x @ weight.T).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_corrected_weight_is_the_weight_where_inputs_agree(damping: float) -> None:
    x, _ = _pairs(60, 6, 1)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(corrected(weight, torch.zeros(6, 6), x.T @ x, damping), weight)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), rank=st.integers(1, 4))
def test_no_other_matrix_of_the_rank_is_nearer_to_the_original_outputs(seed: int, rank: int) -> None:
    """Among rank-r matrices on the compressed inputs, nothing tried is nearer to the original outputs."""
    x, other = _pairs(80, 6, seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    second = other.T @ other / 80
    factors = low_rank(corrected(weight, (x - other).T @ other / 80, second), InputMetric(second), rank)

    def error(matrix: Tensor) -> float:
        return float((x @ weight.T - other @ matrix.T).square().sum())

    best = error(factors.product(rank))
    plain = low_rank(weight, InputMetric(x.T @ x / 80), rank).product(rank)
    assert best <= error(plain) * (1 + 1e-9)
    for size in (1e-3, 1e-1):
        left, right = factors.expand_t[:rank].T, factors.reduce[:rank]
        left = left + size * torch.randn(left.shape, generator=generator, dtype=torch.float64)
        right = right + size * torch.randn(right.shape, generator=generator, dtype=torch.float64)
        assert best <= error(left @ right) * (1 + 1e-9)


# --- a block ----------------------------------------------------------------------------------------------------------


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_blocks(2, 24, seed=8), use_cache=False).logits


def _parts(family: str, method: str = "afm"):
    run = compressed(family, method=method)
    subject = Subject(run.original, inspect_structure(run.original))
    return run, subject, FactorStore(run.stage("factors"))


def nothing_stored(subject: Subject, layer: int) -> dict[str, SiteStatistics]:
    """For methods whose statistics are those of inputs."""
    return site_statistics(layer, subject.structure.of_layer(layer), (), subject.model.device)


def chosen(method: str) -> ChosenMethod:
    return ChosenMethod(METHODS.get(method), METHODS.get(method).options())


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *((family, "afm") for family in ("llama", "phi3", "gpt2", "opt")),
        ("phi3", "svd-llm"),
        *(slow(family, "svd-llm") for family in ("llama", "gpt2", "opt")),
    ],
)
def test_fit_on_the_original_inputs_is_the_plain_solution(family: str, method: str) -> None:
    """The first block's inputs are the same in both models: its q, k, v come out as they were, and the others move
    only as far as those changed."""
    run, subject, store = _parts(family, method)
    ranks = run.info.ranks
    tokens = token_blocks(8, 32, seed=3)
    structure = subject.structure
    runner = BlockRunner(run.original, structure, tokens, 4)
    hidden = runner.embed()
    plain = compressed_block(subject, 0, store.load(0), ranks)
    # With every rank gone, the compressed block is the original one, and nothing has drifted anywhere.
    everything_dense = dict.fromkeys(ranks)
    block = trainable_copy(subject, 0, copy.deepcopy(structure.block_modules(run.original)[0]))
    fit = BlockFit(runner, subject, chosen(method), everything_dense, 4, 1.0, 0.0)
    fit.run(0, block, hidden, hidden.clone(), nothing_stored(subject, 0))
    with torch.no_grad():
        same = runner.run(0, hidden[:4], block)
        original = runner.run(0, hidden[:4])
        changed = runner.run(0, hidden[:4], plain)
    torch.testing.assert_close(same, original, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, original, atol=1e-3)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_fit_brings_the_decoder_nearer_to_the_original(family: str) -> None:
    """On the calibration text itself, the error-aware block outputs err less than the plain ones."""
    run, subject, store = _parts(family)
    structure, ranks, method = subject.structure, run.info.ranks, chosen("afm")
    tokens = token_blocks(12, 48, seed=4)
    runner = BlockRunner(run.original, structure, tokens, 4)
    original = runner.embed()
    paths = {"plain": original.clone(), "fitted": original.clone()}
    for layer in range(structure.num_layers):
        plain = compressed_block(subject, layer, store.load(layer), ranks)
        fitted = trainable_copy(subject, layer, plain)
        fit = BlockFit(runner, subject, method, ranks, 1, 1.0, 1e-4)
        fit.run(layer, fitted, original, paths["fitted"], nothing_stored(subject, layer))
        blocks = {"plain": plain, "fitted": fitted}
        with torch.no_grad():
            for rows in runner.slices:
                original[rows] = runner.run(layer, original[rows])
                for name, hidden in paths.items():
                    hidden[rows] = runner.run(layer, hidden[rows], blocks[name])
    errors = {name: float((hidden - original).square().mean()) for name, hidden in paths.items()}
    assert errors["fitted"] < errors["plain"]


def test_compressed_block_shares_what_stays() -> None:
    run, subject, store = _parts("llama")
    block = compressed_block(subject, 0, store.load(0), run.info.ranks)
    original = subject.structure.block_modules(run.original)[0]
    assert block.self_attn.v_proj.weight is original.self_attn.v_proj.weight
    assert block.input_layernorm.weight is original.input_layernorm.weight
    assert isinstance(block.self_attn.q_proj, LowRankLinear)
    copied = trainable_copy(subject, 0, block)
    assert copied.input_layernorm.weight is not original.input_layernorm.weight


@pytest.mark.parametrize("family", ["llama_biased", "phi3", "gpt2"])
def test_a_block_is_restored_from_its_state(family: str) -> None:
    run, subject, store = _parts(family)
    block = compressed_block(subject, 1, store.load(1), run.info.ranks)
    block = trainable_copy(subject, 1, block)
    state = {name: value.clone() for name, value in block.state_dict().items()}
    again = restored_block(subject, 1, state).state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


# --- training ---------------------------------------------------------------------------------------------------------


def test_balance_changes_no_product() -> None:
    run, subject, store = _parts("llama", "afm")
    block = trainable_copy(subject, 0, compressed_block(subject, 0, store.load(0), run.info.ranks))
    layer = block.mlp.down_proj
    layer.expand.weight.data *= 1e4
    layer.reduce.weight.data /= 1e4
    before = layer.dense().clone()
    balance(block)
    torch.testing.assert_close(layer.dense(), before)
    torch.testing.assert_close(layer.expand.weight.norm(dim=0), layer.reduce.weight.norm(dim=1))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "opt"])
def test_training_brings_a_block_nearer_and_leaves_the_model_alone(family: str) -> None:
    run, subject, store = _parts(family)
    before = {name: value.clone() for name, value in run.original.state_dict().items()}
    runner = BlockRunner(run.original, subject.structure, token_blocks(8, 32, seed=5), 4)
    hidden = runner.embed()
    with torch.no_grad():
        target = torch.cat([runner.run(0, hidden[rows]) for rows in runner.slices])
    block = compressed_block(subject, 0, store.load(0), run.info.ranks)
    block = trainable_copy(subject, 0, block)
    trainer = BlockTrainer(runner, Refinement(learning_rate=3e-3, autocast=False, held_out=0), seed=0)
    losses = trainer.train(Stretch(0, [block], hidden, target), OutputLoss(), 40).losses
    assert len(losses) == 40
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert all(torch.equal(value, before[name]) for name, value in run.original.state_dict().items())
    assert not any(p.requires_grad for p in block.parameters())
    ranks = run.info.ranks
    assert all(
        layer.rank == len(layer.reduce.weight) == layer.expand.weight.shape[1]
        for layer in block.modules()
        if isinstance(layer, LowRankLinear)
    )
    assert any(ranks.values())


# --- the whole --------------------------------------------------------------------------------------------------------

OPTIONS = {"refinement.fit": True, "refinement.steps": 4, "calibration.gradient_sequences": 4}


REFINED = ("llama", "qwen2", "gemma3_text", "phi3", "gpt2", "opt_post_norm")


@pytest.mark.parametrize(
    ("family", "storage"),
    [
        *((family, "pivoted") for family in ("gemma3_text", "gpt2", "opt_post_norm")),
        ("phi3", "two-factor"),
        *(slow(family, "pivoted") for family in ("llama", "qwen2", "phi3")),
        *(slow(family, "two-factor") for family in REFINED if family != "phi3"),
    ],
)
def test_checkpoint_is_the_refined_model(family, storage, tmp_path):
    """What is loaded computes what the refined blocks compute in place of the original's."""
    run = compress_tiny(
        FAMILIES[family](),
        tmp_path / "out",
        preset="default",
        keep=0.7,
        search="spectral",
        storage=storage,
        options=OPTIONS,
    )
    subject = Subject(run.original, inspect_structure(run.original))
    built = copy.deepcopy(run.original)
    stack = built.base_model.get_submodule(subject.structure.stack)
    store = BlockStore(run.stage("refined"))
    for layer in range(subject.structure.num_layers):
        stack[layer] = restored_block(subject, layer, store.read(layer))
    torch.testing.assert_close(logits(load_model(str(run.path))), logits(built), rtol=1e-3, atol=1e-3)
    assert run.info.keep_linears <= 0.7
    card = (run.path / "README.md").read_text(encoding="utf-8")
    assert "compressed model and trained for 4 steps towards the original block's output" in card
    assert (set(run.info.pivot_growth) != set()) == (storage == "pivoted")


def _refiner(run: Compressed, subject: Subject, store: FactorStore) -> Refiner:
    tokens, settings = token_blocks(6, 32, seed=6), Refinement(fit=True, steps=3, held_out=0, logit_steps=0)
    return Refiner(subject, store, run.info.ranks, tokens, run.recipe.chosen, settings, run.recipe.calibration)


def test_goes_on_after_any_block(tmp_path) -> None:
    run, subject, factors = _parts("llama")
    whole, parts = BlockStore(tmp_path / "whole"), BlockStore(tmp_path / "parts")
    _refiner(run, subject, factors).run(whole, Reporter(quiet=True))
    parts.write(0, whole.read(0))
    _refiner(run, subject, factors).run(parts, Reporter(quiet=True))
    first, second = whole.read(1), parts.read(1)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stored_block_of_another_model_is_named(tmp_path) -> None:
    run, subject, factors = _parts("llama")
    store = BlockStore(tmp_path)
    store.write(0, {"nothing": torch.ones(1)})
    with pytest.raises(ResumeError, match=r"block-00000\.safetensors"):
        _refiner(run, subject, factors).run(store, Reporter(quiet=True))


def test_half_precision_models_are_refined(tmp_path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    run = compress_tiny(model, tmp_path / "out", preset="default", search="spectral", options=OPTIONS)
    assert load_model(str(run.path)).dtype == torch.bfloat16
    assert run.info.perplexity.compressed < 2 * run.info.perplexity.dense


def test_bfloat16_only_where_it_is_no_slower(monkeypatch):
    cpu = torch.device("cpu")
    for found, expected in (({"avx2": True, "avx512_bf16": False}, False), ({"amx_bf16": True}, True), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert fast_bfloat16(cpu) is expected
        assert fast_bfloat16(torch.device("cuda"))
