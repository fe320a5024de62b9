"""docs/use-the-result.md, run block by block on a result, each in a fresh namespace; the first without bolaco."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bolaco.checkpoint.runtimes import export_onnx
from bolaco.models.load import load_model
from tests.models import compress_tiny, save_tiny, tiny_llama, tiny_tokenizer

DOCUMENT = Path(__file__).parents[1] / "docs" / "use-the-result.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
# Heading -> its examples.
EXAMPLES = {
    section.partition("\n")[0]: re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    for section in TEXT.split("\n## ")[1:]
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a result of the default in ``small``."""
    folder = tmp_path_factory.mktemp("use")
    made = compress_tiny(
        tiny_llama(),
        folder / "made",
        preset="default",
        search="spectral",
        options={"refinement.steps": 0, "search.rank_multiple": 4},
    )
    made.path.rename(folder / "small")
    save_tiny(folder / "dense", tiny_llama())
    tiny_tokenizer().save_pretrained(folder / "small")
    return folder


def run(example: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.chdir(place)
    names: dict = {}
    exec(compile(example, str(DOCUMENT), "exec"), names)  # noqa: S102 - our own document
    return names


def expected(place: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(str(place / "small"))(input_ids=tokens).logits


def test_every_section_with_python_is_run_here() -> None:
    assert {heading for heading, examples in EXAMPLES.items() if examples} == {
        "Load it",
        "Generate",
        "Train adapters on it (PEFT)",
        "Quantize it further (torchao)",
        "Measure it elsewhere (lm-evaluation-harness)",
        "Make it faster here",
        "Export it (ONNX Runtime, OpenVINO)",
    }


def test_without_bolaco(place: Path) -> None:
    """In a process that cannot import it."""
    example = EXAMPLES["Load it"][0]
    tokens = torch.arange(4, 12)[None]
    script = (
        "import sys\nsys.modules['bolaco'] = None\n"
        f"{example}\nimport torch\nfrom safetensors.torch import save_file\nwith torch.no_grad():\n"
        "    save_file({'logits': model(input_ids=torch.arange(4, 12)[None]).logits}, 'logits.safetensors')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(place / "logits.safetensors")["logits"], expected(place, tokens))


def test_with_bolaco(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = run(EXAMPLES["Load it"][1], place, monkeypatch)["model"]
    tokens = torch.arange(4, 12)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, expected(place, tokens))


def test_generation(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(EXAMPLES["Generate"][0], place, monkeypatch)
    tokens = names["tokenizer"]("A river carries", return_tensors="pt").input_ids
    found = load_model(str(place / "small")).generate(tokens, max_new_tokens=8, do_sample=False)
    made = names["tokenizer"].decode(found[0, tokens.shape[1] :])
    assert capsys.readouterr().out.strip().endswith(made.strip())


def test_adapters(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(EXAMPLES["Train adapters on it (PEFT)"][0], place, monkeypatch)
    trained = [name for name, p in names["adapted"].named_parameters() if p.requires_grad]
    assert any(".pivot." in name for name in trained)
    assert any(".rest." in name for name in trained)
    tokens = torch.arange(4, 12)[None]
    with torch.no_grad():
        merged = names["merged"](input_ids=tokens).logits
    assert torch.allclose(merged, expected(place, tokens), atol=1e-5)


def test_why_the_names_of_the_original_are_refused(place: Path) -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="PivotedLinear"):
        get_peft_model(load_model(str(place / "small")), LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed; `make test-wheel` runs this"
)
def test_quantization(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = run(EXAMPLES["Quantize it further (torchao)"][0], place, monkeypatch)["model"]
    quantized = [name for name, p in model.named_parameters() if type(p.data).__name__ != "Tensor"]
    assert any(".pivot." in name or ".rest." in name for name in quantized)
    tokens = torch.arange(4, 12)[None]
    with torch.no_grad():
        found, exact = model(input_ids=tokens).logits, expected(place, tokens)
    assert float((found - exact).norm() / exact.norm()) < 0.2


def test_the_harness(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    harness = run(EXAMPLES["Measure it elsewhere (lm-evaluation-harness)"][0], place, monkeypatch)["harness"]
    request = Instance("loglikelihood", {}, ("A river", " carries"), 0)
    ((score, _),) = harness.loglikelihood([request], disable_tqdm=True)
    assert score < 0


def test_faster_here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = run(EXAMPLES["Make it faster here"][0], place, monkeypatch)["model"]
    tokens = torch.arange(4, 12)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, expected(place, tokens))
    before, after = (load_file(place / name / "model.safetensors") for name in ("small", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_in_onnx_runtime(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    export_onnx(str(place / "small"), place / "onnx")
    tokens = run(EXAMPLES["Export it (ONNX Runtime, OpenVINO)"][0], place, monkeypatch)["tokens"]
    words = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    prompt = tokens[:, :3]
    generated = load_model(str(place / "small")).generate(prompt, attention_mask=torch.ones_like(prompt), **words)
    assert torch.equal(tokens, generated)
