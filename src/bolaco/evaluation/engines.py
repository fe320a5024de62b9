"""What runs a model while its speed is measured: torch in several ways, and the runtimes that it is exported to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.errors import RecipeError
from bolaco.runtime.decoder import Decoder
from bolaco.runtime.fuse import fuse
from bolaco.runtime.onnx import OnnxDecoder, needed, write_onnx
from bolaco.runtime.openvino import OpenVinoDecoder, write_openvino
from bolaco.settings import meant


class Engine(Protocol):
    """A model that is ready."""

    def start(self, tokens: Tensor) -> None:
        """One pass over prompts ``[batch, n]``, up to the next token's logits; the cache is kept."""

    def step(self, tokens: Tensor) -> None:
        """One more token ``[batch, 1]`` after what is in the cache."""


class TorchEngine:
    """A model in torch; ``call`` computes it."""

    def __init__(self, model: PreTrainedModel, call: Callable[..., Any]) -> None:
        self.model, self.call = model, call
        self._cache: Any = None

    def start(self, tokens: Tensor) -> None:
        """One pass; logits of the last position only."""
        self._cache = self.call(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values

    def step(self, tokens: Tensor) -> None:
        """One more token."""
        self._cache = self.call(input_ids=tokens, past_key_values=self._cache, use_cache=True).past_key_values


class ExportedEngine:
    """An exported model in its runtime."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def start(self, tokens: Tensor) -> None:
        """One pass."""
        self.decoder.start(tokens)

    def step(self, tokens: Tensor) -> None:
        """One more token."""
        self.decoder.step(tokens)


@dataclass(frozen=True)
class Runtime:
    """One way to run a model.

    Attributes:
        name: what ``--runtime`` takes.
        summary: of it, in a line.
        torch: makes an engine of a loaded model; None where it is exported first.
        exports: writes the model into a folder.
        opens: makes an engine of that folder.
        compiles: code of torch, which wants no inference mode.
        packages: that must be installed.
    """

    name: str
    summary: str
    torch: Callable[[PreTrainedModel], Engine] | None = None
    exports: Callable[[PreTrainedModel, Path], None] | None = None
    opens: Callable[[Path], Engine] | None = None
    compiles: bool = False
    packages: tuple[str, ...] = ()


def _eager(model: PreTrainedModel) -> Engine:
    return TorchEngine(model, model)


def _fused(model: PreTrainedModel) -> Engine:
    return TorchEngine(model, fuse(model))


def _compiled(model: PreTrainedModel) -> Engine:
    return TorchEngine(model, torch.compile(model, dynamic=True))


def _by_onnx(model: PreTrainedModel, folder: Path) -> None:
    write_onnx(model, folder)
    write_openvino(folder, folder)
    for file in folder.glob("model.onnx*"):
        file.unlink()


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime("eager", "transformers, as a model is loaded", torch=_eager),
        Runtime("fused", "the same after bolaco.fuse(model)", torch=_fused),
        Runtime("compile", "torch.compile; the first token waits for it", torch=_compiled, compiles=True),
        Runtime(
            "onnxruntime",
            "ONNX Runtime on what `bolaco export --onnx` writes",
            exports=write_onnx,
            opens=lambda folder: ExportedEngine(OnnxDecoder(folder)),
            packages=("onnx", "onnxscript", "onnxruntime"),
        ),
        Runtime(
            "openvino",
            "OpenVINO on what `bolaco export --openvino` writes",
            exports=_by_onnx,
            opens=lambda folder: ExportedEngine(OpenVinoDecoder(folder)),
            packages=("onnx", "onnxscript", "openvino"),
        ),
    )
}


def runtime_named(name: str) -> Runtime:
    """The runtime of a name.

    Raises:
        RecipeError: there is none.
        MissingPackageError: it needs a package that is not installed.
    """
    if name not in RUNTIMES:
        raise RecipeError(f"--runtime {name}: known are {', '.join(RUNTIMES)}{meant(name, RUNTIMES)}")
    needed(*RUNTIMES[name].packages)
    return RUNTIMES[name]
