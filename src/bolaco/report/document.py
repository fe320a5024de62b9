"""Results as one JSON document, for programs: strict JSON, in which what is not finite is a string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic_core import to_json

from bolaco.checkpoint.info import Info, info_values


def document(value: Any) -> str:
    """The text of a value: records, data classes, and what they are made of."""
    return to_json(value, indent=1, inf_nan_mode="strings").decode()


def result_document(path: Path, info: Info) -> dict[str, Any]:
    """A result: where it is, and what its ``bolaco.json`` says."""
    return {"path": str(path)} | info_values(info)
