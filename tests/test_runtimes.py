"""Exports are run in their runtimes: the same greedy tokens as torch. What is not installed is skipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bolaco.checkpoint.runtimes import export_onnx, export_openvino, export_two_factor
from bolaco.errors import CheckpointError, MissingPackageError, OutputExistsError, UnsupportedModelError
from bolaco.layers import LowRankLinear, PivotedLinear
from bolaco.models.load import load_model
from bolaco.runtime.decoder import CachedDecoder, Decoder, cache_names, cache_shapes
from bolaco.runtime.onnx import OnnxDecoder
from bolaco.runtime.openvino import OpenVinoDecoder, write_openvino
from tests.command import bolaco, ok
from tests.models import FAMILIES, compressed_once, mostly_slow, save_tiny, tiny_llama, token_blocks

PIVOTED = {"preset": "default", "search": "spectral", "options": {"refinement.steps": 0, "search.rank_multiple": 4}}


def _has(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


needs_onnx = pytest.mark.skipif(
    not _has("onnx", "onnxscript", "onnxruntime"), reason="onnx, onnxscript or onnxruntime is not installed"
)
needs_openvino = pytest.mark.skipif(not _has("openvino"), reason="openvino is not installed")
NEW = 12


def greedy(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """What torch generates: the likeliest tokens, beyond any end."""
    words = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), **words)
    assert isinstance(generated, torch.Tensor)
    return generated


def same_tokens(decoder: Decoder, model: PreTrainedModel) -> None:
    """Of prompts of several lengths and batches."""
    tokens = token_blocks(3, 20)
    for batch, length in ((1, 1), (1, 20), (3, 7)):
        prompt = tokens[:batch, :length]
        assert torch.equal(decoder.greedy(prompt, NEW), greedy(model, prompt))
    with torch.no_grad():
        torch.testing.assert_close(decoder.start(tokens), model(input_ids=tokens).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_explicit_cache_is_the_models_own(family: str) -> None:
    model, tokens = FAMILIES[family]().eval(), token_blocks(2, 16)
    model.set_attn_implementation("eager")
    shapes = cache_shapes(model)
    assert len(shapes) == len(cache_names("present", len(shapes))) == 2 * model.config.num_hidden_layers
    decoder = CachedDecoder(model)
    empty = [torch.zeros(2, heads, 0, size) for heads, size in shapes]
    with torch.no_grad():
        exact = model(input_ids=tokens, use_cache=False).logits
        first, *kept = decoder(tokens[:, :10], torch.ones(2, 10), torch.arange(10).expand(2, 10), empty)
        second, *kept = decoder(tokens[:, 10:], torch.ones(2, 16), torch.arange(10, 16).expand(2, 6), kept)
    torch.testing.assert_close(torch.cat([first, second], dim=1), exact, rtol=1e-4, atol=1e-4)
    assert {tensor.shape[2] for tensor in kept} == {16}


@needs_onnx
@needs_openvino
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "llama"))
def test_exported_families_generate_what_torch_generates(family: str, tmp_path: Path) -> None:
    path = compressed_once(family, **PIVOTED).path
    model = load_model(str(path))
    ok("export", path, "--onnx", "-o", tmp_path / "onnx")
    assert {"model.onnx", "model.onnx.data", "decoder.json", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "onnx").iterdir()
    }
    same_tokens(OnnxDecoder(tmp_path / "onnx", threads=1), model)
    (tmp_path / "openvino").mkdir()
    write_openvino(tmp_path / "onnx", tmp_path / "openvino")
    same_tokens(OpenVinoDecoder(tmp_path / "openvino", threads=1), model)


@needs_onnx
@needs_openvino
@pytest.mark.slow
def test_export_for_openvino(tmp_path: Path) -> None:
    stock = save_tiny(tmp_path / "stock")
    ok("export", stock, "--openvino", "-o", tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"openvino_model.xml", "openvino_model.bin", "decoder.json", "tokenizer.json"} <= names
    assert not any("onnx" in name for name in names)
    same_tokens(OpenVinoDecoder(tmp_path / "out", threads=1), load_model(str(stock)))


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "llama", "phi3", "gpt2"))
def test_two_factors_are_the_same_product(family: str, tmp_path: Path) -> None:
    path = compressed_once(family, **PIVOTED).path
    done = ok("export", path, "--two-factor", "-o", tmp_path / "out")
    before, after = load_model(str(path)), load_model(str(tmp_path / "out"))
    pivoted = {name for name, module in before.named_modules() if isinstance(module, PivotedLinear)}
    assert pivoted
    assert f"{len(pivoted)} pivoted matrices have two plain factors" in done.out
    assert {name for name, module in after.named_modules() if isinstance(module, LowRankLinear)} >= pivoted
    tokens = token_blocks(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            after(input_ids=tokens).logits, before(input_ids=tokens).logits, rtol=1e-4, atol=1e-4
        )
    for name in pivoted:
        torch.testing.assert_close(after.get_submodule(name).dense(), before.get_submodule(name).dense())
    # Whoever has no bolaco loads it with the code in the folder.
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(alone(input_ids=tokens).logits, after(input_ids=tokens).logits)


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = save_tiny(tmp_path / "stock")
    with pytest.raises(UnsupportedModelError, match="a llama model, not a compressed one"):
        export_two_factor(str(stock), tmp_path / "out")
    for export in (export_two_factor, export_onnx, export_openvino):
        with pytest.raises(OutputExistsError):
            export(str(stock), stock)
    done = bolaco("export", stock, "--onnx", "--drop-bias", "-o", tmp_path / "out")
    assert done.code == 1
    assert "--drop-bias is about --dense" in done.err
    # Packages that are not there.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"this needs onnx; pip install 'bolaco\[export\]'"):
        export_onnx(str(stock), tmp_path / "out")
    for decoder in (OnnxDecoder, OpenVinoDecoder):
        with pytest.raises(MissingPackageError):
            decoder(tmp_path)
    assert not (tmp_path / "out").exists()


@needs_onnx
def test_an_export_that_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"decoder\.json: is missing or damaged"):
        OnnxDecoder(tmp_path)
    (tmp_path / "decoder.json").write_text('{"cache": [[2, 8], [2, 8]]}')
    with pytest.raises(CheckpointError, match=r"model\.onnx: cannot be loaded"):
        OnnxDecoder(tmp_path)


@needs_onnx
def test_a_model_that_no_exporter_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("bolaco.checkpoint.runtimes.load_model", lambda *_, **__: model)
    stock = save_tiny(tmp_path / "stock")
    with pytest.raises(UnsupportedModelError, match="llama: cannot be exported to ONNX: ZeroDivisionError"):
        export_onnx(str(stock), tmp_path / "out")
    monkeypatch.setattr("bolaco.runtime.onnx.cache_shapes", lambda model: [])
    with pytest.raises(UnsupportedModelError, match="llama: keeps something else than keys and values"):
        export_onnx(str(stock), tmp_path / "out")
    assert not (tmp_path / "out").exists()
