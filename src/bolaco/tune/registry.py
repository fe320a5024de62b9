"""The tuning modes by name."""

from __future__ import annotations

import difflib
import importlib

from bolaco.errors import RecipeError
from bolaco.tune.mode import Mode

# Name -> the module with its MODE, imported when it is used.
MODES: dict[str, str] = {
    "diagonal": "bolaco.tune.modes.diagonal",
    "factors": "bolaco.tune.modes.factors",
    "lora": "bolaco.tune.modes.lora",
    "continued": "bolaco.tune.modes.continued",
    "mixed-rank": "bolaco.tune.modes.mixed_rank",
    "sketch": "bolaco.tune.modes.sketch",
    "tt-lora": "bolaco.tune.modes.tt_lora",
}
# A file that a mode leaves beside the weights -> the mode, whose ``attach`` reads it.
ADAPTERS = {"adapter_tt.json": "tt-lora", "adapter/adapter_config.json": "lora"}


def get_mode(name: str) -> Mode:
    """The mode called ``name``.

    Raises:
        RecipeError: unknown, with what was probably meant.
    """
    if name not in MODES:
        close = difflib.get_close_matches(name, MODES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(MODES)}"
        raise RecipeError(f"mode: unknown mode {name!r}{hint}")
    mode: Mode = importlib.import_module(MODES[name]).MODE
    return mode


def list_modes() -> list[Mode]:
    """All modes."""
    return [get_mode(name) for name in MODES]
