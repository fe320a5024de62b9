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
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolaco.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from bolaco.layers import Entry

PREFIX = "lowrank_"
MODELLING_FILE = "modeling_lowrank"
# Of the entry "lowrank" in a configuration: 1 had no kinds.
FORMAT = 2
# Model types whose classes are registered, and what is called with one as soon as they are.
REGISTERED: list[str] = []
AFTER_REGISTERING: list[Callable[[str], None]] = []
# Auto classes that a compressed model is known to, if the dense one is.
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def is_compressed(config: Any) -> bool:
    """Whether a configuration is that of a compressed model."""
    return str(config.model_type).startswith(PREFIX)


def refuse_compressed(config: Any) -> None:
    """Raises UnsupportedModelError if this is the configuration of a compressed model already."""
    if is_compressed(config):
        raise UnsupportedModelError(
            f"the model is compressed already ({config.model_type}); compress the original, "
            "or make it dense with `bolaco export --dense`"
        )


def class_stem(causal_name: str) -> str:
    """``LlamaForCausalLM`` -> ``LowRankLlama``; ``GPT2LMHeadModel`` -> ``LowRankGPT2``."""
    for ending in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"):
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
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        lowrank = getattr(self, "lowrank", None)
        if isinstance(lowrank, dict):
            self.lowrank = lowrank = upgraded(lowrank)  # the code is of today's format
        code = _modelling_code(model_type, lowrank or {})
        (folder / f"{MODELLING_FILE}.py").write_text(code, encoding="utf-8")
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


