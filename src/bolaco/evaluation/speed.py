"""Speed and memory of models: prompts and new tokens per second, peak memory, load time, operations.

Every model is measured in a process of its own, so that peak memory is its own and nothing warm is inherited.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.errors import BolacoError, DataError
from bolaco.models.load import evaluation_mode, load_model
from bolaco.models.size import bytes_in, coded_layers, parameters_in
from bolaco.models.structure import positions_of, weight_of
from bolaco.work.memory import largest_resident


@dataclass(frozen=True)
class Speed:
    """What one model needs.

    Attributes:
        model: as it was named.
        dtype: of its weights.
        parameters: of its weights; a matrix that is coded into tables counts as the matrix that it stands for.
        bytes: of its weights as they are stored.
        macs: multiplications for one token in all linear layers, the output embedding included.
        load_seconds: from nothing to a model in memory.
        peak_bytes: largest resident memory of the process (the allocator's peak on a GPU).
        prefill, decode: tokens per second by batch size: of a prompt, all positions counted; of new tokens after it.
    """

    model: str
    dtype: str
    parameters: int
    bytes: int
    macs: int
    load_seconds: float
    peak_bytes: int
    prefill: dict[int, float]
    decode: dict[int, float]


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """Median time of one call, after one that is not counted."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(torch.tensor(times, dtype=torch.float64).median())


def prefill_seconds(model: PreTrainedModel, tokens: Tensor, repeats: int) -> float:
    """Seconds of one pass over ``tokens`` ``[batch, prompt]`` up to the next token's logits."""
    return median_seconds(lambda: model(input_ids=tokens, use_cache=True, logits_to_keep=1), repeats)


def decode_seconds(model: PreTrainedModel, tokens: Tensor, new: int) -> float:
    """Seconds of one more token after ``tokens`` ``[batch, prompt]``, with the cache: the median of ``new``."""
    cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    last = tokens[:, -1:]

    def step() -> None:
        model(input_ids=last, past_key_values=cache, use_cache=True)

    return median_seconds(step, new)


def linear_macs(model: nn.Module) -> int:
    """Multiplications for one token in the linear layers of ``model``."""
    plain = sum(weight_of(m).numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    return plain + sum(layer.in_features * layer.out_features for layer in coded_layers(model))


def measure(
    model: str,
    batches: Sequence[int] = (1, 8),
    prompt: int = 256,
    new: int = 16,
    repeats: int = 3,
    dtype: str = "auto",
    device: str = "auto",
) -> Speed:
    """Measures a model in this process.

    Args:
        model: hub id, folder or ``.gguf`` file.
        batches: batch sizes.
        prompt: tokens of a prompt.
        new: new tokens; their median is taken.
        repeats: passes over the prompt; their median is taken.
        dtype, device: as in a recipe.

    Raises:
        DataError: prompt and new tokens are more than the model has positions.
    """
    start = time.perf_counter()
    loaded = load_model(model, dtype, device)
    seconds = time.perf_counter() - start
    positions = positions_of(loaded.config)
    # One step more than is counted.
    if positions is not None and prompt + new + 1 > positions:
        raise DataError(f"a prompt of {prompt} and {new} new tokens: {model} has {positions} positions; lower --prompt")
    prefill, decode = {}, {}
    generator = torch.Generator().manual_seed(0)
    with evaluation_mode(loaded), torch.inference_mode():
        for batch in batches:
            tokens = torch.randint(0, loaded.config.vocab_size, (batch, prompt), generator=generator)
            tokens = tokens.to(loaded.device)
            prefill[batch] = batch * prompt / prefill_seconds(loaded, tokens, repeats)
            decode[batch] = batch / decode_seconds(loaded, tokens, new)
    on_gpu = loaded.device.type == "cuda"
    resident = largest_resident()
    return Speed(
        model=model,
        dtype=str(loaded.dtype).removeprefix("torch."),
        parameters=parameters_in(loaded),
        bytes=bytes_in(loaded),
        macs=linear_macs(loaded),
        load_seconds=seconds,
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else resident,
        prefill=prefill,
        decode=decode,
    )


def measure_apart(model: str, **settings: Any) -> Speed:
    """:func:`measure` in a process of its own.

    Raises:
        BolacoError: what went wrong there, in one line.
    """
    words = json.dumps({"model": model, **settings})
    done = subprocess.run([sys.executable, "-m", __name__, words], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
    if "error" in found:
        raise BolacoError(found["error"])
    if not found:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise BolacoError(f"{model}: could not be measured: {said[-1].strip()}")
    for name in ("prefill", "decode"):
        found[name] = {int(batch): value for batch, value in found[name].items()}
    return Speed(**found)


def _child(words: str) -> dict[str, Any]:
    try:
        return asdict(measure(**json.loads(words)))
    except BolacoError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_child(sys.argv[1])) + "\n")
