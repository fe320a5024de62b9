"""Model classes of compressed checkpoints, and how transformers comes to know them.

The class for a type ``X`` is transformers' own class for ``X`` with :class:`bolaco.layers.LowRankMixin` in front,
under the model type ``lowrank_X``. ``import bolaco`` must cost nothing where transformers is not used, and little
where it is: configurations are registered when transformers' auto classes are first imported, the model classes of a
type when the first configuration of that type is made.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

PREFIX = "lowrank_"
# Types registered by `import bolaco`. Any other type whose structure is understood compresses too; its checkpoints
# load with trust_remote_code=True, or through bolaco's own commands.
MODEL_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
    "olmo2",
    "smollm3",
    "gpt2",
    "opt",
)


def class_stem(causal_name: str) -> str:
    """``LlamaForCausalLM`` -> ``LowRankLlama``; ``GPT2LMHeadModel`` -> ``LowRankGPT2``."""
    for ending in ("ForCausalLM", "LMHeadModel"):
        causal_name = causal_name.removesuffix(ending)
    return f"LowRank{causal_name}"


@functools.cache
def config_class(model_type: str) -> Any:
    """Configuration class of ``lowrank_<model_type>``."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    base = CONFIG_MAPPING[model_type]

    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:
        register_models(model_type)
        return object.__new__(cls)

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        # Whoever saves a configuration, or a model with it, saves the code that its auto_map names.
        from bolaco.checkpoint.modelling import MODELLING_FILE, modelling_code

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{MODELLING_FILE}.py").write_text(modelling_code(model_type), encoding="utf-8")
        return base.save_pretrained(self, save_directory, *args, **kwargs)

    return type(
        f"LowRank{base.__name__}",
        (base,),
        {
            "__doc__": f"Configuration of a {model_type} model with factored projections.",
            "__module__": __name__,
            "__new__": __new__,
            "save_pretrained": save_pretrained,
            "model_type": PREFIX + model_type,
            # The plan names the dense projections; a factored layer cannot be sharded by it.
            "base_model_tp_plan": None,
        },
    )


@functools.cache
def model_classes(model_type: str) -> tuple[Any, Any]:
    """Base-model and causal-model class of ``lowrank_<model_type>``."""
    from transformers import AutoModel, AutoModelForCausalLM

    from bolaco.layers import LowRankMixin

    config = config_class(model_type)
    dense_config = config.__mro__[1]
    base: Any = AutoModel._model_mapping[dense_config]
    causal: Any = AutoModelForCausalLM._model_mapping[dense_config]
    stem = class_stem(causal.__name__)

    def make(name: str, parent: Any) -> type:
        doc = f"{parent.__name__} with factored projections."
        return type(name, (LowRankMixin, parent), {"__doc__": doc, "__module__": __name__, "config_class": config})

    return make(f"{stem}Model", base), make(f"{stem}ForCausalLM", causal)


def register_config(model_type: str) -> None:
    """Makes ``AutoConfig`` know ``lowrank_<model_type>``."""
    from transformers import AutoConfig

    AutoConfig.register(PREFIX + model_type, config_class(model_type), exist_ok=True)


@functools.cache
def register_models(model_type: str) -> None:
    """Makes ``AutoModel`` and ``AutoModelForCausalLM`` know ``lowrank_<model_type>``."""
    from transformers import AutoModel, AutoModelForCausalLM

    base, causal = model_classes(model_type)
    AutoModel.register(config_class(model_type), base, exist_ok=True)
    AutoModelForCausalLM.register(config_class(model_type), causal, exist_ok=True)


def register_all() -> None:
    """Registers the configurations of :data:`MODEL_TYPES` that this transformers has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for model_type in MODEL_TYPES:
        if model_type in CONFIG_MAPPING_NAMES:
            register_config(model_type)


def register_when_imported() -> None:
    """Registers as soon as transformers' auto classes are imported, now if they are already.

    Configuration modules need ``modeling_auto`` to be complete, so that is what is waited for; where only
    ``AutoConfig`` is used it is imported for the purpose.
    """
    import wrapt

    auto = "transformers.models.auto"

    def complete(_: Any) -> None:
        if f"{auto}.modeling_auto" not in sys.modules:
            importlib.import_module(f"{auto}.modeling_auto")

    wrapt.register_post_import_hook(lambda _: register_all(), f"{auto}.modeling_auto")
    wrapt.register_post_import_hook(complete, f"{auto}.configuration_auto")


def register_folder(path: str | Path) -> None:
    """Registers the type of one local checkpoint, whichever it is; other paths are left alone."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    model_type = config.get("model_type", "") if isinstance(config, dict) else ""
    if isinstance(model_type, str) and model_type.startswith(PREFIX):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if model_type.removeprefix(PREFIX) in CONFIG_MAPPING_NAMES:
            register_config(model_type.removeprefix(PREFIX))
