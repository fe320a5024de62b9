"""``bolaco.json``: everything measured about a compressed folder; ``curves.json``: what its report draws beside it."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bolaco.errors import CheckpointError

INFO_FILE = "bolaco.json"
CURVES_FILE = "curves.json"
# {"format": 1, "matrices": {site: {"shape": [out, in], "energy": [..], "kept": ..}}, "refinement": {layer: [..]}}: see
# bolaco.report.curves; refinement has the losses of a block's training, thinned.
Curves = dict[str, Any]
_PACKAGES = ("bolaco", "torch", "transformers", "safetensors", "botorch", "optuna")


def versions(*more: str) -> dict[str, str]:
    """Versions of what produced a result; ``more`` names further packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in (*_PACKAGES, *more)}


def write_info(folder: Path, info: dict[str, Any]) -> None:
    """Writes ``bolaco.json``."""
    (folder / INFO_FILE).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def read_info(folder: str | Path, compressed: bool = True) -> dict[str, Any]:
    """Reads ``bolaco.json`` of a compressed folder, or of any that bolaco wrote if ``compressed`` is false.

    Raises:
        CheckpointError: the folder has none, or it is damaged.
    """
    path = Path(folder).expanduser() / INFO_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{folder}: no {INFO_FILE} in it; not a folder that `bolaco compress` wrote") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    if not isinstance(info, dict):
        raise CheckpointError(f"{path}: damaged (a {type(info).__name__}, not an object)")
    if not compressed and "tuning" in info and "ranks" not in info:
        return info
    missing = {"ranks", "keep_linears", "recipe"} - info.keys()
    if missing:
        raise CheckpointError(f"{path}: damaged, without {', '.join(sorted(missing))}")
    return info


def write_curves(folder: Path, curves: Curves) -> None:
    """Writes ``curves.json``."""
    (folder / CURVES_FILE).write_text(json.dumps(curves) + "\n", encoding="utf-8")


def read_curves(folder: str | Path) -> Curves:
    """Reads ``curves.json``; a folder that was written before there was one has no curves.

    Raises:
        CheckpointError: damaged.
    """
    path = Path(folder).expanduser() / CURVES_FILE
    if not path.exists():
        return {"format": 1, "matrices": {}, "refinement": {}}
    try:
        curves: Curves = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(curves[part], dict) for part in ("matrices", "refinement")):
            raise ValueError("other fields than expected")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    return curves


def weight_bytes(folder: Path) -> int:
    """Bytes of the model's weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
