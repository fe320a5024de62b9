"""The modelling code that a checkpoint carries, so that it loads where bolaco is not installed."""

from __future__ import annotations

import inspect

from bolaco import layers
from bolaco.checkpoint.registry import PREFIX, config_class, model_classes

MODELLING_FILE = "modeling_lowrank"

_TAIL = '''

class {config}({dense_config}):
    """Configuration of a {model_type} model with factored projections."""

    model_type = "{prefix}{model_type}"
    base_model_tp_plan = None


class {base}(LowRankMixin, {dense_base}):
    """{dense_base} with factored projections."""

    config_class = {config}


class {causal}(LowRankMixin, {dense_causal}):
    """{dense_causal} with factored projections."""

    config_class = {config}
'''


def modelling_code(model_type: str) -> str:
    """Source of the modelling file of a checkpoint: the layers, and the three classes of one model type."""
    base, causal = model_classes(model_type)
    dense_base, dense_causal = base.__mro__[2], causal.__mro__[2]
    config = config_class(model_type)
    dense_config = config.__mro__[1]
    source = inspect.getsource(layers)
    imports = "".join(
        f"from {cls.__module__} import {cls.__name__}\n" for cls in (dense_config, dense_base, dense_causal)
    )
    head, anchor, rest = source.partition("from transformers.pytorch_utils import Conv1D\n")
    return (
        head
        + imports
        + anchor
        + rest.rstrip()
        + "\n"
        + _TAIL.format(
            config=config.__name__,
            dense_config=dense_config.__name__,
            base=base.__name__,
            dense_base=dense_base.__name__,
            causal=causal.__name__,
            dense_causal=dense_causal.__name__,
            model_type=model_type,
            prefix=PREFIX,
        )
    )


def auto_map(model_type: str) -> dict[str, str]:
    """The ``auto_map`` entry of a configuration: where transformers' auto classes find the classes in that code."""
    base, causal = model_classes(model_type)
    classes = {"AutoConfig": config_class(model_type), "AutoModel": base, "AutoModelForCausalLM": causal}
    return {auto: f"{MODELLING_FILE}.{cls.__name__}" for auto, cls in classes.items()}
