"""Training of blocks: what is minimised, what is held out, windows, the end on logits, and going on after a kill."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from bolaco.errors import RecipeError
from bolaco.evaluation.objective import Head, final_hidden
from bolaco.factorize.store import FactorStore
from bolaco.models.find import inspect_structure
from bolaco.models.subject import Subject
from bolaco.models.walk import BlockRunner
from bolaco.progress import Reporter
from bolaco.refine import train
from bolaco.refine.ending import Ending
from bolaco.refine.loss import OutputLoss, curved_error, relative_error
from bolaco.refine.run import Refiner, stored_block
from bolaco.refine.scales import scaled
from bolaco.refine.settings import Refinement
from bolaco.refine.train import BlockTrainer, Stretch, look_steps
from bolaco.storage.block import compressed_block, trainable_copy
from bolaco.work.blockstore import BlockStore
from tests.models import FAMILIES, compress_tiny, compressed, tiny_deep, tiny_recipe, token_blocks

ROWS = torch.arange(1)


# --- what is minimised --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(dim=st.integers(1, 8), seed=st.integers(0, 999))
def test_errors_against_their_definition(dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    output, target, root = (torch.randn(shape, generator=generator) for shape in ((2, 3, dim), (2, 3, dim), (dim, dim)))
    e, t, r = (output - target).double().flatten(0, 1), target.double().flatten(0, 1), (root @ root.T).double()
    expected = sum(float(a @ a) / float(b @ b) for a, b in zip(e, t, strict=True)) / len(e)
    assert float(relative_error(output, target)) == pytest.approx(expected, rel=1e-4)
    expected = sum(float(a @ r @ a) for a in e) / len(e) / 2
    assert float(curved_error(output, target, r.float())) == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_both_errors_count_by_how_much_of_them_is_left(share: float) -> None:
    output, target = torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    loss = OutputLoss(1e-9 * torch.eye(3), share)
    loss.begin(output, target)
    assert float(loss(output, target, ROWS)) == pytest.approx(1.0, rel=1e-5)
    # Halving the error quarters both.
    assert float(loss((output + target) / 2, target, ROWS)) == pytest.approx(0.25, rel=1e-4)


def test_without_curvature_it_is_the_relative_error() -> None:
    output, target = torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    for loss in (OutputLoss(), OutputLoss(torch.eye(3), 0.0), OutputLoss(None, 0.5)):
        loss.begin(output, target)
        assert torch.equal(loss(output, target, ROWS), relative_error(output, target))


def test_nats_where_the_loss_is_quadratic() -> None:
    """To second order, e^T F e / 2 is the KL divergence of a softmax whose logits are off by e."""
    logits = torch.randn(5, dtype=torch.float64)
    p = logits.softmax(0)
    fisher = torch.diag(p) - torch.outer(p, p)
    e = 1e-3 * torch.randn(5, dtype=torch.float64)
    exact = float((p * (logits.log_softmax(0) - (logits + e).log_softmax(0))).sum())
    found = float(curved_error((logits + e).float()[None] * 1e0, logits.float()[None], fisher.float()))
    assert found == pytest.approx(exact, rel=2e-2)


# --- one block ----------------------------------------------------------------------------------------------------


def parts(family: str = "llama", sequences: int = 12):
    run = compressed(family)
    subject = Subject(run.original, inspect_structure(run.original))
    store = FactorStore(run.stage("factors"))
    runner = BlockRunner(run.original, subject.structure, token_blocks(sequences, 24, seed=5), 4)
    hidden = runner.embed()
    with torch.no_grad():
        target = torch.cat([runner.run(0, hidden[rows]) for rows in runner.slices])
    block = trainable_copy(subject, 0, compressed_block(subject, 0, store.load(0), run.info.ranks))
    return runner, Stretch(0, [block], hidden, target)


def state_of(stretch: Stretch) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in stretch.blocks[0].state_dict().items()}


@pytest.mark.parametrize(("steps", "looks"), [(1, 1), (4, 1), (9, 1), (10, 2), (20, 4), (49, 9), (60, 10), (400, 10)])
def test_looks_are_as_many_as_steps_allow_and_the_last_step_is_one(steps: int, looks: int) -> None:
    found = sorted(look_steps(steps))
    assert len(found) == looks
    assert found[-1] == steps
    assert min(b - a for a, b in pairwise([0, *found])) >= min(5, steps)


def test_what_only_gets_worse_stays_as_it_was() -> None:
    runner, stretch = parts()
    before = state_of(stretch)
    options = Refinement(held_out=4, learning_rate=10.0, autocast=False, patience=2)
    found = BlockTrainer(runner, options, seed=0).train(stretch, OutputLoss(), 40)
    assert len(found.losses) == 10  # two looks of eight
    assert min(found.held_out) == found.held_out[0]
    after = state_of(stretch)
    assert all(torch.equal(runner_value, after[name]) for name, runner_value in _balanced(stretch, before).items())


def _balanced(stretch: Stretch, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stretch.blocks[0].load_state_dict(state)
    train.balance(stretch.blocks[0])
    return state_of(stretch)


def test_a_block_is_as_it_was_at_its_best_look() -> None:
    runner, stretch = parts()
    options = Refinement(held_out=4, learning_rate=3e-3, autocast=False)
    found = BlockTrainer(runner, options, seed=0).train(stretch, OutputLoss(), 40)
    rows = torch.arange(8, 12)
    with torch.no_grad():
        now = float(relative_error(stretch.run(runner, rows), stretch.targets[rows]))
    assert now == pytest.approx(min(found.held_out), rel=1e-4)
    assert min(found.held_out) < 0.95 * found.held_out[0]


def test_held_out_sequences_are_not_trained_on() -> None:
    runner, stretch = parts()
    seen: set[int] = set()

    def loss(output: torch.Tensor, target: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if output.requires_grad:
            seen.update(rows.tolist())
        return relative_error(output, target)

    BlockTrainer(runner, Refinement(held_out=4, autocast=False), seed=0).train(stretch, loss, 10)
    assert seen == set(range(8))


class Killed(Exception):
    """What a test stops a training by."""


@pytest.mark.parametrize("values", [{}, {"held_out": 4, "curvature": 0.5}])
def test_goes_on_inside_a_block_to_the_same_bytes(values, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train, "_WRITTEN_EVERY", -1.0)
    monkeypatch.setattr(train, "_WRITTEN_SHARE", -1.0)
    options = Refinement(learning_rate=3e-3, autocast=False, **values)
    curvature = torch.eye(parts()[1].inputs.shape[-1])

    def trained(place, stop: int | None = None):
        runner, stretch = parts()
        done = 0

        def tick(steps: int) -> None:
            nonlocal done
            done += steps
            if done == stop:
                raise Killed

        store = BlockStore(tmp_path / place)
        trainer = BlockTrainer(runner, options, seed=3, partial=store)
        found = trainer.train(stretch, OutputLoss(curvature, options.curvature), 20, tick)
        return state_of(stretch), found

    whole, expected = trained("whole")
    for stop in (1, 7, 13):
        with pytest.raises(Killed):
            trained(f"at {stop}", stop)
        again, found = trained(f"at {stop}")
        assert found == expected
        assert all(torch.equal(again[name], value) for name, value in whole.items())


# --- the end of the model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_divergence_and_its_gradient_are_those_of_whole_logits(family: str) -> None:
    model = FAMILIES[family]()
    tokens = token_blocks(2, 9, seed=1)
    runner = BlockRunner(model, inspect_structure(model), tokens, 2)
    hidden = runner.embed()
    with torch.no_grad():
        for layer in range(len(runner.blocks)):
            hidden = runner.run(layer, hidden)
    end = Ending(runner, chunk=5)
    assert end.right()
    torch.testing.assert_close(end.final(hidden, tokens), final_hidden(model, tokens), rtol=1e-4, atol=1e-5)
    # Far enough for the divergence to be well above the rounding of log-probabilities in float32.
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    moved = (hidden + hidden.std() * noise).requires_grad_()
    found = end.divergence(moved, hidden, tokens)
    found.backward()
    gradient, moved.grad = moved.grad, None
    head = Head(model)
    p, q = (head(end.final(states, tokens).flatten(0, 1)).double().log_softmax(-1) for states in (hidden, moved))
    expected = F.kl_div(q, p.detach(), log_target=True, reduction="sum") / tokens.numel()
    expected.backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, moved.grad, rtol=1e-3, atol=1e-6)
    # The model is as it was.
    assert not any("forward" in block.__dict__ for block in runner.blocks)


# --- scales -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_scales_are_of_all_matrices_and_are_folded(family: str) -> None:
    run = compressed(family)
    subject = Subject(run.original, inspect_structure(run.original))
    store, blocks = FactorStore(run.stage("factors")), []
    for layer in range(subject.structure.num_layers):
        block = compressed_block(subject, layer, store.load(layer), run.info.ranks)
        blocks.append(trainable_copy(subject, layer, block))
    names = [{n for n, _ in block.named_parameters()} for block in blocks]
    matrices = {n: p.clone() for n, p in blocks[0].named_parameters() if p.ndim == 2}
    count = sum(p.ndim == 2 for block in blocks for p in block.parameters())
    with scaled(subject.structure, blocks) as parameters:
        made = [p for p in parameters if p.ndim == 2]
        assert len(made) == 2 * count
        for p in made:
            p.data.fill_(2.0)
    assert [{n for n, _ in block.named_parameters()} for block in blocks] == names
    after = dict(blocks[0].named_parameters())
    assert all(torch.allclose(after[n], 4 * value) for n, value in matrices.items())
    assert not any(p.requires_grad for block in blocks for p in block.parameters() if p.ndim == 2)


# --- the whole ----------------------------------------------------------------------------------------------------

LONG = {"calibration.sequences": 12, "refinement.sequences": 12, "refinement.held_out": 4, "refinement.steps": 8}


def refiner(values: dict, seed: int = 0) -> tuple[Refiner, Subject]:
    model = tiny_deep("llama", 4)
    run = compressed_deep(model)
    subject = Subject(model, inspect_structure(model))
    options = Refinement(sequences=12, held_out=4, learning_rate=3e-3, autocast=False, **values)
    tokens, store = token_blocks(12, 24, seed=6), FactorStore(run.stage("factors"))
    return (
        Refiner(subject, store, run.info.ranks, tokens, run.recipe.chosen, options, run.recipe.calibration, seed=seed),
        subject,
    )


_DEEP: list = []


def compressed_deep(model):
    if not _DEEP:
        import tempfile
        from pathlib import Path

        _DEEP.append(compress_tiny(model, Path(tempfile.mkdtemp(prefix="bolaco-tests-")) / "out", keep=0.5))
    return _DEEP[0]


@pytest.mark.parametrize(
    "values",
    [
        {"window": 2, "steps": 6},
        {"window": 3, "steps": 6, "logits": 2, "logit_steps": 5},
        {"steps": 2, "logits": 1, "logit_steps": 3, "scale_steps": 5},
        {"steps": 2, "logit_steps": 4},
    ],
)
def test_goes_on_anywhere_to_the_same_bytes(values, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train, "_WRITTEN_EVERY", -1.0)
    monkeypatch.setattr(train, "_WRITTEN_SHARE", -1.0)
    whole = BlockStore(tmp_path / "whole")
    refiner(values)[0].run(whole, Reporter(quiet=True))
    writes = 0
    original = BlockStore.write

    for stop in (3, 11, 24):

        def write(store, layer, tensors, stop=stop):
            nonlocal writes
            original(store, layer, tensors)
            writes += 1
            if writes == stop:
                raise Killed

        writes = 0
        again = BlockStore(tmp_path / f"stop {stop}")
        monkeypatch.setattr(BlockStore, "write", write)
        with suppress(Killed):
            refiner(values)[0].run(again, Reporter(quiet=True))
        monkeypatch.setattr(BlockStore, "write", original)
        refiner(values)[0].run(again, Reporter(quiet=True))
        for layer in range(4):
            first, second = whole.read(layer), again.read(layer)
            assert all(torch.equal(first[name], second[name]) for name in first), (stop, layer)


def test_the_end_on_logits_brings_the_model_nearer_on_what_is_held_out(tmp_path) -> None:
    found = {}
    tokens = token_blocks(12, 24, seed=6)
    cases = {
        "window": {"window": 2},
        "logits": {"window": 2, "logits": 2, "logit_steps": 60, "logit_rate": 3e-3},
        "scales": {"window": 2, "logits": 2, "logit_steps": 60, "logit_rate": 3e-3, "scale_steps": 40},
    }
    for name, values in cases.items():
        made, subject = refiner({"steps": 60} | values)
        store = BlockStore(tmp_path / name)
        made.run(store, Reporter(quiet=True))
        runner = BlockRunner(subject.model, subject.structure, tokens, 4)
        first = runner.embed()
        states = {"original": first, "compressed": first.clone()}
        for layer in range(4):
            runner.advance(layer, states["original"])
            runner.advance(layer, states["compressed"], stored_block(store, subject, layer))
        end = Ending(runner)
        assert end.right()
        with torch.no_grad():
            held = {key: value[8:] for key, value in states.items()}
            found[name] = float(end.divergence(held["compressed"], held["original"], tokens[8:]))
    assert found["scales"] <= found["logits"] < found["window"]


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ({}, 0),
        ({"logits": 2}, 2),
        ({"steps": 0, "logits": 2}, 4),  # without steps
        ({"logit_steps": 0}, 4),
        ({"logit_steps": 1}, 0),
        ({"logit_steps": 1, "logits": 0}, 4),
        ({"logit_steps": 1, "logits": 3}, 1),
        ({"logit_steps": 1, "logits": 9}, 0),
        ({"logit_steps": 1, "logit_parameters": 1}, 3),  # at least one
    ],
)
def test_which_blocks_are_trained_on_logits(values, first) -> None:
    assert refiner(values)[0].first_on_logits == first


def test_as_many_blocks_as_hold_the_parameters_that_are_allowed() -> None:
    made, subject = refiner({"logit_steps": 1})
    blocks = [compressed_block(subject, layer, made.factors.load(layer), made.ranks) for layer in range(4)]
    held = [sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in blocks]
    for first in range(1, 4):
        limit = sum(held[first:])
        assert refiner({"logit_steps": 1, "logit_parameters": limit})[0].first_on_logits == first
        assert refiner({"logit_steps": 1, "logit_parameters": limit - 1})[0].first_on_logits == min(first + 1, 3)


def test_activations_are_computed_again_where_memory_is_short_with_the_same_result(tmp_path, monkeypatch) -> None:
    values = {"steps": 2, "logit_steps": 4}
    results = []
    for free in (1 << 40, 0):
        calls = []
        monkeypatch.setattr(train, "free_memory", lambda device, free=free: free)
        monkeypatch.setattr(train, "checkpoint", lambda *a, calls=calls, **k: (calls.append(1), checkpoint(*a, **k))[1])
        store = BlockStore(tmp_path / str(free))
        refiner(values)[0].run(store, Reporter(quiet=True))
        assert bool(calls) == (free == 0)
        results.append([store.read(layer) for layer in range(4)])
    for first, second in zip(*results, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_of_the_default_on_a_tiny_model_too(tmp_path) -> None:
    more = {"refinement.window": 2, "refinement.logits": 1, "refinement.logit_steps": 4, "refinement.curvature": 0.5}
    run = compress_tiny(FAMILIES["llama"](), tmp_path / "out", preset="default", search="spectral", options=LONG | more)
    assert run.info.perplexity.compressed > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refinement.held_out": -1}, "held_out"),
        ({"refinement.fit": True, "refinement.window": 2}, "window"),
        ({"refinement.logits": -1}, "logits"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(preset="default", search="spectral", options=options)
