"""Gradient statistics against plain autograd on the whole model."""

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from bolaco.data.settings import Calibration
from bolaco.errors import NonFiniteError
from bolaco.evaluation.objective import Head
from bolaco.models.find import inspect_structure
from bolaco.models.walk import state_in
from bolaco.progress import Reporter
from bolaco.statistics.backward import BlockGradientWalk
from bolaco.statistics.fisher import FISHER
from bolaco.statistics.gradient import GRADIENT
from bolaco.statistics.importance import INPUT_IMPORTANCE, OUTPUT_IMPORTANCE
from bolaco.statistics.statistic import BLOCK, GradientStatistic
from bolaco.statistics.stored import StatisticStore, estimate_gradients, stored_bytes
from bolaco.statistics.symmetric import fold, folded_size, unfold
from tests.models import FAMILIES


def _reference(model, structure, tokens, labels):
    """E[g g^T] per site by one backward pass through everything."""
    outputs = {}
    handles = []
    for site in structure.sites:

        def keep(_, __, output, site=site):
            output.retain_grad()
            outputs[site.name] = output

        handles.append(model.base_model.get_submodule(site.module).register_forward_hook(keep))
    for layer, block in enumerate(structure.block_modules(model)):

        def keep_block(_, __, output, layer=layer):
            state = state_in(output)
            state.retain_grad()
            outputs[f"{BLOCK} {layer}"] = state

        handles.append(block.register_forward_hook(keep_block))
    logits = model(input_ids=tokens, use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    result = {}
    for site in structure.sites:
        gradient = outputs[site.name].grad.reshape(tokens.numel(), -1)[:, slice(*site.rows)].double()
        result[site.name] = gradient.T @ gradient / len(gradient)
    for name in outputs.keys() - result.keys():
        gradient = outputs[name].grad.reshape(tokens.numel(), -1).double()
        result[name] = gradient.T @ gradient / len(gradient)
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_autograd_through_the_whole_model(family, monkeypatch, tmp_path):
    model = FAMILIES[family]()
    structure = inspect_structure(model)
    tokens = torch.randint(5, model.config.vocab_size - 1, (3, 12), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, model.config.vocab_size, (tokens.numel(),), generator=torch.Generator().manual_seed(2))
    # The labels are sampled; the reference needs the same ones, so the draw is replaced by a fixed one.
    drawn = iter(labels)
    monkeypatch.setattr(torch, "searchsorted", lambda c, u: torch.stack([next(drawn) for _ in u])[:, None])
    walk = BlockGradientWalk(model, structure, tokens, batch=2, statistic=GRADIENT, folder=tmp_path)
    found = {}
    for layer, blocks in walk.run():
        found.update({f"{BLOCK} {layer}" if name == BLOCK else name: value for name, value in blocks.items()})
    expected = _reference(model, structure, tokens, labels)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-4 * float(value.norm()), name
    assert not list(tmp_path.iterdir())
    assert all(parameter.requires_grad for parameter in model.parameters())


def _weight_fisher(model, structure, tokens):
    """Mean over sequences of the squared weight gradients, added up over outputs, by one backward pass a sequence."""
    result = {site.name: 0.0 for site in structure.sites}
    for sequence in tokens:
        model.zero_grad()
        logits = model(input_ids=sequence[None], use_cache=False).logits[0].float()
        F.cross_entropy(logits[:-1], sequence[1:], reduction="sum").backward()
        for site in structure.sites:
            gradient = model.base_model.get_submodule(site.module).weight.grad.double()
            if isinstance(model.base_model.get_submodule(site.module), Conv1D):
                gradient = gradient.T
            result[site.name] = result[site.name] + gradient[slice(*site.rows)].square().sum(dim=0) / len(tokens)
    model.zero_grad()
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_fisher_equals_autograd_sequence_by_sequence(family, tmp_path):
    model = FAMILIES[family]()
    structure = inspect_structure(model)
    tokens = torch.randint(5, model.config.vocab_size - 1, (3, 12), generator=torch.Generator().manual_seed(1))
    expected = _weight_fisher(model, structure, tokens)
    found = {}
    for _, blocks in BlockGradientWalk(model, structure, tokens, batch=2, statistic=FISHER, folder=tmp_path).run():
        found.update(blocks)
    assert found.keys() == expected.keys()
    for site in structure.sites:
        assert found[site.name].shape == (site.in_features,)
        assert float((found[site.name] - expected[site.name]).norm()) <= 1e-4 * float(expected[site.name].norm())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("slab", [1, 10**6])
def test_own_labels_are_the_next_tokens_in_any_slab(monkeypatch, slab):
    model = FAMILIES["llama"]()
    monkeypatch.setattr("bolaco.statistics.backward.SLAB", slab)
    tokens = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    walk = BlockGradientWalk(model, inspect_structure(model), tokens, batch=2, statistic=FISHER)
    state = torch.randn(2, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    leaf = state.clone().requires_grad_()
    logits = model.get_output_embeddings()(leaf)[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(walk._label_gradient(state, torch.Generator(), tokens), leaf.grad)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 64, 65])
def test_a_folded_symmetric_matrix_is_half_and_comes_back(n: int):
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    matrix = matrix + matrix.T
    folded = fold(matrix)
    assert folded.numel() == folded_size(n) == n * (n + 1) // 2
    assert torch.equal(unfold(folded), matrix)
    sorted_numbers = matrix[torch.ones(n, n, dtype=torch.bool).tril()].sort().values
    assert torch.equal(folded.flatten().sort().values, sorted_numbers)


def test_a_gradient_that_is_not_finite_is_named():
    model = FAMILIES["llama"]()
    structure = inspect_structure(model)
    walk = BlockGradientWalk(model, structure, torch.full((2, 6), 7), batch=2, statistic=FISHER)
    walk._label_gradient = lambda final, *_: torch.full_like(final, float("inf"))
    with pytest.raises(NonFiniteError, match=r"layers\.1\..*, gradient: NaN or infinity; try --dtype float32"):
        list(walk.run())


def test_labels_follow_the_model():
    model = FAMILIES["llama"]()
    walk = BlockGradientWalk(model, inspect_structure(model), torch.zeros(1, 4, dtype=torch.long), 1, GRADIENT)
    state = torch.randn(1, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    probability = Head(model)(state[0]).softmax(-1)[0].detach()
    # The gradient of a sampled label is p - onehot seen through the head; its mean over draws goes to zero.
    gradients = walk._label_gradient(state.expand(1, 4000, -1).contiguous(), torch.Generator().manual_seed(1))[0]
    weight = model.get_output_embeddings().weight.detach()
    spread = (weight.T * probability) @ weight - torch.outer(weight.T @ probability, weight.T @ probability)
    assert float(gradients.mean(0).norm()) < 0.1 * float(gradients.norm(dim=1).mean())
    covariance = gradients.T @ gradients / len(gradients)
    assert float((covariance - spread).norm()) < 0.15 * float(spread.norm())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cache", ["memory", "disk", "auto"])
@pytest.mark.parametrize(
    "statistics",
    [(GRADIENT,), (FISHER,), (GRADIENT, FISHER), (OUTPUT_IMPORTANCE, INPUT_IMPORTANCE)],
    ids=lambda kinds: "+".join(kind.name for kind in kinds),
)
def test_disk_space_is_foreseen(family, cache, statistics, monkeypatch, tmp_path):
    monkeypatch.setattr("bolaco.models.walk._CACHED", 0.0)
    model = FAMILIES[family]()
    structure = inspect_structure(model)
    tokens = torch.randint(5, model.config.vocab_size - 1, (6, 64), generator=torch.Generator().manual_seed(1))
    largest = 0

    def save_and_look(tensors, path, metadata=None):
        nonlocal largest
        safetensors.torch.save_file(tensors, path, metadata=metadata)
        largest = max(largest, sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()))

    monkeypatch.setattr("bolaco.work.tensors.save_file", save_and_look)
    settings = Calibration(gradient_sequences=4, batch=2, cache=cache)
    foreseen = stored_bytes(statistics, model, structure, tokens, settings)
    for kind in statistics:
        store = StatisticStore(tmp_path / kind.name, kind)
        if isinstance(kind, GradientStatistic):
            estimate_gradients(store, kind, model, structure, tokens[:4], settings, Reporter(quiet=True))
            continue
        for layer in range(structure.num_layers):
            store.put(layer, {s.name: torch.ones(kind.numbers(s)).double() for s in structure.of_layer(layer)})
    headers = 2048 * (2 * structure.num_layers + 2)  # of the files
    assert largest - headers <= foreseen <= 1.3 * largest


def test_same_seed_same_moments():
    model = FAMILIES["llama"]()
    structure = inspect_structure(model)
    tokens = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    runs = []
    for seed in (0, 0, 1):
        walk = BlockGradientWalk(model, structure, tokens, batch=2, statistic=GRADIENT, seed=seed)
        runs.append({n: g for _, block in walk.run() for n, g in block.items()})
    name = structure.sites[0].name
    assert torch.equal(runs[0][name], runs[1][name])
    assert not torch.equal(runs[0][name], runs[2][name])
