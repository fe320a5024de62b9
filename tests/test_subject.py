"""What is factored: the matrices of a model, or others of the same shapes, such as what fine-tuning added to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.data.settings import Calibration
from bolaco.factorize import METHODS, ChosenMethod, Factors
from bolaco.factorize.method import NoOptions
from bolaco.factorize.run import FactorJob, factorize
from bolaco.factorize.store import FactorStore
from bolaco.layers import FactoredLinear, SplitLinear
from bolaco.models.find import inspect_structure
from bolaco.models.structure import Site, Stack, stacked
from bolaco.models.subject import Subject
from bolaco.progress import Reporter
from bolaco.storage.block import compressed_block, place_in_block
from tests.models import FAMILIES

SVD = ChosenMethod(METHODS.get("svd"), NoOptions())


@dataclass(frozen=True)
class Difference(Subject):
    """What fine-tuning added to each matrix of ``base``; its biases are no part of it."""

    base: PreTrainedModel

    def matrix(self, site: Site) -> Tensor:
        return super().matrix(site) - Subject(self.base, self.structure).matrix(site)

    def offset(self, site: Site) -> Tensor | None:
        return None


def tuned(base: PreTrainedModel, rank: int = 3) -> PreTrainedModel:
    """A model of the same shapes whose matrices differ from those of ``base`` by matrices of that rank."""
    model = type(base)(base.config).eval()
    model.load_state_dict(base.state_dict())
    subject, draw = Subject(model, inspect_structure(model)), torch.Generator().manual_seed(4)
    for site in subject.structure.sites:
        left = torch.randn(site.out_features, rank, generator=draw)
        subject.matrix(site).add_(left @ torch.randn(rank, site.in_features, generator=draw) / 16)
    return model


def factors_of(subject: Subject, folder: Path) -> dict[str, Factors]:
    """Plain SVD of every site of a subject, up to the full rank."""
    store = FactorStore(folder)
    sites = subject.structure.sites
    top = {site.name: min(site.out_features, site.in_features) for site in sites}
    nothing = torch.empty(0, 8, dtype=torch.int64)
    factorize(nothing, [FactorJob(SVD, subject, store, top)], Calibration(), Reporter(quiet=True))
    found: dict[str, Factors] = {}
    for layer in range(subject.structure.num_layers):
        found |= store.load(layer)
    assert found.keys() == top.keys()
    return found


@pytest.mark.parametrize("stacks", [False, True], ids=["matrices", "stacks"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_difference_is_factored_like_a_matrix(family: str, stacks: bool, tmp_path: Path) -> None:
    base = FAMILIES[family]()
    model = tuned(base)
    structure = inspect_structure(model)
    subject = Difference(model, stacked(structure) if stacks else structure, base)
    assert any(isinstance(site, Stack) for site in subject.structure.sites) == stacks
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = factors_of(subject, tmp_path)
    plain = {
        one.name: (Subject(model, structure).matrix(one), Subject(base, structure).matrix(one))
        for one in structure.sites
    }
    for site in subject.structure.sites:
        change = torch.cat([plain[member.name][0] - plain[member.name][1] for member in site.members])
        assert torch.equal(subject.weight(site), change)
        assert change.norm() > 0
        item = found[site.name]
        full = min(site.out_features, site.in_features)
        assert item.max_rank == full
        torch.testing.assert_close(item.product(full), change, rtol=0, atol=1e-5)
        # Of one matrix the difference has rank 3, which is all it takes.
        if not stacks:
            torch.testing.assert_close(item.product(3), change, rtol=0, atol=1e-5)
            assert item.error(3) <= 1e-9 * float(item.spectrum.sum())
        assert item.bias(full, subject.bias(site)) is None
    # Neither model has changed.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "llama_biased", "phi3", "gpt2"])
def test_a_block_of_a_difference(family: str, tmp_path: Path) -> None:
    """Its layers are the factors of the difference, without the bias that the model's own matrices have."""
    base = FAMILIES[family]()
    model = tuned(base)
    structure = inspect_structure(model)
    subject = Difference(model, structure, base)
    found = factors_of(subject, tmp_path)
    block = compressed_block(subject, 1, found, {site.name: 3 for site in structure.sites})
    for site in structure.of_layer(1):
        layer = block.get_submodule(place_in_block(structure, site))
        assert isinstance(layer, FactoredLinear)
        assert layer.rank == 3
        assert layer.dense_bias() is None
        torch.testing.assert_close(layer.dense(), subject.weight(site), rtol=0, atol=1e-5)
    assert any(isinstance(module, SplitLinear) for module in block.modules()) == (family in ("phi3", "gpt2"))


def test_a_stack_of_matrices_some_of_which_have_a_bias() -> None:
    """Those without one have a zero for each output."""

    class Half(Subject):
        def offset(self, site: Site) -> Tensor | None:
            return super().offset(site) if site.type in ("q", "down") else None

    model = FAMILIES["llama_biased"]()
    subject = Half(model, stacked(inspect_structure(model)))
    of_type = {site.type: site for site in subject.structure.of_layer(0)}
    joined, q = subject.bias(of_type["qk"]), subject.offset(of_type["qk"].members[0])
    assert joined is not None
    assert q is not None
    assert torch.equal(joined, torch.cat([q, torch.zeros(of_type["qk"].members[1].out_features)]))
    assert subject.bias(of_type["gate_up"]) is None
    assert subject.bias(of_type["v"]) is None
    assert torch.equal(subject.bias(of_type["down"]), model.model.layers[0].mlp.down_proj.bias)


def test_a_subject_leaves_nothing_beside_the_model_unless_it_says_so(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    Subject(model, inspect_structure(model)).save_extra(tmp_path)
    assert not list(tmp_path.iterdir())
