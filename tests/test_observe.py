"""What a forward pass shows of a model, and the two ways to run it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bolaco.errors import UnsupportedModelError
from bolaco.models.experts import unfused
from bolaco.models.find import inspect_structure
from bolaco.models.observe import observed
from bolaco.models.structure import Walk
from bolaco.models.walk import BlockRunner
from bolaco.statistics.backward import BlockGradientWalk, WholeGradientWalk, gradient_walk
from bolaco.statistics.fisher import FISHER
from bolaco.statistics.forward import BlockWalk, WholeWalk, collect, input_walk
from bolaco.statistics.gradient import GRADIENT
from bolaco.statistics.moments import MOMENTS
from bolaco.statistics.statistic import BLOCK
from tests.models import FAMILIES, tiny_llama
from tests.types import of_type, tokens_for


def seen(model):
    working = unfused(model)
    return working, observed(working, inspect_structure(working))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_known_names_are_seen_as_they_are_named(family):
    model = FAMILIES[family]()
    named = inspect_structure(model)
    _, structure = seen(model)
    assert [site.name for site in structure.sites] == [site.name for site in named.sites]
    assert [site.input_group for site in structure.sites] == [site.input_group for site in named.sites]
    assert structure.kept == ()
    assert structure.walk == Walk()


def test_parallel_blocks_have_one_input():
    """GPT-J's attention and feed-forward matrices all take the normed hidden states."""
    _, structure = seen(of_type("gptj"))
    groups = {}
    for site in structure.of_layer(0):
        groups.setdefault(site.input_group, set()).add(site.type)
    assert sorted(map(sorted, groups.values())) == [["down"], ["k", "q", "up", "v"], ["o"]]


