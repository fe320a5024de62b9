"""Models as ONNX files, and how they are run: ``torch.onnx`` exports, ONNX Runtime computes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim
from transformers import PreTrainedModel

from bolaco.errors import CheckpointError, MissingPackageError, UnsupportedModelError
from bolaco.runtime.decoder import TOKENS, Arrays, CachedDecoder, Decoder, cache_names, cache_shapes

FILE = "model.onnx"
SHAPES_FILE = "decoder.json"
_PACKAGES = ("onnx", "onnxscript")


def needed(*packages: str) -> None:
    """Raises MissingPackageError for the first package that is not installed; all of them are in ``bolaco[onnx]``."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"this needs {package}; pip install 'bolaco[export]'")


def write_onnx(model: PreTrainedModel, folder: Path) -> None:
    """Writes ``model.onnx``, its weights beside it as ``model.onnx.data``, and ``decoder.json`` into a folder.

    The graph is that of :class:`bolaco.runtime.decoder.CachedDecoder`; batch, new tokens and past are free. It is in
    the model's number format. Attention of the model is switched to the plain one.

    Raises:
        MissingPackageError: onnx or onnxscript is not installed.
        UnsupportedModelError: the model keeps something else than keys and values, or cannot be exported.
    """
    needed(*_PACKAGES)
    kind = model.config.model_type
    with contextlib.suppress(ValueError, AttributeError):  # a model with one kind of attention only
        model.set_attn_implementation("eager")
    try:
        shapes = cache_shapes(model)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise UnsupportedModelError(f"{kind}: cannot be run with a cache of keys and values: {_line(error)}") from error
    if not shapes:
        raise UnsupportedModelError(f"{kind}: keeps something else than keys and values for each token")
    # No size is 0 or 1, which would be taken for constants.
    batch, past, new = 2, 4, 3
    tokens = torch.zeros(batch, new, dtype=torch.long)
    places = torch.arange(past, past + new).expand(batch, new).contiguous()
    kept = [torch.zeros(batch, heads, past, size, dtype=model.dtype) for heads, size in shapes]
    free: Any = Dim.DYNAMIC
    try:
        with _silence(), torch.no_grad():
            torch.onnx.export(
                CachedDecoder(model).eval(),
                (tokens, torch.ones(batch, past + new, dtype=torch.long), places, kept),
                str(folder / FILE),
                input_names=[*TOKENS, *cache_names("past_key_values", len(shapes))],
                output_names=["logits", *cache_names("present", len(shapes))],
                dynamic_shapes={
                    **{name: {0: free, 1: free} for name in TOKENS},
                    "past_key_values": [{0: free, 2: free}] * len(shapes),
                },
                dynamo=True,
                external_data=True,
            )
    except Exception as error:  # whatever an exporter finds in the code of a model
        raise UnsupportedModelError(f"{kind}: cannot be exported to ONNX: {_line(error)}") from error
    values = {"cache": shapes, "model_type": kind}
    (folder / SHAPES_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_shapes(folder: Path) -> list[tuple[int, int]]:
    """Heads and size of every tensor of the cache of an exported model.

    Raises:
        CheckpointError: the folder does not say.
    """
    try:
        found = json.loads((folder / SHAPES_FILE).read_text(encoding="utf-8"))["cache"]
        return [(int(heads), int(size)) for heads, size in found]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{folder / SHAPES_FILE}: is missing or damaged; `bolaco export` writes it beside the model"
        ) from error


class OnnxDecoder(Decoder):
    """An exported folder in ONNX Runtime, on the CPU.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        CheckpointError: nothing there that it can load.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        needed("onnxruntime")
        import onnxruntime

        super().__init__(read_shapes(folder))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(folder / FILE), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its own classes, and those of protobuf
            raise CheckpointError(f"{folder / FILE}: cannot be loaded: {_line(error)}") from error
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:
        """One call; inputs that the graph has no use for are left out."""
        given = {name: np.ascontiguousarray(inputs[name]) for name in self._inputs}
        return dict(zip(self._outputs, self._session.run(self._outputs, given), strict=True))


@contextmanager
def _silence() -> Iterator[None]:
    """What the exporter says of itself is no news to who runs this."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _line(error: BaseException) -> str:
    """What went wrong, in a line: the last cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
