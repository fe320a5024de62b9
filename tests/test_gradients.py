"""Output-gradient second moments against plain autograd on the whole model."""

import pytest
import torch
import torch.nn.functional as F

from bolaco.models import inspect_structure
from bolaco.objective import Head
from bolaco.statistics.gradients import GradientWalk
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
    logits = model(input_ids=tokens, use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    result = {}
    for site in structure.sites:
        gradient = outputs[site.name].grad.reshape(tokens.numel(), -1)[:, slice(*site.rows)].double()
        result[site.name] = gradient.T @ gradient / len(gradient)
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
    walk = GradientWalk(model, structure, tokens, batch=2, folder=tmp_path)
    found = {}
    for _, blocks in walk.run():
        found.update(blocks)
    expected = _reference(model, structure, tokens, labels)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-4 * float(value.norm()), name
    assert not list(tmp_path.iterdir())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_labels_follow_the_model():
    model = FAMILIES["llama"]()
    walk = GradientWalk(model, inspect_structure(model), torch.zeros(1, 4, dtype=torch.long), batch=1)
    state = torch.randn(1, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    probability = Head(model)(state[0]).softmax(-1)[0].detach()
    # The gradient of a sampled label is p - onehot seen through the head; its mean over draws goes to zero.
    gradients = walk._label_gradient(state.expand(1, 4000, -1).contiguous(), torch.Generator().manual_seed(1))[0]
    weight = model.get_output_embeddings().weight.detach()
    spread = (weight.T * probability) @ weight - torch.outer(weight.T @ probability, weight.T @ probability)
    assert float(gradients.mean(0).norm()) < 0.1 * float(gradients.norm(dim=1).mean())
    covariance = gradients.T @ gradients / len(gradients)
    assert float((covariance - spread).norm()) < 0.15 * float(spread.norm())


def test_same_seed_same_moments():
    model = FAMILIES["llama"]()
    structure = inspect_structure(model)
    tokens = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    runs = []
    for seed in (0, 0, 1):
        walk = GradientWalk(model, structure, tokens, batch=2, seed=seed)
        runs.append({n: g for _, block in walk.run() for n, g in block.items()})
    name = structure.sites[0].name
    assert torch.equal(runs[0][name], runs[1][name])
    assert not torch.equal(runs[0][name], runs[2][name])
