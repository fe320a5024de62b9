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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.errors import BolacoError, DataError, UnsupportedModelError, no_memory
from bolaco.evaluation.engines import Engine, runtime_named
from bolaco.models.load import evaluation_mode, load_config, load_model, resolve
from bolaco.models.size import bytes_in, coded_layers, parameters_in
from bolaco.models.structure import positions_of, weight_of
from bolaco.work.memory import largest_resident

# Beside an exported model: what it is.
FACTS = "facts.json"


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
        runtime: what computed it.
        file_bytes: of the files its weights are in, 0 if these are not here; exported ones with their graph.
        resident_bytes: resident memory of the process in the end.
        first_token_seconds: from the first prompt, of the first batch size, to its next token's logits. What a runtime
            prepares then, such as compiling, is in it.
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
    runtime: str = "eager"
    file_bytes: int = 0
    resident_bytes: int = 0
    first_token_seconds: float = 0.0


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


def step_seconds(engine: Engine, tokens: Tensor, repeats: int, new: int) -> tuple[float, float]:
    """Seconds of one pass over prompts ``[batch, n]``, and of one more token after them: medians of so many."""
    prefill = median_seconds(lambda: engine.start(tokens), repeats)
    return prefill, median_seconds(lambda: engine.step(tokens[:, -1:]), new)


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
    runtime: str = "eager",
    exported: str = "",
) -> Speed:
    """Measures a model in this process.

    Args:
        model: hub id, folder or ``.gguf`` file.
        batches: batch sizes.
        prompt: tokens of a prompt.
        new: new tokens; their median is taken.
        repeats: passes over the prompt; their median is taken.
        dtype, device: as in a recipe; exported models are in float32 and on the CPU.
        runtime: a name in :data:`bolaco.evaluation.engines.RUNTIMES`.
        exported: the folder that the model was exported to, of a runtime that needs one.

    Raises:
        DataError: prompt and new tokens are more than the model has positions.
        RecipeError: there is no such runtime.
        UnsupportedModelError: the model cannot be run.
        BolacoError: the model cannot be loaded in it.
    """
    kind = runtime_named(runtime)
    config = load_config(model)
    positions = positions_of(config)
    # One step more than is counted.
    if positions is not None and prompt + new + 1 > positions:
        raise DataError(f"a prompt of {prompt} and {new} new tokens: {model} has {positions} positions; lower --prompt")
    start = time.perf_counter()
    if kind.torch is None:
        assert kind.opens is not None
        engine, where = kind.opens(Path(exported)), torch.device("cpu")
        seconds = time.perf_counter() - start
        facts = json.loads((Path(exported) / FACTS).read_text(encoding="utf-8"))
    else:
        loaded = load_model(model, dtype, device)
        facts = facts_of(model, loaded)
        with evaluation_mode(loaded), torch.no_grad():
            engine, where = kind.torch(loaded), loaded.device
        seconds = time.perf_counter() - start
    prefill, decode = {}, {}
    generator = torch.Generator().manual_seed(0)
    first = 0.0
    with torch.no_grad() if kind.compiles else torch.inference_mode():
        for batch in batches:
            tokens = torch.randint(0, config.vocab_size, (batch, prompt), generator=generator).to(where)
            start = time.perf_counter()
            _begin(engine, tokens, model)
            first = first or time.perf_counter() - start
            seconds_of = step_seconds(engine, tokens, repeats, new)
            prefill[batch], decode[batch] = batch * prompt / seconds_of[0], batch / seconds_of[1]
    on_gpu = where.type == "cuda"
    return Speed(
        model=model,
        **facts,
        load_seconds=seconds,
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else largest_resident(),
        prefill=prefill,
        decode=decode,
        runtime=runtime,
        file_bytes=sum(file.stat().st_size for file in weight_files(model, exported)),
        resident_bytes=psutil.Process().memory_info().rss,
        first_token_seconds=first,
    )


def _begin(engine: Engine, tokens: Tensor, name: str) -> None:
    """The first prompts: a configuration can be one that no weights fit, and that shows only here."""
    try:
        engine.start(tokens)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        if no_memory(error):
            raise
        why = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(f"{name}: cannot be run on token ids alone: {why}") from error


def facts_of(name: str, model: PreTrainedModel) -> dict[str, Any]:
    """What of a :class:`Speed` does not depend on how the model is run."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": parameters_in(model),
        "bytes": bytes_in(model),
        "macs": linear_macs(model),
    }


def weight_files(model: str, exported: str = "") -> list[Path]:
    """The files that the weights of a model are in; none that are not on this machine under a path."""
    if exported:
        return [file for file in Path(exported).iterdir() if file.name != FACTS]
    source = resolve(model)
    if source.gguf:
        return [Path(source.path) / source.gguf]
    folder = Path(source.path)
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return found if folder.is_dir() else []


def measure_apart(model: str, **settings: Any) -> Speed:
    """:func:`measure` in a process of its own; what is exported for it is in another one, and is not kept.

    Raises:
        BolacoError: what went wrong there, in one line.
    """
    runtime = runtime_named(settings.get("runtime", "eager"))
    with TemporaryDirectory(prefix="bolaco-") as folder:
        if runtime.exports is not None:
            _apart(model, {"model": model, "runtime": runtime.name, "folder": folder})
            settings["exported"] = folder
        found = _apart(model, {"model": model, **settings})
    for name in ("prefill", "decode"):
        found[name] = {int(batch): value for batch, value in found[name].items()}
    return Speed(**found)


def _apart(model: str, words: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", __name__, json.dumps(words)], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
    if "error" in found:
        raise BolacoError(found["error"])
    if not found:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise BolacoError(f"{model}: could not be measured: {said[-1].strip()}")
    return found


def _child(words: str) -> dict[str, Any]:
    given = json.loads(words)
    try:
        return _exported(**given) if "folder" in given else asdict(measure(**given))
    except BolacoError as error:
        return {"error": str(error)}


def _exported(model: str, runtime: str, folder: str) -> dict[str, Any]:
    """Writes a model for a runtime, and what it is beside it."""
    loaded = load_model(model, dtype="float32", device="cpu")
    export = runtime_named(runtime).exports
    assert export is not None
    export(loaded, Path(folder))
    facts = facts_of(model, loaded)
    (Path(folder) / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return facts


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_child(sys.argv[1])) + "\n")
