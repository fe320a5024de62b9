"""Weights as they lie on disk: their bytes, and the number format that most of them have."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bolaco.models.load import Source, resolve

# What safetensors and GGUF files call number formats that tensors have in memory too.
_FORMATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_INDEX = "model.safetensors.index.json"
# A header is JSON; a file whose first bytes say more than that is none.
_LARGEST_HEADER = 2**27


@dataclass(frozen=True)
class StoredWeights:
    """What of a model lies on disk.

    Attributes:
        bytes: of its weight files.
        format: of most of the weights, such as ``bfloat16`` or ``Q4_1``; empty where the files do not say.
        gguf: whether it is a GGUF file, whose weights are float32 once they are read.
    """

    bytes: int
    format: str
    gguf: bool = False

    @property
    def quantized(self) -> bool:
        """Whether most weights are in a format that tensors in memory do not have."""
        return bool(self.format) and self.format not in _FORMATS.values()

    def bytes_in(self, dtype: str) -> int:
        """What the weights take in memory in a number format; ``auto`` is the one they have."""
        wanted = self.format if dtype == "auto" else dtype
        if {wanted, self.format} - set(_FORMATS.values()):
            return self.bytes
        return self.bytes * named_dtype(wanted).itemsize // named_dtype(self.format).itemsize


def stored_weights(model: str) -> StoredWeights | None:
    """The weights of a model on disk, a hub id's where they are in the cache; None where there are none."""
    source = resolve(model)
    if source.gguf:
        file = Path(source.path) / source.gguf
        return StoredWeights(file.stat().st_size, _gguf_format(file), gguf=True)
    folder = _folder(source)
    files = [] if folder is None else weight_files(folder)
    if not files:
        return None
    sizes: Counter[str] = Counter()
    for file in files:
        sizes.update(_header_formats(file))
    return StoredWeights(sum(file.stat().st_size for file in files), _most(sizes))


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights of a folder from."""
    try:
        names: Iterable[str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        indexed = [folder / name for name in sorted(set(names))]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        indexed = []
    for files in ([folder / "model.safetensors"], indexed, sorted(folder.glob("pytorch_model*.bin"))):
        if files and all(file.is_file() for file in files):
            return files
    return []


def _folder(source: Source) -> Path | None:
    """Where a model's files are; a hub id's, once it was loaded, in the cache."""
    if Path(source.path).is_dir():
        return Path(source.path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(source.path, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _gguf_format(file: Path) -> str:
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(file).tensors
    except Exception:  # noqa: BLE001 - a file can hold anything; loading it says what is wrong
        return ""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    return _most(sizes)


def _header_formats(file: Path) -> Counter[str]:
    """Bytes of each number format in a safetensors file, by its header; nothing of other files."""
    sizes: Counter[str] = Counter()
    if file.suffix != ".safetensors":
        return sizes
    try:
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(length)) if length < _LARGEST_HEADER else {}
        for name, entry in header.items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                sizes[str(entry["dtype"])] += int(end) - int(first)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Counter()  # damaged: loading it says so
    return sizes


def _most(sizes: Counter[str]) -> str:
    name = sizes.most_common(1)[0][0] if sizes else ""
    return _FORMATS.get(name, name)


def result_dtype(asked: str, stored: StoredWeights | None, memory: torch.dtype) -> torch.dtype:
    """The number format of a compressed model.

    Args:
        asked: a name, or ``auto``: that of the source, bfloat16 where the source is quantized.
        stored: the source on disk; None where the model is only in memory.
        memory: the format of the model in memory.
    """
    if asked != "auto":
        return named_dtype(asked)
    if stored is not None and stored.quantized:
        return torch.bfloat16
    return named_dtype(stored.format) if stored is not None and stored.gguf and stored.format else memory


def named_dtype(name: str) -> torch.dtype:
    """The number format of this name."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)  # names come from options and headers that were looked at
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` and the like."""
    return str(dtype).removeprefix("torch.")


def in_dtype(tensors: dict[str, Tensor], old: torch.dtype, new: torch.dtype) -> dict[str, Tensor]:
    """Tensors by name, those of one number format in another; what shared memory still does."""
    if old == new:
        return tensors
    made: dict[tuple[object, ...], Tensor] = {}

    def converted(tensor: Tensor) -> Tensor:
        if tensor.dtype != old:
            return tensor
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if place not in made:
            made[place] = tensor.to(new)
        return made[place]

    return {name: converted(tensor) for name, tensor in tensors.items()}
