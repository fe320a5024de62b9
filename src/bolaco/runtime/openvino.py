"""Models for OpenVINO, made from ONNX files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from bolaco.errors import CheckpointError, UnsupportedModelError
from bolaco.runtime.decoder import Arrays, Decoder
from bolaco.runtime.onnx import FILE as ONNX_FILE
from bolaco.runtime.onnx import SHAPES_FILE, needed, read_shapes

FILE = "openvino_model.xml"


def write_openvino(exported: Path, folder: Path) -> None:
    """Writes ``openvino_model.xml`` and ``.bin`` from the ONNX file in ``exported``, in its number format.

    Raises:
        MissingPackageError: openvino is not installed.
        UnsupportedModelError: OpenVINO cannot convert it.
    """
    needed("openvino")
    import openvino

    if folder != exported:
        shutil.copy(exported / SHAPES_FILE, folder / SHAPES_FILE)
    try:
        openvino.save_model(openvino.convert_model(exported / ONNX_FILE), folder / FILE, compress_to_fp16=False)
    except Exception as error:  # its own classes
        raise UnsupportedModelError(
            f"OpenVINO cannot convert the model: {' '.join(str(error).split())[:300]}"
        ) from error


class OpenVinoDecoder(Decoder):
    """An exported folder in OpenVINO, on the CPU, computing in float32.

    Raises:
        MissingPackageError: openvino is not installed.
        CheckpointError: nothing there that it can load.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        needed("openvino")
        import openvino

        super().__init__(read_shapes(folder))
        # On CPUs with instructions for bfloat16 it would compute in that unasked.
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        }
        try:
            self._model = openvino.Core().compile_model(folder / FILE, "CPU", settings)
        except Exception as error:  # its own classes
            raise CheckpointError(f"{folder / FILE}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        self._inputs = [port.get_any_name() for port in self._model.inputs]
        self._outputs = [port.get_any_name() for port in self._model.outputs]

    def run(self, inputs: Arrays) -> Arrays:
        """One call; inputs that the graph has no use for are left out."""
        made = self._model({name: np.ascontiguousarray(inputs[name]) for name in self._inputs})
        return {name: np.array(made[index]) for index, name in enumerate(self._outputs)}
