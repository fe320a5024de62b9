"""Speed and memory of models."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bolaco import api
from bolaco.checkpoint.export import export_dense
from bolaco.checkpoint.info import read_info
from bolaco.errors import DataError, UnsupportedModelError
from bolaco.evaluation.engines import RUNTIMES, TorchEngine
from bolaco.evaluation.speed import linear_macs, measure, measure_apart, median_seconds
from bolaco.models.load import load_model
from bolaco.report.tables import speed_table
from tests.command import bolaco, ok
from tests.models import FAMILIES, compressed, save_tiny, slow, text_file, tiny_llama
from tests.processes import with_bolaco


def test_a_configuration_that_its_weights_do_not_fit_in_a_pass(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", FAMILIES["phi3"]())
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["partial_rotary_factor"] = 100.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="model: cannot be run on token ids alone: The size of tensor"):
        measure(str(folder), prompt=8, new=1)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_what_is_counted(family: str) -> None:
    run = compressed(family)
    found = measure(str(run.path), (1, 3), prompt=8, new=2, repeats=1)
    assert found.parameters == run.info.parameters
    assert found.bytes == 4 * found.parameters
    assert found.dtype == "float32"
    assert found.macs == linear_macs(load_model(str(run.path)))
    assert found.prefill.keys() == found.decode.keys() == {1, 3}
    assert min(*found.prefill.values(), *found.decode.values(), found.load_seconds) > 0
    assert found.peak_bytes > found.bytes


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_operations_are_those_of_the_matrices(family: str) -> None:
    """Two-factor layers multiply once for each parameter; the dense rest is the decoder linears and the head."""
    run = compressed(family)
    head = run.original.get_output_embeddings().weight.numel()
    assert linear_macs(run.original) == run.info.parameters_linears_dense + head
    assert linear_macs(load_model(str(run.path))) == run.info.parameters_linears + head


@pytest.mark.parametrize("dense", [True, False])
def test_a_coded_model_counts_as_what_it_stands_for(dense: bool, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model") if dense else compressed("llama").path
    options = {"training.autocast": False, "training.warmup": 0, "data.sequences": 2, "evaluation.windows": 2}
    api.tune(str(source), "sketch", str(text_file()), tmp_path / "out", options=options, max_steps=1, seq_len=32)
    model, found = load_model(str(source)), measure(str(tmp_path / "out"), (1,), prompt=8, new=1, repeats=1)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.macs == linear_macs(model)
    file = load_file(tmp_path / "out" / "model.safetensors")
    assert found.bytes == sum(tensor.nbytes for tensor in file.values())
    counts = export_dense(str(tmp_path / "out"), tmp_path / "stock", drop_bias=True)
    assert counts["parameters"] == found.parameters


def test_the_median_leaves_out_the_first_call() -> None:
    calls: list[int] = []
    assert median_seconds(lambda: calls.append(1), 3) < 0.1
    assert len(calls) == 4


def test_a_prompt_longer_than_the_model(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    with pytest.raises(DataError, match="has 128 positions; lower --prompt"):
        measure(str(tmp_path / "model"), prompt=126, new=2)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the processes of models be forked from one that has imported everything, from the given one on."""
    original, module = subprocess.run, "bolaco.evaluation.speed"
    calls: list[Sequence[str]] = []

    def start(first: int) -> None:
        def run(command: Sequence[str], **more: Any) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            if len(calls) <= first:
                return original(command, **more)
            assert command[1:3] == ["-m", module]
            return with_bolaco(f"import runpy; runpy.run_module('{module}', run_name='__main__')", *command[3:])

        monkeypatch.setattr("bolaco.evaluation.speed.subprocess.run", run)

    return start


