"""The model of the search: slices of factors in place of matrices, and nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.allocate.search.elastic import ElasticLinear, ElasticModel
from bolaco.errors import ResumeError
from bolaco.factorize import METHODS, ChosenMethod, Factors
from bolaco.factorize.method import NoOptions
from bolaco.factorize.store import FactorStore
from bolaco.models.find import inspect_structure
from bolaco.models.structure import Structure
from bolaco.models.subject import Subject
from bolaco.statistics.forward import BlockWalk, collect
from bolaco.storage.budget import Ranks
from bolaco.storage.storage import STORAGES
from tests.models import FAMILIES, token_blocks

KINDS = {name: FAMILIES[name] for name in ("llama", "llama_biased", "phi3", "gpt2")}
TOKENS = token_blocks(3, 20)


class Case:
    """A model, the factors of all its matrices but v, and some ranks."""

    def __init__(self, make: Callable[[], PreTrainedModel], folder: Path) -> None:
        self.model = make()
        self.structure: Structure = inspect_structure(self.model)
        self.subject = Subject(self.model, self.structure)
        self.store = FactorStore(folder)
        self.factors: dict[str, Factors] = {}
        self.original = {
            site.name: (self.subject.weight(site), self.subject.bias(site)) for site in self.structure.sites
        }
        method, storage = ChosenMethod(METHODS.get("afm"), NoOptions()), STORAGES.get("two-factor")
        walk = BlockWalk(self.model, self.structure, token_blocks(16, 20, seed=1), 4)
        for layer in range(self.structure.num_layers):
            statistics = collect(walk, method.method.inputs, 4)[0]
            found = {}
            for site in self.structure.of_layer(layer):
                if site.type != "v":
                    known = statistics[site.input_group]
                    weight, _ = self.original[site.name]
                    top = storage.max_rank(site, 2)
                    found[site.name] = method.prepare(weight, method.metric(known), known, top)
            self.store.save(layer, found)
            self.factors |= found
        # Every other matrix stays dense; the others take different ranks.
        names = list(self.factors)
        self.ranks: Ranks = {name: 2 * (1 + i % 3) for i, name in enumerate(names) if i % 4 != 3}

    def elastic(self) -> ElasticModel:
        return ElasticModel(self.subject, self.store)

    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=TOKENS).logits

    def affine(self, name: str, rank: int | None) -> tuple[Tensor, Tensor]:
        """The explicit matrix and bias of a site at a rank, in float64."""
        weight, bias = self.original[name]
        shift = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
        if rank is None:
            return weight.double(), shift
        item = self.factors[name]
        product = item.expand_t[:rank].double().T @ item.reduce[:rank].double()
        assert item.offset is not None
        assert item.coordinates is not None
        lost = item.offset.double() - item.expand_t[:rank].double().T @ item.coordinates[:rank].double()
        return product, shift + lost


@pytest.fixture(scope="module", params=list(KINDS))
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(KINDS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(KINDS["llama"], tmp_path_factory.mktemp("one"))


def test_a_layer_at_a_rank_is_the_explicit_product(shared: Case) -> None:
    with shared.elastic() as elastic:
        for name, layer in elastic.layers.items():
            item = shared.factors.get(name)
            for rank in [None] if item is None else [None, 1, 4, item.max_rank, 2]:
                layer.set_rank(rank)
                assert layer.rank == rank
                matrix, bias = shared.affine(name, rank)
                x = torch.randn(2, 5, matrix.shape[1], generator=torch.Generator().manual_seed(0))
                expected = x.double() @ matrix.T + bias
                torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_the_whole_model_computes_with_the_products(shared: Case) -> None:
    explicit = copy.deepcopy(shared.model)
    by_module: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for site in shared.structure.sites:
        by_module.setdefault(site.module, []).append(shared.affine(site.name, shared.ranks.get(site.name)))
    for name, parts in by_module.items():
        module = explicit.base_model.get_submodule(name)
        matrix = torch.cat([part[0] for part in parts]).float()
        module.weight = nn.Parameter(matrix.T.contiguous() if isinstance(module, Conv1D) else matrix)
        module.bias = nn.Parameter(torch.cat([part[1] for part in parts]).float())
    with torch.no_grad():
        expected = explicit(input_ids=TOKENS).logits
    dense = shared.logits()
    with shared.elastic() as elastic:
        elastic.set_ranks(shared.ranks)
        found = shared.logits()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
        assert not torch.allclose(found, dense, rtol=0, atol=1e-2 * float(dense.abs().max()))
        # To and fro: the same ranks give the same numbers, no rank gives the original's.
        elastic.set_ranks({name: 1 for name in shared.factors})
        assert not torch.equal(shared.logits(), found)
        elastic.set_ranks(shared.ranks)
        assert torch.equal(shared.logits(), found)
        elastic.set_ranks({})
        assert torch.equal(shared.logits(), dense)


def test_the_model_is_restored_exactly(shared: Case) -> None:
    before = dict(shared.model.named_modules())
    parameters = {name: (p, p.data_ptr(), p.clone()) for name, p in shared.model.named_parameters()}
    dense = shared.logits()
    elastic = shared.elastic()
    with elastic:
        elastic.set_ranks(shared.ranks)
        shared.logits()
        inside = dict(shared.model.named_modules())
        assert any(isinstance(module, ElasticLinear) for module in inside.values())
    after = dict(shared.model.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())
    for name, parameter in shared.model.named_parameters():
        same, pointer, value = parameters[name]
        assert parameter is same
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, value)
    assert torch.equal(shared.logits(), dense)
    assert elastic.layers == {}


def test_the_model_is_restored_after_an_error_too(llama: Case) -> None:
    before = dict(llama.model.named_modules())

    def interrupted() -> None:
        with llama.elastic() as elastic:
            elastic.set_ranks(llama.ranks)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    after = dict(llama.model.named_modules())
    assert all(after[name] is module for name, module in before.items())


def test_a_damaged_store_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    case = Case(KINDS["llama"], tmp_path)
    case.store.path(1).write_bytes(b"damaged")
    before = dict(case.model.named_modules())
    with pytest.raises(ResumeError, match="block-00001"), case.elastic():
        pass
    after = dict(case.model.named_modules())
    assert all(after[name] is module for name, module in before.items())


def test_ranks_that_there_are_no_factors_for_are_refused(llama: Case) -> None:
    with llama.elastic() as elastic:
        name, item = next(iter(llama.factors.items()))
        layer = elastic.layers[name]
        layer.set_rank(2)
        top = item.max_rank
        for rank in (top + 1, 0, -2):
            with pytest.raises(ValueError, match=f"rank {rank} of a matrix whose highest factored rank is {top}"):
                layer.set_rank(rank)
        assert layer.rank == 2
        dense = next(site.name for site in llama.structure.sites if site.type == "v")
        with pytest.raises(ValueError, match="highest factored rank is None"):
            elastic.set_ranks({dense: 2})


def test_a_rank_is_a_view_of_the_factors(shared: Case) -> None:
    with shared.elastic() as elastic:
        for layer in elastic.layers.values():
            item = layer.factors
            if item is None:
                continue
            for rank in (1, 3, item.max_rank):
                layer.set_rank(rank)
                assert layer._slices is not None
                reduce, expand, _ = layer._slices
                assert reduce.data_ptr() == item.reduce.data_ptr()
                assert expand.data_ptr() == item.expand_t.data_ptr()
                assert reduce.shape == (rank, item.reduce.shape[1])
                assert expand.shape == (item.expand_t.shape[1], rank)
                # Contiguous as the kernels like it: rows of A, and rows of B's transpose.
                assert reduce.is_contiguous()
                assert expand.T.is_contiguous()


def test_the_dense_weights_are_the_model_s_own(shared: Case) -> None:
    memory = {p.untyped_storage().data_ptr() for p in shared.model.parameters()}
    with shared.elastic() as elastic:
        for layer in elastic.layers.values():
            assert layer.weight.untyped_storage().data_ptr() in memory
            assert list(layer.parameters()) == []
