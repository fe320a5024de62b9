"""Low-rank adapters (LoRA, arXiv 2106.09685) by PEFT: on factored matrices, on dense ones, or on both.

A factored matrix consists of Linears, each of which gets an adapter of its own. When the adapters are merged, which is
the default, ranks and size of the model stay as they are. Otherwise the model is written as it was, with a standard
PEFT adapter in its folder ``adapter``, which ``bolaco.load`` and bolaco's commands put on.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors.torch import save_file
from transformers import PreTrainedModel

from bolaco.errors import UnsupportedModelError
from bolaco.layers import FactoredLinear
from bolaco.models.adapters import LARGEST_RANK, PEFT_FOLDER, attach_peft, import_peft
from bolaco.models.quiet import quiet
from bolaco.tune.mode import Context, Defaults, Mode, Options, Prepared

_NOTE = (
    "The adapter is a PEFT folder, `adapter`: `bolaco.load` puts it on, or `PeftModel.from_pretrained(model, "
    '"FOLDER/adapter")`. Stock transformers loads the model without it, as it was before tuning.'
)


class LoraOptions(Options):
    """Size and place of the adapters."""

    rank: int = Field(8, gt=0, le=LARGEST_RANK)
    alpha: int = Field(16, gt=0, description="an adapter's output is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1)
    on: Literal["factored", "dense", "all"] = Field("all", description="which matrices get adapters")
    merge: bool = Field(True, description="false: keep the adapters in a folder of their own")


def check(context: Context) -> None:
    """Raises MissingPackageError if PEFT is not installed, UnsupportedModelError if there is nothing to adapt."""
    import_peft()
    _linears(context, context.options.on)


def prepare(context: Context) -> Prepared:
    """Adds the adapters, whose parameters require gradients."""
    peft = import_peft()
    options: LoraOptions = context.options
    names = _linears(context, options.on)
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=names,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with quiet(), warnings.catch_warnings():
        # GPT-2's Conv1D stores the transpose; PEFT sees that by itself, and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        adapted: Any = peft.get_peft_model(context.model, config)
    if options.merge:
        return Prepared(adapted.merge_and_unload, frozenset(f"{name}.weight" for name in names))
    kept: dict[str, Any] = {}

    def finish() -> PreTrainedModel:
        kept.update({key: value.contiguous() for key, value in peft.get_peft_model_state_dict(adapted).items()})
        model: PreTrainedModel = adapted.unload()
        return model

    def save(folder: Path) -> None:
        config.inference_mode, config.base_model_name_or_path = True, context.settings.model
        config.save_pretrained(str(folder / PEFT_FOLDER))
        save_file(kept, folder / PEFT_FOLDER / "adapter_model.safetensors", metadata={"format": "pt"})

    return Prepared(finish, frozenset(), save_extra=save, note=_NOTE)


def _linears(context: Context, on: str) -> list[str]:
    """Names of the modules that get an adapter; ``on`` as in the options.

    Raises:
        UnsupportedModelError: there is none.
    """
    names = []
    for matrix in context.factored if on == "factored" else context.matrices:
        module = matrix.of(context.model)
        if not isinstance(module, FactoredLinear):
            names += [matrix.name]
        elif on != "dense":
            # One of them can be empty: at full rank pivots leave nothing to be made from them.
            names += [f"{matrix.name}.{part}" for part, linear in module.linears().items() if linear.weight.numel()]
    if not names:
        raise UnsupportedModelError(f"{context.settings.model}: there is no {on} matrix to put an adapter on")
    return names


MODE = Mode(
    name="lora",
    paper="arXiv 2106.09685",
    summary="adapters on the factors and on dense matrices, merged or kept apart (LoRA, by PEFT)",
    defaults=Defaults(learning_rate=2e-4, warmup=0.05, schedule="linear"),
    prepare=prepare,
    check=check,
    options=LoraOptions,
    attach=attach_peft,
)
