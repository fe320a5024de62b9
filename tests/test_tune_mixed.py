"""Factors trained among the weights they replace: the schedule, both ends of the mixture, and the mode around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bolaco import api
from bolaco.errors import CheckpointError, RecipeError
from bolaco.layers import LowRankLinear, PivotedLinear
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model
from bolaco.models.subject import Subject
from bolaco.storage.block import low_rank_linear
from bolaco.tune.mode import Context, Prepared, matrices_of
from bolaco.tune.modes.mixed_rank import MODE, MixedLinear, draw, probability, replaced_in
from bolaco.tune.resolve import resolve
from bolaco.tune.settings import make_settings
from tests.models import FAMILIES, compress_tiny, compressed, save_tiny, slow, text_file, token_blocks


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=token_blocks(2, 24, seed=8), use_cache=False).logits
    return found


def ranks(model: Any) -> dict[str, int]:
    return {
        matrix.name: module.rank
        for matrix in matrices_of(model)
        if isinstance(module := matrix.of(model), LowRankLinear | PivotedLinear)
    }


def prepared(path: Path, original: Any, **options: Any) -> tuple[Any, Prepared]:
    """A loaded model in training mode, and what the mode made of it."""
    model = load_model(str(path)).requires_grad_(False)
    given = {f"options.{key}": value for key, value in options.items()}
    settings, checked = resolve(make_settings(str(path), {"mode": "mixed-rank", "data": "x"}, given), MODE)
    made = MODE.prepare(Context(model, settings, checked, None, lambda _: [], lambda _: original))
    for module in model.modules():
        if isinstance(module, MixedLinear):
            module.train()
    return model, made


def replace_all(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, MixedLinear):
            module.mixed = True


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_probability_falls_to_zero_and_stays_there() -> None:
    found = [probability(step, 10, 0.8, 0.5) for step in range(10)]
    assert found == pytest.approx([0.8, 0.64, 0.48, 0.32, 0.16, 0, 0, 0, 0, 0])
    assert probability(0, 3, 1.0, 1.0) == 1
    assert probability(2, 4, 1.0, 1.0) == 0.5


def test_coins_fall_with_their_probability_and_alike_every_time() -> None:
    def thrown(seed: int, name: str) -> list[bool]:
        return [draw(seed, step, name) < 0.3 for step in range(4000)]

    first = thrown(3, "q")
    assert sum(first) / 4000 == pytest.approx(0.3, abs=0.03)
    assert first == thrown(3, "q")
    for other in (thrown(4, "q"), thrown(3, "k")):
        both = sum(a and b for a, b in zip(first, other, strict=True)) / 4000
        assert both == pytest.approx(0.09, abs=0.03)  # independent of seed and matrix


@pytest.mark.parametrize("names", [["q"], ["q", "k"], ["q", "k", "v", "o"]])
def test_no_step_replaces_all_matrices(names: list[str]) -> None:
    for chance in (0.0, 0.3, 0.999, 1.0):
        found = [replaced_in(0, step, names, chance) for step in range(300)]
        assert all(len(step) < len(names) for step in found)
        assert found == [replaced_in(0, step, names, chance) for step in range(300)]
        free = [{name for name in names if draw(0, step, name) < chance} for step in range(300)]
        assert all(a == b for a, b in zip(found, free, strict=True) if len(b) < len(names))
    if len(names) > 1:  # the one that is left changes
        assert len({frozenset(step) for step in found}) == len(names)


# --- the mixture ------------------------------------------------------------------------------------------------------


def test_layer_is_one_or_the_other() -> None:
    factors = low_rank_linear(normal(5, 2), normal(2, 7, seed=1), normal(5, seed=2)).requires_grad_(True)
    weight, bias, x = normal(5, 7, seed=3), normal(5, seed=4), normal(3, 7, seed=5)
    layer = MixedLinear(factors, weight, bias).train()
    assert torch.equal(layer(x), factors(x))
    layer.mixed = True
    torch.testing.assert_close(layer(x), x @ weight.T + bias)
    layer(x).sum().backward()
    assert all(not parameter.grad.any() for parameter in factors.parameters() if parameter.grad is not None)
    assert factors.reduce.weight.grad is not None
    assert torch.equal(layer.eval()(x), factors(x))  # evaluation is of the factors
    assert set(layer.state_dict()) == {f"layer.{key}" for key in factors.state_dict()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_both_ends_of_the_mixture(family: str) -> None:
    """With all weights in place the model is the original, as far as matrices go; at p = 0 the factored model."""
    source = compressed(family)
    model, made = prepared(source.path, source.original)
    assert made.on_step is not None
    replace_all(model)
    torch.testing.assert_close(logits(model), logits(source.original), rtol=1e-4, atol=1e-4)
    made.on_step(5, 10)
    torch.testing.assert_close(logits(model), logits(load_model(str(source.path))), rtol=1e-4, atol=1e-4)
    made.on_step(2, 10)  # p = 0.54
    states = {module.mixed for module in model.modules() if isinstance(module, MixedLinear)}
    assert states == {True, False}
    # Whatever the last coin was, the export is the factors.
    wanted = logits(model.eval())
    finished = made.finish()
    torch.testing.assert_close(logits(finished), wanted, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, MixedLinear) for module in finished.modules())


def sparse_weights(original: Any) -> dict[str, Tensor]:
    """Half of every matrix, by the names of the matrices."""
    subject = Subject(original, inspect_structure(original))
    weights = {
        site.name: subject.weight(site).clone(memory_format=torch.contiguous_format) for site in subject.structure.sites
    }
    return {name: weight * (weight.abs() > weight.abs().median()) for name, weight in weights.items()}


@pytest.mark.parametrize("family", [slow("llama"), slow("gpt2"), "phi3"])
def test_pruned_weights_beside_the_model_are_what_is_mixed_in(family: str, tmp_path: Path) -> None:
    source = compress_tiny(FAMILIES[family](), tmp_path / "small", method="svd")
    weights = sparse_weights(source.original)
    save_file(weights, source.path / "sparse.safetensors")
    model, made = prepared(source.path, source.original)
    assert made.on_step is not None
    replace_all(model)
    sparse = Subject(source.original, inspect_structure(source.original))
    changed = {matrix.name.replace(".parts.", ".") for matrix in matrices_of(load_model(str(source.path)))}
    factored = {name.replace(".parts.", ".") for name in ranks(load_model(str(source.path)))}
    assert factored <= changed
    for site in sparse.structure.sites:
        if site.name in factored:
            sparse.weight(site).copy_(weights[site.name])
    torch.testing.assert_close(logits(model), logits(sparse.model), rtol=1e-4, atol=1e-4)


def test_the_original_is_not_loaded_for_pruned_weights(tmp_path: Path) -> None:
    """Where the architecture has no biases that it would be needed for."""
    source = compress_tiny(FAMILIES["llama"](), tmp_path / "small", method="svd")
    save_file(sparse_weights(source.original), source.path / "sparse.safetensors")
    model = load_model(str(source.path)).requires_grad_(False)
    settings, options = resolve(make_settings(str(source.path), {"mode": "mixed-rank", "data": "x"}), MODE)
    MODE.prepare(Context(model, settings, options, None, lambda _: [], lambda _: pytest.fail("loaded")))


def test_other_weights_are_refused(tmp_path: Path) -> None:
    source = compress_tiny(FAMILIES["llama"](), tmp_path / "small", method="svd")
    weights = {name: weight[:-1] for name, weight in sparse_weights(source.original).items()}
    save_file(weights, source.path / "sparse.safetensors")
    with pytest.raises(
        CheckpointError, match=r"sparse.safetensors: has no matrix model.layers.0.* of shape \[32, 32\]"
    ):
        prepared(source.path, source.original)
    (source.path / "sparse.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"sparse.safetensors: damaged"):
        prepared(source.path, source.original)


# --- the mode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["pivoted", slow("two-factor")])
def test_a_run(storage: str, tmp_path: Path) -> None:
    source = compress_tiny(FAMILIES["llama"](), tmp_path / "small", keep=0.6, storage=storage)
    original = save_tiny(tmp_path / "original", source.original)
    options = {"options.original": str(original), "data.sequences": 4, "evaluation.windows": 4}
    options |= {"training.autocast": False, "training.warmup": 0}
    words = {"max_steps": 30, "batch": 4, "seq_len": 32, "learning_rate": 3e-3}
    result = api.tune(str(source.path), "mixed-rank", str(text_file()), tmp_path / "out", options=options, **words)
    assert result is not None
    curve = [point.loss for point in result.info.tuning.curve]
    # From the middle on there are the factors only, on one batch: the loss has to fall.
    assert curve[-1] < curve[15] - 0.05
    old, new = load_model(str(source.path)), load_model(str(result.path))
    assert ranks(new) == ranks(old)
    assert {k: v.shape for k, v in new.state_dict().items() if "order" not in k}.keys() == {
        k: v for k, v in old.state_dict().items() if "order" not in k
    }.keys()
    measured = api.evaluate(str(result.path), str(text_file()), seq_len=32, limit=4).perplexity
    assert measured == pytest.approx(result.info.tuning.perplexity.after, rel=1e-4)


@pytest.mark.parametrize("start", [0.0, 0.5, 0.999999])
def test_every_step_has_a_gradient(start: float) -> None:
    """The first one too, where the weights that were factored are used almost everywhere."""
    source = compressed("llama")
    model, made = prepared(source.path, source.original, start=start)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert made.on_step is not None
    for step in range(6):
        made.on_step(step, 8)
        tokens = token_blocks(1, 12, seed=step)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        assert any(bool(parameter.grad.any()) for parameter in trained if parameter.grad is not None)
        model.zero_grad()


def test_a_start_that_trains_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"options\.start"):
        prepared(compressed("llama").path, None, start=1.0)
