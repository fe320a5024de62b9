"""Removing decoder blocks: which ones, that it equals skipping them, and that the result is a stock model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from bolaco.checkpoint.info import read_info
from bolaco.errors import BudgetError, RecipeError, UnsupportedModelError
from bolaco.models.find import inspect_structure, meta_model
from bolaco.recipe.recipe import TransformRecipe, make_recipe
from bolaco.runs.chop import kept_blocks as blocks_of
from bolaco.transform.chop import PATTERNS, chop, chop_config, kept_blocks, skipping_logits
from tests.command import bolaco, compress, furnish, ok
from tests.models import (
    FAMILIES,
    QUICK_FAMILIES,
    build,
    compress_tiny,
    save_tiny,
    slow,
    tiny_deep,
    tiny_llama,
    token_blocks,
)

LAYERS = 6


@pytest.mark.parametrize(
    ("layers", "keep", "pattern", "expected"),
    [
        (8, 4, "max-gap", [0, 2, 5, 7]),
        (9, 5, "max-gap", [0, 2, 4, 6, 8]),
        (8, 4, "input", [0, 5, 6, 7]),
        (8, 4, "output", [0, 1, 2, 7]),
        (8, 4, "middle", [0, 1, 6, 7]),
        (8, 4, "both", [0, 3, 4, 7]),
        (8, 5, "middle", [0, 1, 2, 6, 7]),
        (8, 5, "both", [0, 3, 4, 5, 7]),
        (7, 3, "max-gap", [0, 3, 6]),
        (7, 3, "both", [0, 3, 6]),
        (30, 15, "input", [0, *range(16, 30)]),
        (30, 28, "both", [0, *range(2, 28), 29]),
        (30, 29, "middle", [*range(15), *range(16, 30)]),
        *[(5, 2, pattern, [0, 4]) for pattern in PATTERNS],
        *[(5, 5, pattern, [0, 1, 2, 3, 4]) for pattern in PATTERNS],
        *[(1, 1, pattern, [0]) for pattern in PATTERNS],
    ],
)
def test_which_blocks_stay(layers: int, keep: int, pattern: str, expected: list[int]) -> None:
    assert list(kept_blocks(layers, keep, pattern)) == expected


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.integers(2, 90), st.data(), st.sampled_from(sorted(PATTERNS)))
def test_any_number_of_blocks_in_any_pattern(layers: int, data: st.DataObject, pattern: str) -> None:
    keep = data.draw(st.integers(2, layers))
    blocks = kept_blocks(layers, keep, pattern)
    assert len(blocks) == keep
    assert list(blocks) == sorted(set(blocks))
    assert (blocks[0], blocks[-1]) == (0, layers - 1)
    gaps = [b - a for a, b in itertools.pairwise(blocks)]
    if pattern == "max-gap":
        assert max(gaps) - min(gaps) <= 1
    elif pattern != "both":
        assert sum(gap > 1 for gap in gaps) == (keep < layers)  # one hole
    else:
        assert all(gap == 1 for gap in gaps[1:-1])


def test_numbers_of_blocks_that_cannot_be() -> None:
    for layers, keep in ((6, 1), (6, 7), (1, 0)):
        with pytest.raises(ValueError, match="always stay"):
            kept_blocks(layers, keep, "input")
    with pytest.raises(ValueError, match="unknown pattern"):
        kept_blocks(6, 3, "random")


def test_the_largest_number_within_the_budget() -> None:
    structure = inspect_structure(meta_model(tiny_llama(num_hidden_layers=6).config))
    for keep, expected in ((1.0, 6), (0.99, 5), (0.5, 3), (0.49, 2), (0.34, 2)):
        recipe = make_recipe({"model": "m", "keep": keep, "method": "chop"})
        assert isinstance(recipe, TransformRecipe)
        assert len(blocks_of(recipe, structure)) == expected
    with pytest.raises(BudgetError, match="the first and the last"):
        blocks_of(recipe.model_copy(update={"keep": 0.3}), structure)


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        *((family, "max-gap") if family in QUICK_FAMILIES else slow(family, "max-gap") for family in FAMILIES),
        *((family, "input") if family in ("smollm3", "gemma3_text") else slow(family, "input") for family in FAMILIES),
    ],
)
def test_removing_is_skipping_and_stock_transformers_loads_it(family: str, pattern: str, tmp_path: Path) -> None:
    """Without bolaco's classes or any flag; generation agrees token for token with and without the KV cache."""
    original = tiny_deep(family, LAYERS)
    before = original.config.to_dict()
    blocks = kept_blocks(LAYERS, 3, pattern)
    structure = inspect_structure(original)
    chop(original, structure, blocks).save_pretrained(tmp_path)
    assert original.config.to_dict() == before
    assert [m.layer_idx for m in original.modules() if hasattr(m, "layer_idx")][-1] == LAYERS - 1

    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == original.config.model_type
    assert not {"auto_map", "lowrank"} & values.keys()
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(model) is type(original)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in original.parameters())

    tokens = token_blocks(2, 40, seed=3)  # longer than the sliding windows
    with torch.no_grad():
        found = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, skipping_logits(original, structure, blocks, tokens), rtol=1e-5, atol=1e-5)

    def generate(cache: bool) -> torch.Tensor:
        ids = tokens[:, :20]
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        return model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=cache, **settings)

    assert torch.equal(generate(True), generate(False))


