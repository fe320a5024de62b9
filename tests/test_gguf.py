"""GGUF files: what is read of them, and at what cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from bolaco.models.find import inspect_structure
from bolaco.models.load import load_config, load_model, load_tokenizer
from tests.command import ok
from tests.models import write_english

TOKENS = 3000
SIZES = {"hidden": 32, "ffn": 48, "layers": 2, "heads": 4, "kv": 2}


def write_gguf(path: Path, tokens: int = TOKENS) -> Path:
    """A Llama with a vocabulary of so many tokens, whose first ones are single bytes."""
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    hidden, ffn, kv = SIZES["hidden"], SIZES["ffn"], SIZES["hidden"] // SIZES["heads"] * SIZES["kv"]
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_block_count(SIZES["layers"])
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(SIZES["heads"])
    writer.add_head_count_kv(SIZES["kv"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(tokens)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    names += [f"▁w{i}" for i in range(tokens - len(names))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([-float(i) for i in range(tokens)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (tokens - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, (draw.standard_normal(shape) / 32**0.5).astype(np.float32))

    add("token_embd.weight", tokens, hidden)
    add("output.weight", tokens, hidden)
    add("output_norm.weight", hidden)
    for layer in range(SIZES["layers"]):
        for name, *shape in (
            ("attn_q", hidden, hidden),
            ("attn_k", kv, hidden),
            ("attn_v", kv, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", ffn, hidden),
            ("ffn_up", ffn, hidden),
            ("ffn_down", hidden, ffn),
            ("attn_norm", hidden),
            ("ffn_norm", hidden),
        ):
            add(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf")


def test_what_is_read_is_what_transformers_reads(file: Path) -> None:
    before = gguf.GGUFReader
    config, tokenizer, model = load_config(str(file)), load_tokenizer(str(file)), load_model(str(file))
    assert gguf.GGUFReader is before
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (TOKENS, 32, 2)
    plain = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert tokenizer.get_vocab() == plain.get_vocab()
    assert tokenizer("w1 w2 ü").input_ids == plain("w1 w2 ü").input_ids
    wanted = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    assert torch.equal(model.lm_head.weight, torch.tensor(np.array(wanted["output.weight"])))
    assert len(inspect_structure(model).sites) == 14


@pytest.mark.parametrize(("read", "slices"), [(load_config, TOKENS / 10), (load_tokenizer, 2 * TOKENS)])
def test_the_mapped_file_is_not_sliced_for_every_token(
    read: Any, slices: float, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices of a mapped array took most of the half minute that 262,144 tokens did.

    transformers itself reads the tokens of a tokenizer once, with a slice for each.
    """
    made, finalize = [0], np.memmap.__array_finalize__

    def counting(self: Any, other: Any) -> None:
        made[0] += 1
        finalize(self, other)

    monkeypatch.setattr(np.memmap, "__array_finalize__", counting)
    read(str(file))
    assert made[0] < slices


def test_a_file_that_is_no_model_leaves_the_reader_as_it_was(tmp_path: Path) -> None:
    before = gguf.GGUFReader
    (tmp_path / "no.gguf").write_bytes(b"GGUF and no more")
    for read in (load_config, load_tokenizer, load_model):
        with pytest.raises(Exception, match=r"no\.gguf"):
            read(str(tmp_path / "no.gguf"))
    assert gguf.GGUFReader is before


def test_dry_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_english(tmp_path / "text.txt", 100)
    sizes = {"calibration.seq_len": 8, "calibration.sequences": 4, "evaluation.windows": 1}
    settings = [word for field, value in sizes.items() for word in ("--set", f"{field}={value}")]
    assert "budget" in ok("compress", file, "--keep", "0.8", "--calibration", "text.txt", *settings, "--dry-run").out
