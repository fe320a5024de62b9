"""Tensor-train adapters: the operator against its definition, sizes, and the mode around it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

import bolaco
from bolaco import api
from bolaco.checkpoint.export import export_dense
from bolaco.checkpoint.info import TuningRecord, read_any_info, read_info
from bolaco.errors import CheckpointError, RecipeError, UnsupportedModelError
from bolaco.evaluation.speed import measure
from bolaco.layers.tensor_train import PUBLISHED, TensorTrain, TrainAdapter, factorization, train_sizes
from bolaco.models.load import load_model
from tests.command import ok
from tests.models import FAMILIES, compressed, save_tiny, slow, text_file, token_blocks

# One batch, again and again, so that its loss has to fall.
SMALL = {"evaluation.windows": 4, "training.autocast": False, "training.warmup": 0, "data.sequences": 4}


def run(model: Path, out: Path, options: dict[str, Any] | None = None, **words: Any) -> TuningRecord:
    given = {"max_steps": 8, "batch": 4, "seq_len": 32, "learning_rate": 5e-3} | words
    result = api.tune(str(model), "tt-lora", str(text_file()), out, options=SMALL | (options or {}), **given)
    assert result is not None
    assert result.info.tuning is not None
    return result.info.tuning


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=token_blocks(2, 24, seed=8), use_cache=False).logits
    return found


def filled(inputs: tuple[int, ...], outputs: tuple[int, ...], rank: int, seed: int = 0) -> TensorTrain:
    """A train in float64 none of whose cores is zero."""
    draw = torch.Generator().manual_seed(seed)
    train = TensorTrain(inputs, outputs, rank, draw, torch.float64)
    with torch.no_grad():
        train.cores[-1].copy_(torch.randn(train.cores[-1].shape, generator=draw))
    return train


def defined(train: TensorTrain) -> Tensor:
    """dW, element by element as its definition says."""
    made = torch.empty(math.prod(train.outputs), math.prod(train.inputs), dtype=torch.float64)
    digits = [itertools.product(*(range(size) for size in sizes)) for sizes in (train.outputs, train.inputs)]
    rows, columns = (list(d) for d in digits)
    cores = [core.detach() for core in train.cores]
    for j, out in enumerate(rows):
        for i, inside in enumerate(columns):
            product = torch.eye(1, dtype=torch.float64)
            for core, digit in zip(cores, (*inside, *reversed(out)), strict=True):
                product = product @ core[:, digit]
            made[j, i] = product
    return made


sides = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@settings(deadline=None, max_examples=25)
@given(inputs=sides, outputs=sides, rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_contraction_is_the_definition(inputs: tuple[int, ...], outputs: tuple[int, ...], rank: int, seed: int) -> None:
    train = filled(inputs, outputs, rank, seed)
    matrix = defined(train)
    torch.testing.assert_close(train.dense(), matrix, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 3, math.prod(inputs), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(train(x), x @ matrix.T, rtol=1e-10, atol=1e-10)


def test_reshaping_the_product_of_the_cores_is_another_operator() -> None:
    train = filled((2, 3), (2, 3), 3)
    product = train.cores[0].detach()
    for core in list(train.cores)[1:]:
        product = torch.tensordot(product, core.detach(), dims=1)
    assert not torch.allclose(product.reshape(6, 6).T, train.dense())
    right = product.reshape(2, 3, 3, 2).permute(0, 1, 3, 2).reshape(6, 6).T
    torch.testing.assert_close(right, train.dense())


@pytest.mark.parametrize("shape", [*PUBLISHED, (576, 576), (576, 192)])
def test_contraction_and_count_at_real_sizes(shape: tuple[int, int]) -> None:
    inputs, outputs = train_sizes(*shape, 5, 4)
    assert (math.prod(inputs), math.prod(outputs)) == shape
    train = filled(inputs, outputs, 5)
    sizes = (*inputs, *outputs[::-1])
    bonds = (1, *[5] * (len(sizes) - 1), 1)
    count = sum(bonds[t] * size * bonds[t + 1] for t, size in enumerate(sizes))
    assert sum(p.numel() for p in train.parameters()) == count
    assert 10 * count <= 8 * sum(shape)  # a tenth of LoRA of rank 8
    matrix = train.dense()
    x = torch.randn(4, shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = x @ matrix.T
    torch.testing.assert_close(train(x), wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))
    single = train.float()(x.float()).detach().double()
    assert float((single - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_published_sizes() -> None:
    lists = {shape: [*m, *n[::-1]] for shape, (m, n) in PUBLISHED.items()}
    assert lists == {
        (768, 768): [64, 4, 3, 3, 4, 64],
        (2048, 2048): [16, 8, 4, 4, 4, 4, 8, 16],
        (2048, 512): [16, 16, 4, 2, 2, 16, 16],
    }


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 600), rank=st.integers(1, 8), factors=st.integers(1, 5))
def test_factorization(size: int, rank: int, factors: int) -> None:
    found = factorization(size, rank, factors)
    assert math.prod(found) == size
    assert 1 <= len(found) <= factors
    assert list(found) == sorted(found, reverse=True)
    assert all(factor > 1 for factor in found) or found == (1,)
    cost = rank * found[0] + rank**2 * sum(found[1:])
    assert cost <= rank * size  # no larger than not splitting at all
    for first in range(1, size + 1):  # nor than any split in two
        if size % first == 0 and factors > 1 and first >= size // first:
            assert cost <= rank * first + (rank**2 * (size // first) if first < size else 0)


def test_factorization_of_primes() -> None:
    assert factorization(577, 5, 4) == (577,)
    assert factorization(2 * 577, 5, 4) == (577, 2)
    assert factorization(576, 5, 4) == (16, 4, 3, 3)


@pytest.mark.parametrize("family", [slow("gpt2"), "phi3", slow("llama")])
def test_kept_adapter(family: str, tmp_path: Path) -> None:
    source = compressed(family)
    record = run(source.path, tmp_path / "out", {"options.whole": True})
    assert record.curve[-1].loss < record.curve[0].loss - 0.01
    base, adapted = load_model(str(source.path)), bolaco.load(str(tmp_path / "out"))
    adapters = [module for module in adapted.modules() if isinstance(module, TrainAdapter)]
    assert sum(p.numel() for a in adapters for p in a.train_of_cores.parameters()) == record.trainable_parameters
    described = json.loads((tmp_path / "out" / "adapter_tt.json").read_text())["matrices"]
    assert len(described) == len(adapters)
    # What eval measures is the adapted model; what stock transformers loads is the input.
    words = {"seq_len": 32, "limit": 4}
    after = api.evaluate(str(tmp_path / "out"), str(text_file()), **words)  # type: ignore[arg-type]
    assert after.perplexity == pytest.approx(record.perplexity.after, rel=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits(stock), logits(base))
    assert not torch.allclose(logits(adapted), logits(base))
    assert "Stock transformers loads the model without the adapter" in (tmp_path / "out" / "README.md").read_text()


def test_the_adapter_alone_is_the_model_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation, speed and loading take it for the model it names, from whatever folder they are called."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    source = save_tiny(Path("dense"))
    words = ("--data", text_file(), "--seq-len", "32", "--max-steps", "8", "--learning-rate", "5e-3", "--batch", "4")
    options = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    done = ok("tune", source, "--mode", "tt-lora", *words, *options, "-o", "alone")
    record = read_any_info("alone").tuning
    assert record is not None
    assert "--set options.whole=true writes the model too" in done.out.replace("`", "")
    whole = run(source, Path("whole"), {"options.whole": True})
    assert {file.name for file in Path("alone").iterdir()} == {
        *("adapter_tt.json", "adapter_tt.safetensors", "bolaco.json", "report.html", "README.md"),
    }
    assert record.adapter_of == "dense"
    assert whole.adapter_of is None
    assert record.bytes == (Path("alone") / "adapter_tt.safetensors").stat().st_size < whole.bytes
    assert record.parameters == whole.parameters
    monkeypatch.chdir(tmp_path)
    alone = tmp_path / "models" / "alone"
    assert torch.equal(logits(bolaco.load(str(alone))), logits(bolaco.load(str(tmp_path / "models" / "whole"))))
    found = api.evaluate(str(alone), str(text_file()), seq_len=32, limit=4)
    assert found.perplexity == pytest.approx(record.perplexity.after, rel=1e-5)
    assert found.perplexity != pytest.approx(record.perplexity.before, rel=1e-5)
    speed = measure(str(alone), (1,), prompt=4, new=1, repeats=1)
    assert speed.parameters == record.parameters + record.trainable_parameters
    assert ok("inspect", alone).out
    assert "bolaco.load(" in (alone / "README.md").read_text()
    assert "from_pretrained" not in (alone / "README.md").read_text()


def test_how_it_is_written_is_no_reason_to_train_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "model")
    run(source, tmp_path / "whole", {"options.whole": True})
    with monkeypatch.context() as patch:
        patch.setattr("bolaco.tune.run._write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out")
    monkeypatch.setattr("bolaco.tune.run._train", lambda *_: pytest.fail("trained again"))
    run(source, tmp_path / "out", {"options.whole": True})
    file = "adapter_tt.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_an_adapter_of_a_compressed_model_describes_both(tmp_path: Path) -> None:
    source = compressed("llama")
    run(source.path, tmp_path / "out", max_steps=1)
    info = read_info(tmp_path / "out")
    assert (info.bytes, info.parameters, info.dtype) == (source.info.bytes, source.info.parameters, source.info.dtype)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"holds an adapter for `{source.path}`" in card
    assert "from_pretrained" not in card


@pytest.mark.parametrize("field", [None, 3, "", "nowhere/that/is", "out"])
def test_an_adapter_whose_model_is_not_there_is_one_line(field: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(save_tiny(tmp_path / "model"), out, max_steps=1)
    described = json.loads((out / "adapter_tt.json").read_text())
    assert described["base"] == str(tmp_path / "model")
    given = str(out) if field == "out" else field
    (out / "adapter_tt.json").write_text(json.dumps({key: v for key, v in described.items() if key != "base"}))
    if given is not None:
        (out / "adapter_tt.json").write_text(json.dumps(described | {"base": given}))
    with pytest.raises((CheckpointError, UnsupportedModelError), match=r"out.*(adapter for|the model it is for)"):
        bolaco.load(str(out))


def test_only_the_types_asked_for(tmp_path: Path) -> None:
    run(compressed("llama").path, tmp_path / "out", max_steps=1, types=("o", "down"))
    names = json.loads((tmp_path / "out" / "adapter_tt.json").read_text())["matrices"]
    assert {name.rpartition(".")[2] for name in names} == {"o_proj", "down_proj"}


@pytest.mark.parametrize("family", [slow("llama"), "gpt2", slow("llama_biased")])
def test_merged_into_dense_matrices(family: str, tmp_path: Path) -> None:
    """Merged and kept, the same training gives the same model; and only q and v are changed."""
    model = save_tiny(tmp_path / "model", FAMILIES[family]())
    kept = run(model, tmp_path / "kept")
    merged = run(model, tmp_path / "merged", {"options.merge": True})
    assert merged.curve == kept.curve
    assert not (tmp_path / "merged" / "adapter_tt.json").exists()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = bolaco.load(str(tmp_path / "kept"))
    assert not torch.allclose(logits(adapted), logits(load_model(str(model))))
    torch.testing.assert_close(logits(found), logits(adapted), rtol=1e-5, atol=1e-5)
    before, after = load_model(str(model)).state_dict(), found.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    endings = ("c_attn.weight",) if family == "gpt2" else ("q_proj.weight", "v_proj.weight")
    assert changed == {name for name in before if name.endswith(endings)}


def test_merging_into_a_factored_matrix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"options\.merge: .*q_proj is no dense matrix .* would raise its rank"):
        run(compressed("llama").path, tmp_path / "out", {"options.merge": True})
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_lost_silently(tmp_path: Path) -> None:
    run(compressed("llama").path, tmp_path / "out", max_steps=1)
    run(compressed("llama").path, tmp_path / "whole", {"options.whole": True}, max_steps=1)
    for name in ("out", "whole"):
        with pytest.raises(UnsupportedModelError, match=r"adapter_tt.json\) and would be lost"):
            export_dense(str(tmp_path / name), tmp_path / "dense")
        with pytest.raises(UnsupportedModelError, match="would be lost"):
            run(tmp_path / name, tmp_path / "again", max_steps=1)
    (tmp_path / "out" / "adapter_tt.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_tt\.json: damaged"):
        bolaco.load(str(tmp_path / "out"))