def test_what_differs_from_block_to_block_stays_with_its_block() -> None:
    smollm3 = tiny_deep("smollm3", 8).config
    assert smollm3.no_rope_layers == [1, 1, 1, 0] * 2
    chop_config(smollm3, (0, 3, 7))
    assert (smollm3.num_hidden_layers, smollm3.no_rope_layers) == (3, [1, 0, 0])
    gemma = tiny_deep("gemma2", 4).config
    chop_config(gemma, (0, 1, 3))
    assert gemma.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    qwen = build("qwen2", **sizes, num_hidden_layers=6, use_sliding_window=True, sliding_window=8, max_window_layers=3)
    smaller = chop(qwen, inspect_structure(qwen), (0, 2, 4, 5))
    assert smaller.config.max_window_layers == 2
    assert smaller.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2


def test_blocks_that_depend_on_their_depth_are_refused() -> None:
    values = {"n_embd": 32, "n_inner": 48, "n_layer": 6, "n_head": 4, "n_positions": 64}
    model = build("gpt2", **values, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedModelError, match=r"h\.1\.attn: scaling is"):
        chop(model, inspect_structure(model), (0, 4, 5))
    llama = tiny_deep("llama")
    for block in inspect_structure(llama).block_modules(llama):
        block.self_attn.register_forward_hook(lambda m, _, out: (out[0] * (1 + m.layer_idx), *out[1:]))
    with pytest.raises(UnsupportedModelError, match="depend on their depth"):
        chop(llama, inspect_structure(llama), (0, 4, 5))


def test_a_configuration_that_cannot_say_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_deep("gemma2", 6)
    structure = inspect_structure(model)
    structure.block_modules(model)[4].self_attn.sliding_window = 5  # the configuration knows one for all
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn: sliding_window is 5"):
        chop(model, structure, (0, 4, 5))


def test_a_run(tmp_path: Path) -> None:
    run = compress_tiny(tiny_deep("llama"), tmp_path / "out", preset=None, search=None, method="chop", keep=0.7)
    info = run.info
    assert (info.method, info.storage, info.ranks, info.trials) == ("chop", None, {}, [])
    assert (info.layers, info.layers_dense) == ([0, 1, 4, 5], 6)
    assert info.keep_linears == pytest.approx(4 / 6)
    assert info.parameters_linears == 4 * info.parameters_linears_dense // 6
    model = AutoModelForCausalLM.from_pretrained(run.path)
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert info.perplexity.compressed != info.perplexity.dense
    assert not [path for path in run.work.iterdir() if path.is_dir()]  # nothing is factored
    card = (run.path / "README.md").read_text()
    assert "4 of 6 decoder blocks stay: 0-1, 4-5" in card
    assert "trust_remote_code" not in card


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnish(tmp_path, save_tiny(tmp_path / "deep", tiny_deep("llama"))))
    words = ["compress", "model", "--keep", "0.7", "--method", "chop", "--set", "method.pattern=input"]
    words += ["--eval", "other.txt", "--seq-len", "32", "--set", "evaluation.windows=4"]
    plan = ok(*words, "--dry-run").out
    assert "4 of 6 decoder blocks stay: 0, 3-5" in plan
    assert "(0.6667)" in plan
    ok(*words, "-o", "out")  # no calibration text is needed: the default's is not there
    assert read_info("out").recipe["method"] == {"name": "chop", "pattern": "input"}
    shown = ok("inspect", "out").out
    assert "4 of 6 decoder blocks stay: 0, 3-5" in shown
    assert "0.6667" in shown
    assert "perplexity" in ok("eval", "out", "--data", "other.txt", "--seq-len", "32").out
    # A stock model: it can be compressed further, but there is nothing to multiply back.
    ok(*compress("again", model="out"))
    assert "not a compressed one" in bolaco("export", "out", "--dense", "-o", "x").err


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"storage": "pivoted"}, "storage pivoted contradicts method chop"),
        ({"search": "5x1"}, "search contradicts method chop"),
        ({"search": {"warm_start": "x"}}, "search contradicts method chop"),
        ({"refinement": {"steps": 3}}, "refinement contradicts method chop"),
        ({"refinement": {"fit": True}}, "refinement contradicts method chop"),
        ({"method": {"name": "chop", "pattern": "random"}}, r"method\.pattern: "),
        ({"method": {"name": "chop", "steps": 3}}, r"method\.steps: method 'chop' has no such option"),
    ],
)
def test_contradictions(values: dict, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        make_recipe({"model": "m", "keep": 0.5, "method": "chop"} | values)