def __getattr__(name: str) -> Any:
    # The classes of compressed types, so that what was pickled with one is found again.
    if name.startswith("LowRank"):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        # Several types can have one class: the one that it is named after comes first.
        for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, key=lambda known: known not in name.lower()):
            if name == f"LowRank{CONFIG_MAPPING_NAMES.get(model_type)}":
                return config_class(model_type)
            stem = class_stem(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
            if name.startswith(stem):
                for cls in model_classes(model_type):
                    if cls is not None and cls.__name__ == name:
                        return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def stock_config_class(model_type: str) -> Any:
    """transformers' own configuration class of ``model_type``."""
    return config_class(model_type).__mro__[1]


def _stock_classes(model_type: str) -> tuple[Any, Any]:
    """transformers' own base-model and causal-model class of ``model_type``; the first one can be None."""
    from transformers import AutoModel, AutoModelForCausalLM

    config = stock_config_class(model_type)
    base: Any = AutoModel._model_mapping.get(config, None)
    if isinstance(base, tuple):
        base = base[0]  # Funnel has one more, without a decoder
    causal = AutoModelForCausalLM._model_mapping[config]
    return (None if base is causal else base), causal


def _auto_classes(model_type: str) -> list[Any]:
    """The auto classes that load the causal model of a type."""
    import transformers

    config, (_, causal) = stock_config_class(model_type), _stock_classes(model_type)
    autos = [getattr(transformers, name) for name in _AUTO_CLASSES if hasattr(transformers, name)]
    return [auto for auto in autos if config in auto._model_mapping and auto._model_mapping[config] is causal]


@functools.cache
def model_classes(model_type: str) -> tuple[Any, Any]:
    """Base-model and causal-model class of ``lowrank_<model_type>``; the first one can be None."""
    from bolaco.layers import LowRankMixin
    from bolaco.layers.install import EntryError

    config = config_class(model_type)
    base, causal = _stock_classes(model_type)
    stem = class_stem(causal.__name__)

    class Installed(LowRankMixin):
        """Knows the layers of installed packages, and those of checkpoints of earlier versions."""

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(getattr(config, "lowrank", None), dict):
                config.lowrank = upgraded(config.lowrank)
            try:
                super().__init__(config, *args, **kwargs)
            except EntryError as error:
                raise CheckpointError(str(error)) from error

    def make(name: str, parent: Any) -> type:
        doc = f"{parent.__name__} with factored projections."
        return type(name, (Installed, parent), {"__doc__": doc, "__module__": __name__, "config_class": config})

    made = make(f"{stem}{'ForCausalLM' if _names_text_model(causal) else 'ForConditionalGeneration'}", causal)
    return None if base is None else make(f"{stem}Model", base), made


def _names_text_model(causal: Any) -> bool:
    return not causal.__name__.endswith("ForConditionalGeneration")


def upgraded(lowrank: dict[str, Any]) -> dict[str, Any]:
    """The entry "lowrank" of a configuration in today's format; layers of packages that it names are imported.

    Raises:
        CheckpointError: it is of a format that is not known, or names a kind of layer that nothing here has.
    """
    from bolaco.layers import BUILDERS
    from bolaco.models.carried import kinds_in

    if lowrank.get("format") not in (1, FORMAT) or not isinstance(lowrank.get("matrices"), dict):
        raise CheckpointError(
            f"config.json: 'lowrank' is of format {lowrank.get('format')!r}, known are 1 and {FORMAT}; "
            "take a newer bolaco, or load with trust_remote_code=True"
        )
    matrices = {}
    for name, entry in lowrank["matrices"].items():
        try:
            matrices[name] = _with_kind(entry) if lowrank["format"] == 1 else entry
            kinds = list(kinds_in(matrices[name]))
        except (AttributeError, KeyError, TypeError):
            raise CheckpointError(
                f"config.json: damaged entry in 'lowrank': {name[:200]} is no layer ({entry!r:.80})"
            ) from None
        for kind in kinds:
            if isinstance(kind, str) and kind not in BUILDERS:
                _import_layers(kind)
            if not isinstance(kind, str) or kind not in BUILDERS:
                raise CheckpointError(
                    f"config.json: {name} is a layer of kind {kind!r:.80}, which no installed package has; "
                    "install the one that made this model, or load with trust_remote_code=True"
                )
    return {"format": FORMAT, "matrices": matrices}


def _import_layers(kind: str) -> None:
    """Imports the installed packages that have layers of this kind.

    Raises:
        CheckpointError: one of them cannot be imported.
    """
    from bolaco.plugins import package_of

    for point in entry_points(group="bolaco.storages", name=kind):
        try:
            point.load()
        except (Exception, SystemExit) as error:  # the code of others
            why = " ".join(f"{type(error).__name__}: {error}".split())
            what = f"layers of kind {kind!r} of {package_of(point)} cannot be loaded from {point.value}"
            raise CheckpointError(f"config.json: {what}: {why}") from error


def _with_kind(entry: Entry) -> Entry:
    """An entry of format 1, in which the kind was to be told from the keys that were there."""
    from bolaco.layers import FollowerLinear, LeadLinear, LowRankLinear, PivotedLinear, SketchLinear, SplitLinear

    if "parts" in entry:
        return {"kind": SplitLinear.kind, "parts": [{"name": p["name"]} | _with_kind(p) for p in entry["parts"]]}
    plain = {"out": entry["out"], "rank": entry["rank"], "bias": entry["bias"]}
    if "bits" in entry:
        inner = {key: value for key, value in entry.items() if key not in ("bits", "groups")}
        coding = {"bits": entry["bits"], "groups": entry["groups"]}
        return {"kind": SketchLinear.kind, **coding, "layer": _with_kind(inner)}
    if entry["rank"] is None:
        return {"kind": "dense", "out": entry["out"], "bias": entry["bias"]}
    if "side" in entry:
        return {"kind": PivotedLinear.kind, **plain, "side": entry["side"]}
    if "shares" in entry:
        return {"kind": FollowerLinear.kind, **plain, "lead": entry["shares"]}
    return {"kind": LeadLinear.kind if entry.get("lead") else LowRankLinear.kind, **plain}


def _modelling_code(model_type: str, lowrank: dict[str, Any]) -> str:
    from bolaco.models.carried import modelling_code

    (base, causal), (dense_base, dense_causal) = model_classes(model_type), _stock_classes(model_type)
    classes = {
        "config": (config_class(model_type).__name__, stock_config_class(model_type)),
        "causal": (causal.__name__, dense_causal),
    }
    if base is not None:
        classes["base"] = (base.__name__, dense_base)
    return modelling_code(PREFIX + model_type, model_type, classes, lowrank.get("matrices", {}).values())


def auto_map(model_type: str) -> dict[str, str]:
    """The ``auto_map`` entry of a configuration: where transformers' auto classes find the classes in that code."""
    base, causal = model_classes(model_type)
    classes = {"AutoConfig": config_class(model_type)} | ({} if base is None else {"AutoModel": base})
    classes |= {auto.__name__: causal for auto in _auto_classes(model_type)}
    return {auto: f"{MODELLING_FILE}.{cls.__name__}" for auto, cls in classes.items()}


def compressed_config(model: Any, matrices: dict[str, Entry]) -> Any:
    """The configuration of the compressed model made of ``model``, whose layers ``matrices`` describes."""
    model_type = model.config.model_type
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    values.update(
        model_type=PREFIX + model_type,
        auto_map=auto_map(model_type),
        lowrank={"format": FORMAT, "matrices": matrices},
    )
    return config_class(model_type).from_dict(values)


def compressed_skeleton(model: Any, matrices: dict[str, Entry]) -> Any:
    """The compressed model made of ``model``, whose layers ``matrices`` describes, on the meta device: no memory."""
    import torch

    with torch.device("meta"):
        skeleton = model_classes(model.config.model_type)[1](compressed_config(model, matrices))
    skeleton.generation_config = model.generation_config
    return skeleton


def stock_config(config: Any) -> Any:
    """The configuration of the dense model that a compressed one was made from."""
    values: dict[str, Any] = config.to_dict()
    for key in ("lowrank", "auto_map", "architectures"):
        values.pop(key, None)
    values["model_type"] = config.model_type.removeprefix(PREFIX)
    stock: Any = type(config).__mro__[1]
    return stock.from_dict(values)


def register_config(model_type: str) -> None:
    """Makes ``AutoConfig`` know ``lowrank_<model_type>``."""
    from transformers import AutoConfig

    AutoConfig.register(PREFIX + model_type, config_class(model_type), exist_ok=True)


@functools.cache
def register_models(model_type: str) -> None:
    """Makes the auto classes know ``lowrank_<model_type>``."""
    from transformers import AutoModel

    base, causal = model_classes(model_type)
    if base is not None:
        AutoModel.register(config_class(model_type), base, exist_ok=True)
    for auto in _auto_classes(model_type):
        auto.register(config_class(model_type), causal, exist_ok=True)
    REGISTERED.append(model_type)
    for more in AFTER_REGISTERING:
        more(model_type)


class _Compressed(dict[str, Any]):
    """What transformers keeps registered configurations in, with those of compressed types made when asked for."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or _dense_type(key) is not None

    def __missing__(self, key: str) -> Any:
        model_type = _dense_type(key)
        if model_type is None:
            raise KeyError(key)
        self[key] = config_class(model_type)
        return self[key]


def _dense_type(key: object) -> str | None:
    """The type that a compressed one is of; None if it is none, or transformers has no causal model of it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not isinstance(key, str) or not key.startswith(PREFIX):
        return None
    model_type = key.removeprefix(PREFIX)
    return model_type if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def register_all() -> None:
    """Makes ``AutoConfig`` know the compressed type of every causal model; nothing is imported before it is needed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(CONFIG_MAPPING._extra_content, _Compressed):
        CONFIG_MAPPING._extra_content = _Compressed(CONFIG_MAPPING._extra_content)


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
