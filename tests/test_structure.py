"""What the decoder inspection finds in every family, and what it refuses."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, MixtralConfig, PreTrainedModel

from bolaco.errors import UnsupportedModelError
from bolaco.models.find import inspect_structure, meta_model
from bolaco.models.labels import layer_of, type_of, types_of
from bolaco.models.lowrank import config_class, model_classes
from bolaco.models.structure import Structure, stacked
from bolaco.models.subject import Subject
from bolaco.storage.budget import Budget, Ranks
from bolaco.storage.storage import STORAGES
from tests.models import FAMILIES, build, compress_tiny, tiny_llama, token_blocks

TWO_FACTOR = STORAGES.get("two-factor")
GATED = ("q", "k", "v", "o", "gate", "up", "down")
PLAIN = ("q", "k", "v", "o", "up", "down")
FUSED = {"phi3", "gpt2"}

families = pytest.mark.parametrize("family", FAMILIES)


def expected_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """``[out, in]`` of each matrix type, from the configuration alone."""
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    ffn = next(getattr(config, name) for name in ("intermediate_size", "ffn_dim", "n_inner") if hasattr(config, name))
    head = getattr(config, "head_dim", None) or width // heads
    q, kv = heads * head, getattr(config, "num_key_value_heads", heads) * head
    return {
        **{"q": (q, width), "k": (kv, width), "v": (kv, width), "o": (width, q)},
        **{"gate": (ffn, width), "up": (ffn, width), "down": (width, ffn)},
    }


@families
def test_types_shapes_and_order(family: str) -> None:
    model = FAMILIES[family]()
    structure = inspect_structure(model)
    shapes = expected_shapes(model)
    types = PLAIN if model.config.model_type in ("gpt2", "opt") else GATED
    assert structure.num_layers == model.config.num_hidden_layers
    assert [(s.layer, s.type) for s in structure.sites] == [(i, t) for i in range(structure.num_layers) for t in types]
    assert [(s.out_features, s.in_features) for s in structure.sites] == [
        shapes[t] for _ in range(structure.num_layers) for t in types
    ]


@families
def test_every_matrix_of_the_blocks_is_a_site(family: str) -> None:
    model = FAMILIES[family]()
    structure = inspect_structure(model)
    matrices = [p for block in structure.block_modules(model) for p in block.parameters() if p.ndim == 2]
    assert structure.kept == ()
    assert sum(site.size for site in structure.sites) == sum(p.numel() for p in matrices)
    assert len({site.module for site in structure.sites}) == len(matrices)


@families
def test_the_modules_of_a_block_hold_all_its_matrices(family: str) -> None:
    structure = inspect_structure(FAMILIES[family]())
    for layer in range(structure.num_layers):
        for whole in (structure, stacked(structure)):
            modules = whole.modules(layer)
            assert [site for sites in modules.values() for site in sites] == structure.of_layer(layer)
            assert all(site.module == name for name, sites in modules.items() for site in sites)


@families
def test_names_lead_to_the_modules_of_the_causal_model(family: str) -> None:
    model = FAMILIES[family]()
    structure = inspect_structure(model)
    assert len({site.name for site in structure.sites}) == len(structure.sites)
    fused = Counter(site.module for site in structure.sites)
    assert (max(fused.values()) > 1) == (family in FUSED)
    for site in structure.sites:
        assert (site.part is not None) == (fused[site.module] > 1)
        name = site.name if site.part is None else site.name.removesuffix(f".{site.part}")
        assert model.get_submodule(name) is model.base_model.get_submodule(site.module)


@families
def test_weights_are_what_the_modules_compute(family: str) -> None:
    model = FAMILIES[family]().double()
    structure = inspect_structure(model)
    subject = Subject(model, structure)
    draw = torch.Generator().manual_seed(0)
    for name in dict.fromkeys(site.module for site in structure.sites):
        sites = [site for site in structure.sites if site.module == name]
        x = torch.randn(5, sites[0].in_features, dtype=torch.float64, generator=draw)
        with torch.no_grad():
            whole = model.base_model.get_submodule(name)(x)
        end = 0
        for site in sites:
            weight, bias = subject.weight(site), subject.bias(site)
            assert weight.shape == (site.out_features, site.in_features)
            assert site.bias == (bias is not None)
            assert site.rows == (end, end + site.out_features)
            end = site.rows[1]
            by_hand = x @ weight.T + (0 if bias is None else bias)
            torch.testing.assert_close(by_hand, whole[:, slice(*site.rows)], rtol=1e-12, atol=1e-12)
        assert end == whole.shape[1]


@pytest.mark.parametrize(
    ("family", "kind", "next_kind"), [("phi3", "v", "o"), ("gpt2", "v", "o"), ("phi3", "up", "down")]
)
def test_parts_of_fused_projections_are_what_they_are_called(family: str, kind: str, next_kind: str) -> None:
    """The input of o is linear in v, that of down linear in up: negating the one negates the other, and no other part
    does that."""
    model = FAMILIES[family]()
    structure = inspect_structure(model)
    subject = Subject(model, structure)
    sites = {site.type: site for site in structure.of_layer(0)}
    seen: list[torch.Tensor] = []
    model.base_model.get_submodule(sites[next_kind].module).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )

    def run(negated: str | None) -> torch.Tensor:
        with torch.no_grad():
            if negated is not None:
                for part in (subject.weight(sites[negated]), subject.bias(sites[negated])):
                    if part is not None:
                        part.neg_()
            model(token_blocks(1, 16))
        return seen.pop()

    plain = run(None)
    torch.testing.assert_close(run(kind), -plain)
    run(kind)  # and back
    for other in sites:
        if sites[other].module == sites[kind].module and other != kind:
            assert not torch.allclose(run(other), -plain, atol=1e-3)
            run(other)


@families
def test_meta_device_gives_the_same_structure(family: str) -> None:
    model = FAMILIES[family]()
    on_meta = meta_model(model.config)
    assert next(on_meta.parameters()).device.type == "meta"
    assert inspect_structure(on_meta) == inspect_structure(model)


def test_matrices_of_fused_experts_are_sites() -> None:
    config = MixtralConfig(
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
    )
    structure = inspect_structure(meta_model(config))
    experts = [site for site in structure.of_layer(1) if site.expert is not None]
    shapes = {"experts.gate_up": (96, 32), "experts.down": (32, 48)}
    found = {(s.name, s.type, s.expert, (s.out_features, s.in_features)) for s in experts}
    assert found == {
        (f"model.layers.1.mlp.{kind}_proj.{i}", kind, i, shape) for kind, shape in shapes.items() for i in range(4)
    }
    assert {site.tie for site in experts} == {(1, kind) for kind in shapes}
    assert [(kept.name, kept.reason, kept.size) for kept in structure.kept] == [
        ("mlp.gate.weight", "router", 2 * 4 * 32)
    ]


def test_a_linear_of_any_name_is_a_site_of_that_name() -> None:
    model = tiny_llama()
    model.base_model.layers[1].self_attn.extra_proj = nn.Linear(32, 16)
    (site,) = [site for site in inspect_structure(model).sites if site.type not in GATED]
    assert (site.type, site.layer, site.out_features, site.in_features) == ("self_attn.extra_proj", 1, 16, 32)
    assert site.input_group == "self_attn.extra_proj"


def test_what_no_linear_holds_stays_dense_and_is_listed() -> None:
    model = tiny_llama()
    model.base_model.layers[0].mlp.table = nn.Parameter(torch.zeros(3, 5))
    model.base_model.layers[0].self_attn.q_proj = nn.Bilinear(4, 8, 32)
    model.base_model.layers[1].mlp.thin = nn.Linear(32, 4)
    model.base_model.layers[1].mlp.conv = nn.Conv1d(32, 32, 3, groups=32)
    structure = inspect_structure(model)
    assert {(kept.name, kept.size, kept.reason) for kept in structure.kept} == {
        ("mlp.table", 15, "no linear module"),
        ("self_attn.q_proj.weight", 4 * 8 * 32, "no linear module"),
        ("mlp.thin", 128, "small"),
        ("mlp.conv.weight", 96, "convolution"),
    }
    assert structure.size == sum(p.numel() for p in model.base_model.layers.parameters())


def test_a_fused_projection_of_another_layout_is_one_matrix() -> None:
    model = build("phi3", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model.base_model.layers[0].self_attn.qkv_proj = nn.Linear(32, 100, bias=False)
    (site,) = [site for site in inspect_structure(model).sites if "qkv" in site.name]
    assert (site.type, site.part, site.rows) == ("self_attn.qkv_proj", None, (0, 100))


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("attention.dense", ("o",)),
        ("self_attention.query_key_value", ("self_attention.query_key_value",)),
        ("attention.self.query", ("q",)),
        ("attention.output.dense", ("o",)),
        ("feed_forward.w2", ("down",)),
        ("mlp.dense_h_to_4h", ("up",)),
        ("mixer.in_proj", ("mixer.in_proj",)),
        ("mlp.experts.12.w1", ("experts.w1",)),
        ("mlp.experts.gate_up_proj.3", ("experts.gate_up",)),
        ("block_sparse_moe.experts.down_proj.0", ("experts.down",)),
        ("mlp.shared_experts.up_proj", ("shared_experts.up",)),
    ],
)
def test_types_from_names(name: str, types: tuple[str, ...]) -> None:
    assert types_of(name) == types
    assert type_of(f"model.layers.7.{name}") == types[0]
    assert layer_of(f"model.layers.7.{name}") == 7


def test_encoder_decoder_is_refused() -> None:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=96, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **layers)
    with torch.device("meta"):
        model = BartForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match="an encoder-decoder"):
        inspect_structure(model)


def test_model_without_attention_blocks_is_refused() -> None:
    model = tiny_llama()
    model.base_model.layers = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(UnsupportedModelError, match="no list of decoder blocks"):
        inspect_structure(model)


def test_compressed_model_is_refused(tmp_path: Path) -> None:
    values = copy.deepcopy(tiny_llama().config).to_dict() | {"model_type": "lowrank_llama"}
    entry = {"kind": "two-factor", "out": 32, "rank": 4, "bias": True}
    values["lowrank"] = {"format": 2, "matrices": {"layers.0.self_attn.q_proj": entry}}
    model = model_classes("llama")[1](config_class("llama").from_dict(values))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        inspect_structure(model)
    with pytest.raises(UnsupportedModelError, match="compressed already"):
        compress_tiny(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _llama2(hidden: int, ffn: int, layers: int, heads: int) -> tuple[PreTrainedModel, Structure]:
    config = LlamaConfig(
        **{"vocab_size": 32000, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "max_position_embeddings": 4096, "tie_word_embeddings": False},
    )
    model = meta_model(config)
    return model, inspect_structure(model)


def _ranks(structure: Structure, by_type: dict[str, int]) -> Ranks:
    return {site.name: by_type.get(site.type) for site in structure.sites}


def test_published_allocation_of_llama2_7b() -> None:
    """The 5x1 allocation of arXiv 2405.10616 at 20%, in this project's parameter arithmetic."""
    model, structure = _llama2(4096, 11008, 32, 32)
    budget = Budget(structure.sites, 0.8, TWO_FACTOR)
    assert budget.total == 6_476_005_376
    ranks = _ranks(structure, {"q": 744, "k": 744, "o": 1616, "gate": 2512, "up": 2408})
    assert budget.ratio(ranks) == pytest.approx(0.7985, abs=0.0005)
    assert budget.cost(ranks) <= budget.limit
    whole = sum(p.numel() for p in model.parameters())
    assert whole == 6_738_415_616
    assert whole - budget.total + budget.cost(ranks) == pytest.approx(5.44e9, abs=0.01e9)


def test_published_allocation_of_llama2_13b() -> None:
    """The allocation [696, 1920, 2304, dense, 2504] comes to 0.7, whichever of the three equal matrices is dense."""
    _, structure = _llama2(5120, 13824, 40, 40)
    budget = Budget(structure.sites, 0.7, TWO_FACTOR)
    assert budget.total == 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    ranks = _ranks(structure, {"q": 696, "k": 696, "o": 1920, "gate": 2304, "down": 2504})
    assert budget.ratio(ranks) == pytest.approx(0.69986, abs=0.00005)
    assert budget.cost(ranks) <= budget.limit