def test_a_matrix_that_is_not_called_stays_dense():
    model = tiny_llama()
    model.base_model.layers[1].self_attn.extra_proj = nn.Linear(32, 16)
    _, structure = seen(model)
    assert [(kept.name, kept.size, kept.reason) for kept in structure.kept] == [
        ("self_attn.extra_proj", 512, "not called")
    ]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Reader(nn.Module):
    """Uses the weight of its projection without calling it, and another one's besides."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.kernel, self.peeked = mlp, nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.mlp(x) + x @ self.kernel.weight.T + self.peeked(x) * self.peeked.weight.sum()


def test_what_is_no_plain_product_or_read_by_its_parent_stays_dense():
    model = tiny_llama()
    block = model.base_model.layers[0]
    block.mlp = Reader(block.mlp)
    block.self_attn.q_proj = Doubled(32, 32, bias=False)
    _, structure = seen(model)
    assert {(kept.name, kept.reason) for kept in structure.kept} == {
        ("mlp.kernel", "weight read by its parent"),
        ("mlp.peeked", "weight read by its parent"),
        ("self_attn.q_proj", "not a plain product"),
    }
    assert type(block.self_attn.q_proj) is Doubled


def test_a_weight_in_two_places_stays_dense():
    model = tiny_llama()
    first, second = model.base_model.layers[:2]
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    structure = inspect_structure(model)
    (kept,) = structure.kept
    assert (kept.name, kept.reason) == ("mlp.up_proj", "used in several places")
    assert kept.size == 2 * first.mlp.up_proj.weight.numel()


def test_a_model_that_cannot_read_tokens_alone_is_an_error():
    model = tiny_llama()
    model.base_model.layers[0].forward = lambda *args, **kwargs: kwargs["image"]
    with pytest.raises(UnsupportedModelError, match="cannot be run on token ids alone"):
        observed(model, inspect_structure(model))


@pytest.mark.parametrize(
    ("family", "varying", "reason"),
    [
        ("gemma3n_text", False, "cannot be run alone"),  # keys and values of blocks before
        ("gemma4_text", True, ""),
        ("zaya", False, "is given what blocks before it computed"),
        ("hrm_text", False, "not called once each"),
    ],
)
def test_how_blocks_can_be_run(family, varying, reason):
    _, structure = seen(of_type(family))
    assert bool(structure.walk.varying) == varying
    assert bool(structure.walk.hooks) == bool(reason)
    assert reason in structure.walk.hooks


def test_something_between_two_blocks_is_noticed():
    model = tiny_llama()
    block = model.base_model.layers[1]
    inner = block.forward
    block.forward = lambda hidden_states, **kwargs: inner(hidden_states + 1, **kwargs)
    model.base_model.layers[0].register_forward_hook(lambda _, args, output: output * 1.5)
    _, structure = seen(model)  # a hook is part of a block
    assert structure.walk.hooks == ""
    model.base_model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] + 1, *args[1:]), kwargs), with_kwargs=True, prepend=True
    )
    _, structure = seen(model)
    assert "between block 0 and the next" in structure.walk.hooks


def copied(output):
    """Hidden states as they are now: some families change them in place."""
    return (output[0] if isinstance(output, tuple) else output).clone()


@pytest.mark.parametrize("family", ["gemma4_text", "mamba2", "qwen3_next"])
def test_blocks_alone_give_what_they_give_in_the_model(family):
    """On batches of different sizes, with what depends on their tokens."""
    model, structure = seen(of_type(family))
    tokens = tokens_for(model, 5, 11)
    runner = BlockRunner(model, structure, tokens, 2)
    hidden = runner.embed()
    expected = {}
    handles = [
        block.register_forward_hook(lambda _, args, output, i=i: expected.__setitem__(i, copied(output)))
        for i, block in enumerate(runner.blocks)
    ]
    with torch.no_grad():
        model.base_model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    for layer in range(structure.num_layers):
        runner.advance(layer, hidden)
        torch.testing.assert_close(hidden, runner.kept(expected[layer]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gptj", "mixtral", "gemma4_text"])
def test_whole_passes_give_the_statistics_of_block_by_block(family, monkeypatch):
    model, structure = seen(of_type(family))
    whole = replace(structure, walk=Walk("for this test"))
    tokens = tokens_for(model, 4, 12)
    found = {}
    for name, each in (("blocks", structure), ("whole", whole)):
        walk = input_walk(model, each, tokens, 2)
        assert isinstance(walk, WholeWalk if name == "whole" else BlockWalk)
        layers = []
        while walk.layer < each.num_layers:
            layers += collect(walk, [MOMENTS], 2)
        found[name] = layers
    for one, other in zip(found["blocks"], found["whole"], strict=True):
        assert one.keys() == other.keys()
        for group in one:
            torch.testing.assert_close(one[group][MOMENTS].covariance, other[group][MOMENTS].covariance)
            torch.testing.assert_close(one[group][MOMENTS].mean, other[group][MOMENTS].mean)


@pytest.mark.parametrize("statistic", [GRADIENT, FISHER], ids=lambda s: s.name)
@pytest.mark.parametrize("family", ["llama", "mixtral", "mamba2", "gemma4_text"])
def test_autograd_through_the_whole_gives_the_gradients_of_block_by_block(family, statistic):
    model, structure = seen(of_type(family))
    whole = replace(structure, walk=Walk("for this test"))
    tokens = tokens_for(model, 3, 12)
    found = {}
    for name, each in (("blocks", structure), ("whole", whole)):
        walk = gradient_walk(model, each, tokens, 2, statistic)
        assert isinstance(walk, WholeGradientWalk if name == "whole" else BlockGradientWalk)
        found[name] = {key: value for _, values in walk.run() for key, value in values.items()}
    found["blocks"].pop(BLOCK, None)  # of whole blocks, which nothing reads where blocks are not run one by one
    assert found["blocks"].keys() == found["whole"].keys()
    for name, value in found["blocks"].items():
        assert float((value - found["whole"][name]).norm()) <= 1e-3 * float(value.norm()) + 1e-12, name


def test_whole_passes_take_as_many_blocks_as_fit(monkeypatch):
    model, structure = seen(tiny_llama())
    walk = WholeWalk(model, structure, tokens_for(model), 2)
    monkeypatch.setattr("bolaco.statistics.forward._SHARE", 0.0)
    assert walk.layers_at_once(lambda layer: 10) == 1
    monkeypatch.setattr("bolaco.statistics.forward._SHARE", 0.5)
    assert walk.layers_at_once(lambda layer: 10) == structure.num_layers
