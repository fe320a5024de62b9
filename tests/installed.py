"""Run by `make test-wheel`, by a Python that has nothing of this project but its wheel: compresses, loads, exports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bolaco

COMMAND = Path(sys.executable).parent / "bolaco"


def run(*words: str, cwd: Path) -> str:
    """Output of a command of the installed package."""
    done = subprocess.run([str(COMMAND), *words], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bolaco {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def furnish(folder: Path) -> None:
    """A tiny model and a text."""
    words = [f"w{i}" for i in range(60)]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    ).save_pretrained(folder / "model")
    drawn = torch.randint(0, len(words), (3000,)).tolist()
    (folder / "text.txt").write_text(" ".join(words[i] for i in drawn), encoding="utf-8")


def quantize(folder: Path) -> None:
    """Runs what docs/use-the-result.md says of torchao, which is here and not among the packages of development."""
    text = (Path(__file__).parents[1] / "docs" / "use-the-result.md").read_text(encoding="utf-8")
    example = re.search(r"^## Quantize.*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert example is not None
    names: dict[str, object] = {}
    os.chdir(folder)
    exec(example[1], names)  # noqa: S102 - our own document
    model, tokens = names["model"], torch.arange(4, 20)[None]
    exact = AutoModelForCausalLM.from_pretrained("small", trust_remote_code=True)
    changed = [name for name, p in model.named_parameters() if type(p.data) is not torch.Tensor]
    assert any(".pivot." in name or ".rest." in name for name in changed), changed
    with torch.no_grad():
        found, expected = model(input_ids=tokens).logits, exact(input_ids=tokens).logits
    assert float((found - expected).norm()) < 0.2 * float(expected.norm())


def main() -> None:
    """Everything in a temporary folder."""
    package = Path(bolaco.__file__)
    assert "site-packages" in package.parts, package
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        furnish(folder)
        assert version("bolaco") in run("--version", cwd=folder)
        assert "kfac" in run("methods", cwd=folder)
        sizes = {"calibration.sequences": 8, "calibration.gradient_sequences": 4, "refinement.steps": 2}
        sizes |= {"search.rank_multiple": 2, "evaluation.windows": 2}
        options = [word for name, value in sizes.items() for word in ("--set", f"{name}={value}")]
        words = ["compress", "model", "--keep", "0.7", "--calibration", "text.txt", "--seq-len", "32", *options]
        run(*words, "-o", "small", cwd=folder)
        assert "<svg" in (folder / "small" / "report.html").read_text(encoding="utf-8")
        run("export", "small", "--dense", "--drop-bias", "-o", "stock", cwd=folder)
        tokens = torch.arange(4, 20)[None]
        for name, remote in (("small", True), ("stock", False)):
            model = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=remote)
            with torch.no_grad():
                assert torch.isfinite(model(input_ids=tokens).logits).all()
        quantize(folder)
        os.chdir("/")
    sys.stdout.write(f"bolaco {version('bolaco')} from its wheel: compressed, loaded, exported, quantized\n")


if __name__ == "__main__":
    main()
