"""Weights as codes into tables: packing, k-means and feedback against references, and the mode around them."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bolaco import api
from bolaco.checkpoint.export import export_dense
from bolaco.checkpoint.info import TuningRecord, read_info
from bolaco.errors import RecipeError, UnsupportedModelError
from bolaco.layers import SketchLinear, build_layer
from bolaco.layers.sketch import pack, unpack
from bolaco.models.load import load_model, weights_fingerprint
from bolaco.tune.modes import sketch
from bolaco.tune.tables import Coded, clustering_error, code, coded_layer, inverse_factor, kmeans
from bolaco.tune.trainer import TuneTrainer
from tests.command import digest, ok
from tests.models import FAMILIES, compressed, save_tiny, slow, text_file, tiny_llama, token_blocks

# One batch, again and again, so that its loss has to fall.
SMALL = {"evaluation.windows": 4, "training.autocast": False, "training.warmup": 0, "data.sequences": 4}


def run(model: Path, out: Path, options: dict[str, Any] | None = None, **words: Any) -> TuningRecord:
    given = {"max_steps": 8, "batch": 4, "seq_len": 32, "learning_rate": 3e-3} | words
    result = api.tune(str(model), "sketch", str(text_file()), out, options=SMALL | (options or {}), **given)
    assert result is not None
    assert result.info.tuning is not None
    return result.info.tuning


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=token_blocks(2, 24, seed=8), use_cache=False).logits
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(count: int, dim: int, seed: int = 0) -> Tensor:
    """Inputs of very different sizes that depend on each other."""
    return normal(count, dim, seed=seed) @ (normal(dim, dim, seed=seed + 1) * torch.logspace(-1, 1, dim).double())


def rounded(weight: Tensor, bits: int) -> Tensor:
    """To nearest, on an even grid from the least to the greatest of a row."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return low + ((weight - low) / step).round() * step


