"""Mixtures of experts: statistics of each one, ranks, layers, files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from bolaco.api import compare
from bolaco.checkpoint.export import export_dense
from bolaco.factorize import InputMetric, OutputMetric, low_rank
from bolaco.layers import (
    EachExpert,
    FollowerLinear,
    GroupedExperts,
    LeadLinear,
    LowRankLinear,
    PivotedLinear,
    RoutedExperts,
    put_module,
)
from bolaco.models.experts import experts_of, together, unfused
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model
from bolaco.models.observe import observed
from bolaco.models.structure import all_experts
from bolaco.report.tables import experts_table
from bolaco.statistics.backward import gradient_walk
from bolaco.statistics.fisher import FISHER
from bolaco.statistics.forward import collect, input_walk
from bolaco.statistics.gradient import GRADIENT
from bolaco.statistics.magnitude import MAGNITUDE
from bolaco.statistics.moments import MOMENTS, PooledMoments, pooled_moments
from bolaco.statistics.symmetric import BlockDiagonal
from bolaco.storage.block import linear, low_rank_linear
from bolaco.storage.storage import STORAGES
from tests.models import TINY, compress_tiny, save_tiny, slow, text_file, tiny_tokenizer
from tests.types import of_type, tokens_for

# Fused in both orientations, with and without biases and gates, dense and sorted dispatch, experts without matrices.
FORMS = ("mixtral", "gpt_oss", "nemotron_h", "llama4_text", "jetmoe", "longcat_flash")
QUICK = {"refinement.steps": 0, "search.rank_multiple": 4}


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def close(actual, expected, share=1e-4):
    return float((actual - expected).abs().max()) <= share * float(expected.abs().max())


# --- taken apart and put together ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FORMS)
def test_taken_apart_they_compute_the_same_and_share_all_tensors(family):
    model = of_type(family)
    tokens = tokens_for(model)
    expected, before = logits(model, tokens), {name: p.clone() for name, p in model.named_parameters()}
    apart = unfused(model)
    assert apart is not model
    assert any(isinstance(module, EachExpert) for module in apart.modules())
    assert close(logits(apart, tokens), expected)
    places = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert all(p.untyped_storage().data_ptr() in places for p in apart.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_without_experts_is_not_copied():
    model = of_type("llama")
    assert unfused(model) is model


@pytest.mark.parametrize("storage", ["two-factor", "pivoted"])
@pytest.mark.parametrize("family", FORMS)
def test_full_rank_reproduces_every_expert(family, storage):
    """In one layer for all of them, and in one each."""
    model = of_type(family)
    tokens = tokens_for(model)
    expected, apart = logits(model, tokens), unfused(model)
    original, form = copy.deepcopy(apart), STORAGES.get(storage)
    for site in inspect_structure(apart).sites:
        if site.expert is None:
            continue
        old = apart.base_model.get_submodule(site.module)
        left, values, right = torch.linalg.svd(old.weight.double(), full_matrices=False)
        # Pivoted storage has no full rank: nothing is dependent.
        rank = len(values) - (storage == "pivoted")
        layer = low_rank_linear((left * values)[:, :rank].float(), right[:rank].float(), old.bias)
        if storage == "pivoted":
            cut = linear(((left * values)[:, :rank] @ right[:rank]).float(), old.bias)
            put_module(original.base_model, site.module, cut)
        put_module(apart.base_model, site.module, form.pack(layer))
    if storage == "pivoted":
        expected = logits(original, tokens)
    assert close(logits(apart, tokens), expected, 1e-3)
    for name, experts in list(experts_of(apart.base_model)):
        put_module(apart.base_model, name, together(experts, unfused(model).base_model.get_submodule(name)))
    grouped = [module for module in apart.modules() if isinstance(module, GroupedExperts)]
    kind = PivotedLinear if storage == "pivoted" else LowRankLinear
    assert grouped
    assert all(isinstance(module.layer, kind) for module in grouped)
    assert close(logits(apart, tokens), expected, 1e-3)


def test_unchanged_experts_are_the_module_they_were():
    model = of_type("gpt_oss")
    apart = unfused(model)
    for name, experts in experts_of(apart.base_model):
        stored, before = together(experts, experts), model.base_model.get_submodule(name)
        assert type(stored) is type(before)
        assert all(p is q for p, q in zip(stored.parameters(), before.parameters(), strict=True))


def test_layers_that_are_not_alike_stay_apart():
    layers = [low_rank_linear(torch.randn(8, rank), torch.randn(rank, 6), None) for rank in (2, 3)]
    experts = EachExpert(layers)
    x = torch.randn(5, 6)
    expected = torch.cat([layers[0](x[:4]), layers[1](x[4:])])
    stored = together(experts, EachExpert([nn.Linear(6, 8, bias=False) for _ in range(2)]))
    assert isinstance(stored, EachExpert)
    assert torch.equal(stored(x, [4, 1]), expected)
    assert stored(x[:0], [0, 0]).shape == (0, 8)


def test_one_expert_of_grouped_ones_is_the_layer_it_was():
    layers = [low_rank_linear(torch.randn(8, 3), torch.randn(3, 6), torch.randn(8)) for _ in range(4)]
    grouped = GroupedExperts.of([copy.deepcopy(layer) for layer in layers])
    x = torch.randn(9, 6)
    sizes = [4, 0, 3, 2]
    expected = torch.cat([layer(run) for layer, run in zip(layers, x.split(sizes), strict=True)])
    torch.testing.assert_close(grouped(x, sizes), expected)
    for index, layer in enumerate(layers):
        assert torch.equal(grouped.expert(index)(x), layer(x))


class Squared(nn.Module):
    """A layer that knows nothing of experts."""

    def __init__(self, weight):
        super().__init__()
        self.in_features, self.weight = weight.shape[1], nn.Parameter(weight)

    def forward(self, x):
        return (x @ self.weight.T) ** 2

    def entry(self):
        return {"kind": "squared"}


def test_a_layer_of_a_package_is_called_for_one_expert_after_the_other():
    layers = [Squared(torch.randn(5, 6)) for _ in range(3)]
    x, sizes = torch.randn(7, 6), [3, 0, 4]
    expected = torch.cat([layers[0](x[:3]), layers[2](x[3:])])
    torch.testing.assert_close(GroupedExperts.of(layers)(x, sizes), expected)


# --- statistics ---------------------------------------------------------------------------------------------------


def test_moments_of_routed_tokens_add_up_to_those_of_all():
    x = torch.randn(60, 7, dtype=torch.float64) + 2
    owner = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(0))
    parts, whole = [], PooledMoments(7)
    whole.update(x)
    for expert in range(4):
        part = PooledMoments(7)
        part.update(x[owner == expert])
        parts.append(part.finalize())
    pooled, expected = pooled_moments(parts), whole.finalize()
    assert pooled.count == 60
    torch.testing.assert_close(pooled.mean, expected.mean)
    torch.testing.assert_close(pooled.second_moment, expected.second_moment)
    added = sum(part.second_moment * part.count for part in parts) / 60
    torch.testing.assert_close(added, expected.second_moment)


@pytest.mark.parametrize("common", [True, False])
def test_an_expert_with_few_tokens_leans_on_the_others(common):
    """As if it had seen as many tokens more as its input has dimensions."""
    x = torch.randn(40, 5, dtype=torch.float64) + 1
    runs = [x[:30], x[30:], x[:0], x[:1]]
    values = []
    for run in runs:
        part = PooledMoments(5)
        part.update(run)
        values.append(part.finalize() if len(run) > 1 else None)
    found = MOMENTS.of_experts(values, [30, 10, 0, 1], common, 5)
    second = x.T @ x / 40
    prior = second if common else torch.eye(5, dtype=torch.float64) * second.diagonal().mean()
    mean = x.mean(dim=0) if common else torch.zeros(5, dtype=torch.float64)
    for value, run, own in zip(found, runs, values, strict=True):
        n = 0 if own is None else len(run)
        torch.testing.assert_close(value.second_moment, (n * _second(run, n) + 5 * prior) / (n + 5))
        torch.testing.assert_close(value.mean, ((run.sum(dim=0) if n else 0) + 5 * mean) / (n + 5))
    with pytest.raises(ValueError, match="no expert"):
        MOMENTS.of_experts([None, None], [0, 0], common, 5)


def _second(run, n):
    return run.T @ run / n if n else torch.zeros(5, 5, dtype=torch.float64)


def test_mean_magnitudes_of_experts():
    values = [torch.tensor([1.0, 3.0]), None]
    found = MAGNITUDE.of_experts(values, [9, 0], True, 2)
    assert torch.equal(found[0], values[0])
    assert torch.equal(found[1], values[0])
    own = MAGNITUDE.of_experts([torch.tensor([1.0, 3.0]), None], [1, 0], False, 2)
    torch.testing.assert_close(own[0], torch.tensor([1.5, 2.5]))
    assert torch.equal(own[1], torch.tensor([2.0, 2.0]))


def test_gradients_of_experts_are_per_token_of_the_text():
    plenty = torch.diag(torch.tensor([4.0, 2.0], dtype=torch.float64))
    found = GRADIENT.of_experts([plenty, None], [1000, 0], 2000, True)
    torch.testing.assert_close(found[0], plenty * (1000 * 1 + 2) / 1002 / 2)
    torch.testing.assert_close(found[1], plenty / 2000)
    (inner, _) = GRADIENT.of_experts([plenty, None], [2, 0], 10, False)
    torch.testing.assert_close(inner, (plenty * 2 + 3 * torch.eye(2, dtype=torch.float64) * 2) / 4 * 2 / 10)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", slow("jetmoe"), slow("longcat_flash")])
def test_weight_fisher_carries_the_weight_of_the_router(family):
    """Against autograd through the fused model, sequence by sequence."""
    model = of_type(family)
    tokens, working = tokens_for(model, 2, 10), unfused(model)
    structure = observed(working, inspect_structure(working))
    expected = dict.fromkeys((site.name for site in structure.sites if site.expert is not None), 0.0)
    for sequence in tokens:
        model.zero_grad()
        model(input_ids=sequence[None], labels=sequence[None], use_cache=False)
        loss = model(input_ids=sequence[None], use_cache=False).logits[0, :-1].float()
        nn.functional.cross_entropy(loss, sequence[1:], reduction="sum").backward()
        for site in structure.sites:
            if site.expert is None:
                continue
            owner, _, index = site.module.rpartition(".")
            name = owner if owner.endswith("_proj") else f"{owner}.weight"
            gradient = model.base_model.get_parameter(name).grad[int(index)].double()
            # [in, out] of gpt-oss.
            gradient = gradient.T if gradient.shape != (site.out_features, site.in_features) else gradient
            if family == "gpt_oss" and site.out_features == site.in_features:
                pytest.fail("the orientation cannot be told")
            expected[site.name] = expected[site.name] + gradient.square().sum(dim=0) / len(tokens)
    found = {}
    for _, values in gradient_walk(working, structure, tokens, 2, FISHER).run():
        found |= values
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-4 * float(value.norm()) + 1e-12, name


def test_statistics_of_llama_4_leave_out_tokens_that_are_not_an_expert_s():
    model = of_type("llama4_text")
    tokens, working = tokens_for(model, 2, 10), unfused(model)
    structure = observed(working, inspect_structure(working))
    walk = input_walk(working, structure, tokens, 2)
    counts = {}
    while walk.layer < structure.num_layers:
        layer = walk.layer
        for found in collect(walk, [MOMENTS], 1):
            sites = [site for site in structure.of_layer(layer) if site.type == "experts.gate_up"]
            counts[layer] = [found[site.input_group].tokens for site in sites]
    chosen = model.config.num_experts_per_tok
    assert {sum(found) for found in counts.values() if found} == {chosen * tokens.numel()}


@pytest.mark.parametrize("rows", [5, 40])
def test_a_metric_of_blocks_is_that_of_the_whole(rows):
    """For tall stacks, and for wide ones."""
    draw = torch.Generator().manual_seed(0)
    halves = [torch.randn(rows, rows, dtype=torch.float64, generator=draw) for _ in range(3)]
    blocks = [half @ half.T for half in halves]
    weight = torch.randn(3 * rows, 24, dtype=torch.float64, generator=draw)
    inputs = InputMetric(torch.diag(torch.rand(24, dtype=torch.float64, generator=draw) + 0.1))
    one = low_rank(weight, inputs, 6, output=OutputMetric(torch.block_diag(*blocks), 0.1))
    other = low_rank(weight, inputs, 6, output=OutputMetric(BlockDiagonal(tuple(blocks)), 0.1))
    torch.testing.assert_close(one.spectrum, other.spectrum)
    torch.testing.assert_close(one.product(6), other.product(6))


def test_the_gradients_of_many_stacked_matrices_stay_blocks(monkeypatch):
    blocks = [torch.eye(3, dtype=torch.float64) * i for i in range(4)]
    assert torch.equal(GRADIENT.stack(blocks), torch.block_diag(*blocks))
    monkeypatch.setattr("bolaco.statistics.gradient._LARGE", 11)
    stacked = GRADIENT.stack(blocks)
    assert isinstance(stacked, BlockDiagonal)
    assert torch.equal(stacked.dense(), torch.block_diag(*blocks))


# --- runs ---------------------------------------------------------------------------------------------------------


def test_identical_experts_compress_like_one(tmp_path: Path):
    model = of_type("mixtral")
    for module in model.modules():
        for name in ("gate_up_proj", "down_proj"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                getattr(module, name).data[:] = getattr(module, name).data[:1].clone()
    run = compress_tiny(model, tmp_path / "out", preset="default", method="svd", options=QUICK)
    loaded = load_model(str(run.path))
    grouped = [module for module in loaded.modules() if isinstance(module, GroupedExperts)]
    assert grouped
    for module in grouped:
        for tensor in module.layer.state_dict().values():
            assert torch.equal(tensor, tensor[:1].expand_as(tensor))


@pytest.fixture(scope="module")
def lonely(tmp_path_factory):
    """A model, compressed, whose last expert is sent nothing."""
    model = of_type("glm4_moe")
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer[-1] = -1e9
    out = tmp_path_factory.mktemp("lonely") / "out"
    return compress_tiny(model, out, preset="default", options=QUICK)


def test_an_expert_without_tokens_is_compressed_and_named(lonely):
    tokens = lonely.info.tokens_per_expert
    last = {name: count for name, count in tokens.items() if name.endswith(".3")}
    assert last
    assert set(last.values()) == {0}
    assert min(count for name, count in tokens.items() if name not in last) > 0
    assert lonely.info.keep_linears <= 0.7
    loaded = load_model(str(lonely.path))
    assert all(torch.isfinite(p).all() for p in loaded.parameters())
    table = experts_table(tokens)
    assert list(table.columns[-1].cells) == ["1"] * table.row_count


def test_an_expert_without_tokens_has_the_statistics_of_all(lonely):
    """Of their inputs together before its first matrix, of their mean square before the second."""
    working = unfused(lonely.original)
    structure = observed(working, inspect_structure(working))
    walk = input_walk(working, structure, tokens_for(lonely.original, 4, 20), 2)
    found, seen = {}, 0
    while walk.layer < structure.num_layers:
        for values in collect(walk, [MOMENTS], 1):
            found.update({(seen, name): value for name, value in values.items()})
            seen += 1
    last = [site for site in structure.sites if site.expert == 3]
    assert {site.type for site in last} == {"experts.gate_up", "experts.down"}
    for site in last:
        value = found[site.layer, site.input_group]
        assert value.tokens == 0
        second = value[MOMENTS].second_moment
        plain = torch.eye(len(second), dtype=second.dtype) * second.diagonal().mean()
        if site.type == "experts.down":
            torch.testing.assert_close(second, plain)
        else:
            assert float((second - plain).norm()) > 0.3 * float(second.norm())
            pooled = found[site.layer, all_experts(site.type)][MOMENTS].second_moment
            torch.testing.assert_close(second, pooled)


def test_methods_side_by_side(tmp_path: Path):
    options = {k: v for k, v in TINY.items() if k.startswith("calibration.")} | {"evaluation.windows": 2}
    found = compare(
        of_type("mixtral"),
        ["svd", "afm"],
        [0.7],
        tmp_path / "out",
        tokenizer=tiny_tokenizer(),
        calibration=str(text_file()),
        options=options | {"search.rank_multiple": 4},
    )
    assert len(found.record.rows) == 2
    assert all(row.keep_linears <= 0.7 for row in found.record.rows)


@pytest.mark.parametrize("family", ["mixtral", slow("gpt_oss"), slow("nemotron_h")])
def test_one_input_factor_for_all_experts(family, tmp_path: Path):
    model = of_type(family)
    options = {**QUICK, "search.dense_types": ["q", "k", "v", "o"]}
    run = compress_tiny(
        model,
        tmp_path / "out",
        preset="default",
        method="svd-llm",
        storage="shared",
        search="spectral",
        options=options,
    )
    loaded = load_model(str(run.path))
    experts = [module for module in loaded.modules() if isinstance(module, EachExpert)]
    factored = [module for module in experts if isinstance(module[0], LeadLinear)]
    assert factored
    for module in factored:
        assert all(isinstance(layer, FollowerLinear) and layer.lead is module[0] for layer in list(module)[1:])
    assert run.info.parameters == sum(p.numel() for p in loaded.parameters())
    assert run.info.parameters_linears <= 0.7 * run.info.parameters_linears_dense
    idle = sum(
        p.numel() * (1 - model.config.num_experts_per_tok / len(module))
        for module in experts
        for name, p in module.named_parameters()
        if not name.endswith("bias") and "reduce" not in name
    )
    # What the second matrices have of their own, and whatever stayed dense.
    for module in (module for module in loaded.modules() if isinstance(module, GroupedExperts)):
        share = 1 - model.config.num_experts_per_tok / module.experts
        idle += sum(p.numel() * share for name, p in module.named_parameters() if not name.endswith("bias"))
    assert run.info.parameters_active == pytest.approx(run.info.parameters - idle, abs=2)


def test_active_parameters(lonely):
    info, config = lonely.info, lonely.original.config
    share = config.num_experts_per_tok / config.n_routed_experts
    experts = sum(p.numel() for n, p in lonely.original.named_parameters() if ".mlp.experts." in n)
    assert info.parameters_dense == sum(p.numel() for p in lonely.original.parameters())
    assert info.parameters_active_dense == pytest.approx(info.parameters_dense - experts * (1 - share), abs=1)
    loaded = load_model(str(lonely.path))
    grouped = [module for module in loaded.modules() if isinstance(module, RoutedExperts)]
    stored = sum(p.numel() for module in grouped for n, p in module.named_parameters() if not n.endswith("bias"))
    assert info.parameters_active == pytest.approx(info.parameters - stored * (1 - share), abs=1)


def test_routers_are_as_they_were(lonely):
    loaded = dict(load_model(str(lonely.path)).named_parameters())
    routers = {name: p for name, p in lonely.original.named_parameters() if name.endswith("mlp.gate.weight")}
    assert routers
    assert all(torch.equal(loaded[name], p) for name, p in routers.items() if p.ndim == 2 and len(p) == 4)
    assert any(kept.reason == "router" for kept in lonely.info.kept)


def test_experts_of_a_block_have_one_rank(lonely):
    ranks = {}
    for name, rank in lonely.info.ranks.items():
        owner, _, index = name.rpartition(".")
        if index.isdigit():
            ranks.setdefault(owner, set()).add(rank)
    assert ranks
    assert all(len(found) == 1 for found in ranks.values())


def test_a_rank_for_each_expert(tmp_path: Path):
    """WeLore's threshold gives every matrix its own."""
    model = of_type("mixtral")
    for parameter in model.parameters():
        if parameter.ndim == 3:  # spectra that differ
            parameter.data[0] = torch.outer(parameter.data[0, :, 0], parameter.data[0, 0]) + 0.01 * parameter.data[0]
    run = compress_tiny(model, tmp_path / "out", preset="default", method="svd", search="welore", options=QUICK)
    ranks = {name: rank for name, rank in run.info.ranks.items() if name.rpartition(".")[2].isdigit()}
    assert len(set(ranks.values())) > 1
    loaded = load_model(str(run.path))
    assert any(isinstance(module, EachExpert) for module in loaded.modules())
    assert loaded.config.lowrank["matrices"]
    assert run.info.keep_linears <= 0.7