@pytest.mark.parametrize("new", [0, slow(1)])  # the first process is a new one
def test_side_by_side_from_the_command_line(
    new: int, forked: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked(new)
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    small = compressed("llama").path
    done = ok("bench", "model", small, "--batch", "2", "--prompt", "8", "--new-tokens", "2", "--json", "speed.json")
    dense, found = json.loads(Path("speed.json").read_text())
    assert dense["parameters"] == sum(p.numel() for p in tiny_llama().parameters())
    assert found["parameters"] == read_info(small).parameters
    assert found["prefill"].keys() == found["decode"].keys() == {"2"}
    assert f"({found['parameters'] / dense['parameters']:.2f})" in done.out
    assert "new tokens/s, batch 2" in done.out


@pytest.mark.parametrize("runtime", ["fused", "compile"])
def test_torch_in_other_ways(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a compiler makes of it is not what is tested.
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    path = compressed("llama").path
    found = measure(str(path), (1, 2), prompt=8, new=2, repeats=1, runtime=runtime)
    assert found.runtime == runtime
    assert found.parameters == read_info(path).parameters
    assert found.file_bytes == (path / "model.safetensors").stat().st_size
    assert min(*found.prefill.values(), *found.decode.values(), found.first_token_seconds) > 0
    assert found.resident_bytes > found.bytes


@pytest.mark.parametrize("runtime", ["onnxruntime", slow("openvino")])
def test_exported_for_a_runtime(runtime: str, forked: Callable[[int], None]) -> None:
    for package in RUNTIMES[runtime].packages:
        pytest.importorskip(package)
    forked(0)
    path = compressed("llama").path
    found = measure_apart(str(path), batches=[1, 2], prompt=8, new=2, repeats=1, runtime=runtime)
    assert found.runtime == runtime
    assert found.parameters == read_info(path).parameters
    assert found.file_bytes > found.bytes == 4 * found.parameters
    assert min(*found.prefill.values(), *found.decode.values(), found.first_token_seconds) > 0


def test_a_runtime_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    done = bolaco("bench", "m", "--runtime", "eager,onnx")
    assert done.code == 1
    assert "--runtime onnx: known are eager, fused, compile, onnxruntime, openvino" in done.err
    monkeypatch.setattr("bolaco.runtime.onnx.importlib.util.find_spec", lambda name: None)
    done = bolaco("bench", "m", "--runtime", "openvino")
    assert done.code == 1
    assert "this needs onnx; pip install 'bolaco[export]'" in done.err


def test_a_step_continues_the_cache() -> None:
    """What is timed is one more token each time, in whatever computes it."""
    model = load_model(str(compressed("llama").path))
    lengths: list[int] = []

    def call(**words: Any) -> Any:
        made = model(**words)
        lengths.append(made.past_key_values.get_seq_length())
        return made

    engine, tokens = TorchEngine(model, call), torch.zeros(2, 5, dtype=torch.long)
    with torch.no_grad():
        engine.start(tokens)
        engine.step(tokens[:, :1])
        engine.step(tokens[:, :1])
        engine.start(tokens)
    assert lengths == [5, 6, 7, 5]


def test_the_table_compares_with_the_first() -> None:
    path = str(compressed("llama").path)
    speed = measure(path, (1,), prompt=4, new=1, repeats=1)
    table = speed_table([speed, speed])
    assert all("(1.00)" in cell for cell in list(table.columns[2].cells)[1:])


def test_what_cannot_be_measured_is_one_line(
    forked: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked(0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for words, said in (
        (("bench", "./model"), "model"),
        (("bench", "m", "--batch", "0"), "--batch 0: expected numbers from 1 up"),
        (("bench", "m", "--batch", "x"), "--batch x"),
        (("bench", "m", "--prompt", "0"), "--prompt 0: must be at least 1"),
        (("bench", "m", "--json", "no/f.json"), "no/f.json: there is no such folder"),
    ):
        done = bolaco(*words)
        assert done.code == 1
        line = done.err.splitlines()[-1]
        assert said in line
        assert "Traceback" not in done.err
