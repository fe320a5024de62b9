"""A model written for other runtimes: as an ONNX file, for OpenVINO, or with two plain factors for each matrix."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from bolaco.errors import UnsupportedModelError
from bolaco.layers import Entry, FactoredLinear, LowRankLinear, PivotedLinear, put_module
from bolaco.models.load import load_model, load_tokenizer
from bolaco.models.lowrank import FORMAT, is_compressed
from bolaco.models.quiet import quiet
from bolaco.runtime.onnx import write_onnx
from bolaco.runtime.openvino import write_openvino
from bolaco.work.output import new_folder, refuse_existing


def export_onnx(folder: str, out: Path) -> None:
    """Writes a model, compressed or not, as an ONNX file in float32 with its weights beside it, and its tokenizer.

    Raises:
        OutputExistsError: ``out`` exists.
        MissingPackageError: onnx or onnxscript is not installed.
        UnsupportedModelError: the model cannot be exported; the message says why.
    """
    refuse_existing(out)
    model, tokenizer = _plain(folder)
    with new_folder(out) as partial, quiet():
        write_onnx(model, partial)
        _with_words(model, tokenizer, partial)


def export_openvino(folder: str, out: Path) -> None:
    """The same for OpenVINO, by way of an ONNX file that is not kept.

    Raises:
        OutputExistsError: ``out`` exists.
        MissingPackageError: onnx, onnxscript or openvino is not installed.
        UnsupportedModelError: the model cannot be exported or converted; the message says why.
    """
    refuse_existing(out)
    model, tokenizer = _plain(folder)
    with new_folder(out) as partial, TemporaryDirectory(dir=partial.parent) as between, quiet():
        write_onnx(model, Path(between))
        write_openvino(Path(between), partial)
        _with_words(model, tokenizer, partial)


def _plain(folder: str) -> tuple[PreTrainedModel, Any]:
    """A model on the CPU in float32, and its tokenizer."""
    return load_model(folder, dtype="float32", device="cpu", adapters="refuse"), load_tokenizer(folder)


def _with_words(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def export_two_factor(folder: str, out: Path) -> int:
    """Writes a compressed model with two plain factors for each pivoted matrix; returns how many there were.

    The product is the same: pivots are one factor as they are, and the other has ones and zeros in their place. It is
    for runtimes that cannot move numbers by an index, costs r² parameters a matrix, and loads as every result does.

    Raises:
        OutputExistsError: ``out`` exists.
        UnsupportedModelError: not a compressed folder, or its pivoted matrices are coded, or experts' in one layer.
    """
    refuse_existing(out)
    model: Any = load_model(folder, adapters="refuse")
    if not is_compressed(model.config):
        raise UnsupportedModelError(f"{folder}: a {model.config.model_type} model, not a compressed one")
    tokenizer = load_tokenizer(folder)
    pivoted = [(name, module) for name, module in model.named_modules() if isinstance(module, PivotedLinear)]
    for name, layer in pivoted:
        if len(layer.linears()) != 2 or layer.pivot.weight.ndim != 2:
            raise UnsupportedModelError(
                f"{name}: is coded, or that of several experts, and has no factors of its own; use --dense"
            )
        put_module(model, name, as_two_factors(layer))
    config = copy.deepcopy(model.config)
    config.lowrank = {
        "format": FORMAT,
        "matrices": {name: _two_factor(entry) for name, entry in config.lowrank["matrices"].items()},
    }
    with torch.device("meta"):
        made = type(model)(config)
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    made.generation_config = model.generation_config
    with new_folder(out) as partial, quiet():
        made.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return len(pivoted)


def as_two_factors(layer: FactoredLinear) -> LowRankLinear:
    """The two factors of a layer as a layer, with its bias."""
    expand, reduce = (factor.detach().contiguous() for factor in layer.factors())
    bias = layer.dense_bias()
    with torch.device("meta"):
        made = LowRankLinear(layer.in_features, layer.out_features, layer.rank, bias is not None)
    state = {"reduce.weight": reduce, "expand.weight": expand}
    made.load_state_dict(state | ({} if bias is None else {"expand.bias": bias.detach()}), assign=True)
    return made.requires_grad_(False)


def _two_factor(entry: Entry) -> Entry:
    """An entry of the configuration, and those inside it, with two factors for pivots."""
    if entry["kind"] == PivotedLinear.kind:
        kept = {key: value for key, value in entry.items() if key != "side"}
        return kept | {"kind": LowRankLinear.kind}
    parts = {"parts": [_two_factor(part) for part in entry["parts"]]} if "parts" in entry else {}
    return entry | parts