@pytest.mark.parametrize("family", ["gpt_oss", slow("mixtral"), "jetmoe", slow("llama4_text"), slow("longcat_flash")])
def test_export_makes_them_dense_again(family, tmp_path: Path):
    model = of_type(family)
    run = compress_tiny(model, tmp_path / "out", preset="default", method="svd", options=QUICK)
    export_dense(str(run.path), tmp_path / "dense")
    tokens = tokens_for(model)
    dense = load_model(str(tmp_path / "dense"))
    assert type(dense) is type(model)
    assert close(logits(dense, tokens), logits(load_model(str(run.path)), tokens))


def test_the_dense_folder_compresses_like_the_model(tmp_path: Path):
    """Through files, as a user has them."""
    model = of_type("qwen3_moe")
    folder = save_tiny(tmp_path / "model", model)
    here = compress_tiny(model, tmp_path / "a", preset="default", method="svd", options=QUICK)
    there = compress_tiny(load_model(str(folder)), tmp_path / "b", preset="default", method="svd", options=QUICK)
    assert (here.path / "model.safetensors").read_bytes() == (there.path / "model.safetensors").read_bytes()


# --- one input factor for all experts, priced beside one for each -------------------------------------------------


def one_row_space(model, own: float):
    """The first matrices of every block's experts in one space of 6 inputs, with ``own`` times as much outside it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("experts.gate_up_proj"):
                experts, out, width = tensor.shape
                common = torch.randn(experts, out, 6) @ torch.randn(6, width)
                tensor.copy_(common / common.std() + own * torch.randn(tensor.shape)).mul_(0.05)
    return model


@pytest.mark.parametrize("storage", ["pivoted", "two-factor"])
def test_the_closed_form_takes_one_input_factor_where_experts_have_one_input_space(storage, tmp_path: Path):
    model, runs = one_row_space(of_type("mixtral"), 0.01), {}
    for shared in (True, False):
        options = QUICK | {"search.shared_experts": shared}
        out = tmp_path / str(shared)
        runs[shared] = compress_tiny(
            model, out, preset="default", search="spectral", storage=storage, keep=0.5, options=options
        )
    assert not runs[False].info.stacks
    info, loaded = runs[True].info, load_model(str(runs[True].path))
    experts = [module for module in loaded.modules() if isinstance(module, EachExpert)]
    assert len(info.stacks) == len(experts) == 2
    for module, stack in zip(experts, info.stacks, strict=True):
        assert isinstance(module[0], LeadLinear)
        assert {info.ranks[name] for name in stack} == {module[0].rank}
        assert all(layer.lead is module[0] for layer in list(module)[1:])
    assert info.parameters == sum(p.numel() for p in loaded.parameters())
    budget = int(0.5 * info.parameters_linears_dense)
    assert budget * 0.98 < info.parameters_linears <= budget
    # The outputs of the experts are nearer: what was saved is spent elsewhere.
    tokens = tokens_for(model)
    expected = logits(model, tokens)
    errors = {shared: (logits(load_model(str(run.path)), tokens) - expected).norm() for shared, run in runs.items()}
    assert errors[True] < errors[False]


def test_experts_of_their_own_have_factors_of_their_own(tmp_path: Path):
    model = of_type("mixtral")
    run = compress_tiny(model, tmp_path / "out", preset="default", search="spectral", keep=0.9, options=QUICK)
    assert not run.info.stacks


def test_a_warm_start_from_experts_with_one_input_factor(tmp_path: Path):
    model = one_row_space(of_type("mixtral"), 0.01)
    default = {"preset": "default", "search": "spectral"}
    first = compress_tiny(model, tmp_path / "first", keep=0.5, options=QUICK, **default)
    assert first.info.stacks
    warm = QUICK | {"search.warm_start": str(first.path)}
    again = compress_tiny(model, tmp_path / "again", keep=0.6, options=warm, **default)
    assert 0.59 < again.info.keep_linears <= 0.6
