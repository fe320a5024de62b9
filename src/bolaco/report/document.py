"""Results as one JSON document, for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bolaco.checkpoint.info import Info, info_values


def result_document(path: Path, info: Info) -> dict[str, Any]:
    """A result: where it is, and what its ``bolaco.json`` says."""
    return {"path": str(path)} | info_values(info)