def output_error(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return float(((weight - other) @ x.T).square().sum())


# --- codes ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(bits=st.sampled_from([2, 3, 4]), rows=st.integers(0, 5), columns=st.integers(0, 40), seed=st.integers(0, 99))
def test_packing_is_undone(bits: int, rows: int, columns: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), generator=draw, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, bits * -(-columns // 8))  # truly so many bits a code
    back = unpack(packed, bits)
    assert torch.equal(back[:, :columns], codes)
    assert not back[:, columns:].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("columns", "groups"), [(16, 1), (16, 4), (19, 3), (10, 7)])
def test_layer_is_the_table_looked_up(bits: int, columns: int, groups: int) -> None:
    size = -(-columns // groups)
    lut, codes = normal(5, groups, 2**bits), torch.randint(2**bits, (5, columns), dtype=torch.uint8)
    linear = torch.nn.Linear(columns, 5).double()
    layer = coded_layer(linear, Coded(lut, codes), bits)
    wanted = torch.stack([torch.stack([lut[i, j // size, int(codes[i, j])] for j in range(columns)]) for i in range(5)])
    assert torch.equal(layer.weight, wanted)
    assert torch.equal(Coded(lut, codes).weight, wanted)
    x = normal(3, columns).requires_grad_()
    layer.requires_grad_(True)
    y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, wanted, linear.bias))
    y.square().sum().backward()
    # Gradient of a table entry: of all weights that take their value from it, added up.
    dense = (2 * y).T.detach() @ x.detach()
    gradient = torch.zeros_like(lut)
    for i, j in itertools.product(range(5), range(columns)):
        gradient[i, j // size, int(codes[i, j])] += dense[i, j]
    torch.testing.assert_close(layer.lut.grad, gradient)
    torch.testing.assert_close(x.grad, (2 * y).detach() @ wanted)


def _layer(lookup: str = "once") -> SketchLinear:
    codes = torch.randint(8, (5, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    layer = coded_layer(torch.nn.Linear(16, 5).double().requires_grad_(False), Coded(normal(5, 2, 8), codes), 3).eval()
    layer.lookup = lookup
    return layer


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that codes are unpacked."""
    calls: list[int] = []
    monkeypatch.setattr("bolaco.layers.sketch.unpack", lambda *args: calls.append(1) or unpack(*args))
    return calls


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_codes_are_looked_up_once(without_gradients: Any, lookups: list[int]) -> None:
    layer, x = _layer(), normal(3, 16)
    wanted = torch.nn.functional.linear(x, layer.weight.detach(), layer.bias)
    lookups.clear()
    with without_gradients():
        assert all(torch.equal(layer(x), wanted) for _ in range(4))
    assert len(lookups) == 1
    # What was kept is a plain tensor, and no part of the model's state.
    with torch.no_grad():
        assert torch.equal(layer(x), wanted)
    assert layer.state_dict().keys() == {"lut", "codes", "bias"}
    assert copy.deepcopy(layer)._kept is None
    assert len(lookups) == 1


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_codes_can_be_looked_up_always(without_gradients: Any, lookups: list[int]) -> None:
    layer, x = _layer("always"), normal(3, 16)
    with without_gradients():
        for _ in range(3):
            layer(x)
    assert len(lookups) == 3
    assert layer._kept is None


def _stepped(layer: SketchLinear) -> None:
    layer.lut.grad = normal(5, 2, 8, seed=3)
    torch.optim.SGD([layer.lut], lr=1.0).step()


def _replaced(layer: SketchLinear) -> None:
    layer.lut = torch.nn.Parameter(normal(5, 2, 8, seed=4))


CHANGES: dict[str, Any] = {
    "table in place": lambda layer: layer.lut.add_(1.0),
    "another table": _replaced,
    "codes in place": lambda layer: layer.codes.bitwise_not_(),
    "loaded": lambda layer: layer.load_state_dict(
        {k: v if k == "codes" else v + 1 for k, v in layer.state_dict().items()}
    ),
    "converted": lambda layer: layer.float().double(),
    "trained": _stepped,
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_was_looked_up_is_never_stale(change: str) -> None:
    layer, x = _layer(), normal(3, 16)
    with torch.no_grad():
        before = layer(x)
        CHANGES[change](layer)
        found = layer(x)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
    assert not torch.equal(found, before)
    layer.train()
    assert layer._kept is None  # training holds no copy of the weights


# --- tables -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(bits=st.sampled_from([1, 2, 3, 4]), columns=st.integers(1, 60), power=st.floats(0, 4), seed=st.integers(0, 99))
@example(bits=1, columns=2, power=1.0, seed=0)
def test_kmeans_is_no_worse_than_an_even_grid(bits: int, columns: int, power: float, seed: int) -> None:
    values, weights = normal(4, columns, seed=seed) ** 3, normal(columns, seed=seed + 1).abs() ** power
    centres = kmeans(values, weights, 2**bits)
    assert centres.shape == (4, 2**bits)
    assert (centres.diff(dim=1) >= 0).all()
    found = clustering_error(values, weights, centres)
    brute = (weights * ((values[..., None] - centres[:, None]) ** 2).amin(-1)).sum(1)
    torch.testing.assert_close(found, brute)
    grid = (weights * (values - rounded(values, bits).nan_to_num(0)) ** 2).sum(1)
    if columns > 1:
        # Where both are exact they differ by squares of rounding errors, about 1e-32 of the values' squares.
        rounding = 1e-28 * (weights * values**2).sum(1)
        assert (found <= grid * (1 + 1e-9) + rounding).all()


def test_kmeans_finds_separate_values() -> None:
    values = torch.tensor([[5.0, -1.0, 5.0, 2.0, -1.0, 9.0]], dtype=torch.float64)
    centres = kmeans(values, torch.ones(6, dtype=torch.float64), 4)
    assert centres.tolist() == [[-1.0, 2.0, 5.0, 9.0]]


def test_kmeans_minds_weights() -> None:
    values = torch.tensor([[0.0, 1.0, 10.0, 11.0, 12.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 3.0, 1.0, 1.0, 1e9], dtype=torch.float64)
    centres = kmeans(values, weights, 2)
    torch.testing.assert_close(centres, torch.tensor([[0.75, 12.0]], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 3])
def test_coding_loses_less_of_the_output_than_rounding(bits: int, groups: int) -> None:
    """Of the calibration outputs; and feedback less than the nearest entry of the same tables."""
    weight, x = normal(24, 150, seed=3), correlated(400, 150, seed=4)
    made = code(weight, inverse_factor(x.T @ x / len(x), 0.01), bits, groups, 3.0)
    error = output_error(weight, made.weight, x)
    assert error < output_error(weight, rounded(weight, bits), x)
    size = -(-150 // groups)
    pieces = [(weight[:, g * size :][:, :size], made.lut[:, g]) for g in range(groups)]
    nearest = torch.cat([lut.gather(1, (w[..., None] - lut[:, None]).abs().argmin(-1)) for w, lut in pieces], dim=1)
    assert error < output_error(weight, nearest, x)


def test_feedback_is_the_inverse_hessian() -> None:
    x = correlated(60, 20)
    order, upper = inverse_factor(x.T @ x / 60, 0.05)
    hessian = 2 * x.T @ x / 60
    hessian += 0.05 * hessian.diagonal().mean() * torch.eye(20)
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(hessian[order][:, order]))
    assert torch.equal(upper, upper.triu())
    assert (hessian.diagonal()[order].diff() <= 0).all()


def test_columns_without_input_are_coded_too() -> None:
    x = correlated(60, 12)
    x[:, 4:] = 0
    for inputs in (x, torch.zeros_like(x)):
        made = code(normal(3, 12), inverse_factor(inputs.T @ inputs / 60, 0.01), 2, 1, 3.0)
        assert torch.isfinite(made.weight).all()


def test_without_correlation_the_nearest_entry_is_taken() -> None:
    """And columns that weigh the same give plain k-means."""
    weight = normal(6, 30)
    made = code(weight, inverse_factor(torch.eye(30, dtype=torch.float64), 0.01), 3, 1, 3.0)
    lut = kmeans(weight, torch.ones(30, dtype=torch.float64), 8)
    torch.testing.assert_close(made.lut[:, 0], lut)
    nearest = (weight[..., None] - made.lut).abs().argmin(-1)
    assert torch.equal(made.codes.long(), nearest)


# --- the mode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dense"),
    [
        ("gpt2", False),
        ("llama", True),
        slow("phi3", False),
        slow("llama", False),
        slow("gpt2", True),
        slow("phi3", True),
    ],
)
def test_tables_are_trained_and_codes_are_not(
    family: str, dense: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "model", FAMILIES[family]()) if dense else compressed(family).path
    coded: dict[str, Tensor] = {}
    code_blocks = sketch._code_blocks
    monkeypatch.setattr(sketch, "_code_blocks", lambda *args: coded.update(code_blocks(*args)) or coded)
    record = run(source, tmp_path / "out")
    curve = record.curve
    assert curve[-1].loss < curve[0].loss - 0.05
    assert record.result_type == f"lowrank_{family}"
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SketchLinear)}
    assert sum(layer.lut.numel() for layer in layers.values()) == record.trainable_parameters
    assert {f"{name}.codes" for name in layers} == {key for key in coded if key.endswith("codes")}
    for name, layer in layers.items():
        codes = unpack(layer.codes, layer.bits)[:, : layer.in_features]
        assert torch.equal(codes, coded[f"{name}.codes"])
        assert layer.out_features == 0 or not torch.equal(layer.lut, coded[f"{name}.lut"])
    # Saved again it is the same, and it generates.
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(str(tmp_path / "again"))), logits(model))
    made = model.generate(token_blocks(1, 6), max_new_tokens=4, do_sample=False)
    assert made.shape[1] > 6
    unchanged = record.unchanged.tensors
    outside = [k for k in load_model(str(source)).state_dict() if not any(part in k for part in (".mlp.", "attn."))]
    assert unchanged >= len(outside)


def test_coding_is_sequential_and_near(tmp_path: Path) -> None:
    """A dense model at 4 bits is close to what it was, closer than at 2, on the text it was calibrated on."""
    source = save_tiny(tmp_path / "model", tiny_llama(hidden_size=64, intermediate_size=96))
    before, loss = logits(load_model(str(source))), {}
    for bits in (2, 4):
        out = tmp_path / f"out{bits}"
        run(source, out, {"options.bits": bits, "data.sequences": 16}, max_steps=1, learning_rate=1e-12)
        loss[bits] = float((logits(load_model(str(out))) - before).square().mean() / before.var())
    assert loss[4] < 0.2 * loss[2]


@pytest.mark.parametrize("bits", [3, slow(4), slow(2)])
def test_the_file_is_small(bits: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    model = tiny_llama(**sizes).bfloat16()
    source = save_tiny(tmp_path / "model", model)
    record = run(source, tmp_path / "out", {"options.bits": bits}, max_steps=1)
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    shapes = [(m.out_features, m.in_features) for m in linears]
    wanted = sum(out * (bits * inside // 8 + 2 * 2**bits) for out, inside in shapes)
    rest = 2 * (sum(p.numel() for p in model.parameters()) - sum(a * b for a, b in shapes))
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == record.bytes
    assert wanted + rest <= size <= wanted + rest + 8192  # the header
    assert record.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "store", "wanted"),
    [
        ("float32", "bfloat16", "bfloat16"),
        slow("float32", "float16", "float16"),
        ("float32", "input", "float32"),
        slow("float16", "bfloat16", "float16"),
    ],
)
def test_what_is_not_coded_takes_16_bits(given: str, store: str, wanted: str, tmp_path: Path) -> None:
    model = tiny_llama().to(getattr(torch, given))
    record = run(save_tiny(tmp_path / "model", model), tmp_path / "out", {"options.store": store}, max_steps=1)
    state = load_file(tmp_path / "out" / "model.safetensors")
    types = {str(tensor.dtype).removeprefix("torch.") for key, tensor in state.items() if not key.endswith("codes")}
    assert types == {wanted}
    assert str(load_model(str(tmp_path / "out")).dtype) == f"torch.{wanted}"
    # What is not coded is that of the input, rounded to the format.
    embedding = state["model.embed_tokens.weight"]
    assert torch.equal(embedding, model.model.embed_tokens.weight.to(embedding.dtype))
    assert record.unchanged.tensors > 2


def test_a_compressed_model_says_what_it_is_stored_in_now(tmp_path: Path) -> None:
    source = compressed("llama")
    assert source.info.dtype == "float32"
    run(source.path, tmp_path / "out", max_steps=1)
    assert read_info(tmp_path / "out").dtype == "bfloat16"


def test_the_loss_of_coded_and_not_yet_tuned_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "model")
    done = run(source, tmp_path / "out", {"options.bits": 2}, max_steps=20).perplexity
    still = run(source, tmp_path / "coded", {"options.bits": 2}, max_steps=1, learning_rate=1e-12).perplexity
    assert done.before == still.before
    assert done.start == still.start
    assert done.start == pytest.approx(still.after, rel=1e-2)  # stored in 16 bits
    assert abs(done.after - done.start) > 1e-2 * done.start
    for text in ((tmp_path / "out" / "README.md").read_text(), ok("inspect", tmp_path / "out").out):
        assert f"{done.start:.3f}" in text
    # Modes that begin with the model as it is have no such number.
    result = api.tune(
        str(source), "continued", str(text_file()), tmp_path / "all", options=SMALL, max_steps=1, seq_len=32
    )
    assert result is not None
    assert result.info.tuning is not None
    assert result.info.tuning.perplexity.start is None


def test_when_codes_are_looked_up_is_said_in_the_result(tmp_path: Path) -> None:
    run(compressed("phi3").path, tmp_path / "always", {"options.lookup": "always"}, max_steps=1)
    run(tmp_path / "always", tmp_path / "once", max_steps=1)
    for lookup in ("always", "once"):
        model = load_model(str(tmp_path / lookup))
        assert {m.lookup for m in model.modules() if isinstance(m, SketchLinear)} == {lookup}
        entries = model.config.lowrank["matrices"].values()
        assert ("lookup" in str(entries)) == (lookup == "always")


def test_other_codes_are_another_model(tmp_path: Path) -> None:
    """The work folder of a run is found again by a fingerprint of the weights, which the codes are a part of."""
    run(save_tiny(tmp_path / "model"), tmp_path / "out", max_steps=1)
    model = load_model(str(tmp_path / "out"))
    before = weights_fingerprint(model)
    assert weights_fingerprint(load_model(str(tmp_path / "out"))) == before
    next(module for module in model.modules() if isinstance(module, SketchLinear)).codes[0, 0] ^= 1
    assert weights_fingerprint(model) != before


def test_only_the_types_asked_for_are_coded(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    run(source, tmp_path / "out", max_steps=1, types=("o", "down"))
    config = load_model(str(tmp_path / "out")).config
    names = {name.rpartition(".")[2] for name in config.lowrank["matrices"]}
    assert names == {"o_proj", "down_proj"}


def test_a_coded_model_is_tuned_on_its_codes_and_made_dense(tmp_path: Path) -> None:
    run(compressed("llama").path, tmp_path / "first", max_steps=2)
    record = run(tmp_path / "first", tmp_path / "second", max_steps=2)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    changed = {key for key in first if not torch.equal(first[key], second[key])}
    assert changed == {key for key in first if key.endswith(".lut") and first[key].numel()}
    assert record.earlier.mode == "sketch"
    export_dense(str(tmp_path / "second"), tmp_path / "dense", drop_bias=True)
    assert "lut" not in "".join(load_file(tmp_path / "dense" / "model.safetensors"))
    with pytest.raises(UnsupportedModelError, match="coded into tables, and mode 'factors' would lose that"):
        api.tune(str(tmp_path / "second"), "factors", str(text_file()), tmp_path / "third", max_steps=1, seq_len=32)


def test_dense_export_of_coded_matrices_is_the_same_model(tmp_path: Path) -> None:
    run(save_tiny(tmp_path / "model"), tmp_path / "out", max_steps=1)
    export_dense(str(tmp_path / "out"), tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense), logits(load_model(str(tmp_path / "out"))))


def test_resumed_run_takes_the_codes_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = compressed("llama").path
    run(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(TuneTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out")
    monkeypatch.setattr(sketch, "_code_blocks", lambda *_: pytest.fail("coded again"))
    run(source, tmp_path / "out")
    assert digest(tmp_path / "out" / "model.safetensors") == digest(tmp_path / "whole" / "model.safetensors")


def test_other_code_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"options\.bits"):
        run(compressed("llama").path, tmp_path / "out", {"options.bits": 5})


def test_entries_describe_layers() -> None:
    inner = {"kind": "pivoted", "out": 6, "rank": 2, "bias": True, "side": "rows"}
    entry = {"kind": "sketch", "bits": 3, "groups": 2, "layer": inner}
    given = copy.deepcopy(entry)
    layer = build_layer(9, given)
    kinds = {name: type(module).__name__ for name, module in layer.named_children()}
    assert kinds == {"pivot": "SketchLinear", "rest": "SketchLinear"}
    assert {(module.bits, module.groups) for module in layer.children()} == {(3, 2)}
    assert isinstance(build_layer(9, entry | {"layer": {"kind": "dense", "out": 6, "bias": True}}), SketchLinear)
    assert given == entry
