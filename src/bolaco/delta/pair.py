"""A base and what was fine-tuned from it: whether they belong together, and what differs between them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.errors import UnsupportedModelError
from bolaco.models.adapters import is_delta
from bolaco.models.load import resolve
from bolaco.models.lowrank import refuse_compressed
from bolaco.models.structure import Site, Structure, prefix_of, weight_of
from bolaco.models.subject import Subject

# Elements that are hashed at once.
_PIECE = 2**22


@dataclass(frozen=True)
class DeltaSubject(Subject):
    """What fine-tuning added to each matrix; ``model`` is the fine-tuned one.

    Attributes:
        base: the model it was made from.
    """

    base: PreTrainedModel

    def matrix(self, site: Site) -> Tensor:
        """Tuned minus base, ``[out, in]``, float32 (float64 of float64 models)."""
        tuned = super().matrix(site)
        exact = torch.promote_types(tuned.dtype, torch.float32)
        before = weight_of(self.base.base_model.get_submodule(site.module))[slice(*site.rows)].detach()
        return tuned.to(exact) - before.to(exact)


def refuse_delta(model: str) -> None:
    """Raises UnsupportedModelError if this is a delta, or another adapter, and not a model."""
    found = resolve(model)
    if found.adapter is not None and is_delta(found.adapter):
        raise UnsupportedModelError(
            f"{model}: a delta for {found.path}, not a model; make it one with `bolaco delta apply` first"
        )


def check_pair(base: str, tuned: str, configs: tuple[Any, Any], tokenizers: tuple[Any, Any]) -> None:
    """Stops, before any weight is read, where there is no delta between two models.

    Raises:
        UnsupportedModelError: another family, other sizes, a resized vocabulary or another tokenizer.
    """
    for config in configs:
        refuse_compressed(config)
    types = [config.model_type for config in configs]
    if types[0] != types[1]:
        raise UnsupportedModelError(f"{tuned}: a {types[1]} model, but {base} is of type {types[0]}; name its own base")
    sizes = [getattr(config, "vocab_size", None) for config in configs]
    if sizes[0] != sizes[1]:
        raise UnsupportedModelError(
            f"{tuned}: its embeddings were resized to {sizes[1]} tokens, {base} has {sizes[0]}; "
            "a delta needs the same vocabulary, resize the base's to it and fine-tune from that"
        )
    words = [tokenizer.get_vocab() for tokenizer in tokenizers]
    if words[0] != words[1]:
        odd = min(words[0].items() ^ words[1].items())[0]
        raise UnsupportedModelError(
            f"{tuned}: another tokenizer than that of {base} ({len(words[1])} and {len(words[0])} tokens, {odd!r:.40} "
            "is not the same); name the base it was fine-tuned from"
        )


def check_shapes(base: str, tuned: str, models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Stops where a tensor of one model is not in the other, or of another shape.

    Raises:
        UnsupportedModelError: naming the tensor and both shapes.
    """
    before, after = ({name: tuple(t.shape) for name, t in model.state_dict().items()} for model in models)
    for name in [*before, *after]:
        shapes = before.get(name), after.get(name)
        if shapes[0] != shapes[1]:
            found = ["not there" if shape is None else " x ".join(map(str, shape)) for shape in shapes]
            raise UnsupportedModelError(
                f"{name}: {found[1]} in {tuned}, {found[0]} in {base}; a delta needs two models of the same sizes"
            )


def base_digest(model: PreTrainedModel) -> str:
    """SHA-256 of every parameter's name, shape and values, which does not change with the number format they are in.

    The values are those of the model in the format in which it is stored, or in a wider one.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(repr((name, tuple(parameter.shape))).encode())
        for piece in parameter.detach().reshape(-1).split(_PIECE):
            exact = piece.to(torch.promote_types(piece.dtype, torch.float32))
            digest.update(exact.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def differing(base: PreTrainedModel, tuned: PreTrainedModel) -> Iterator[str]:
    """Names of the tensors of a checkpoint that are not the same in both; of tied ones the first."""
    before, seen = base.state_dict(), set()
    for name, after in tuned.state_dict().items():
        place = (after.data_ptr(), tuple(after.shape), after.stride())
        if place in seen and after.numel():
            continue
        seen.add(place)
        if not torch.equal(before[name].to(after.device, torch.float64), after.to(torch.float64)):
            yield name


@dataclass(frozen=True)
class Rest:
    """What differs beside the matrices of the decoder's blocks; it is stored as it is in the fine-tuned model.

    Attributes:
        tensors: by their names in the model.
        embeddings: which of them are embeddings of tokens, or the head.
    """

    tensors: Mapping[str, Tensor]
    embeddings: frozenset[str]

    def bits(self, embeddings: bool) -> int:
        """Of those that are embeddings, or of those that are not."""
        chosen = [t for name, t in self.tensors.items() if (name in self.embeddings) == embeddings]
        return sum(8 * tensor.numel() * tensor.element_size() for tensor in chosen)


def rest_of(base: PreTrainedModel, tuned: PreTrainedModel, structure: Structure, dtype: torch.dtype) -> Rest:
    """What differs beside the matrices; floating-point tensors in ``dtype``, in which the fine-tuned model is stored.

    Args:
        base, tuned: as they were loaded, with fused experts as one tensor.
        structure: whose sites are the matrices.
        dtype: number format.
    """
    covered = covered_weights(tuned, structure)
    found = {}
    state = tuned.state_dict()
    for name in differing(base, tuned):
        if name not in covered:
            tensor = state[name].detach()
            found[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
    ends = [tuned.get_input_embeddings(), tuned.get_output_embeddings()]
    own = {p.data_ptr() for end in ends if end is not None for p in end.parameters()}
    return Rest(found, frozenset(name for name in found if state[name].data_ptr() in own))


def covered_weights(model: PreTrainedModel, structure: Structure) -> set[str]:
    """Names of the weights that the sites make up."""
    prefix = prefix_of(model)
    found = set()
    for layer in range(structure.num_layers):
        for module in structure.modules(layer):
            found.add(f"{prefix}{module}.weight")
    return found
