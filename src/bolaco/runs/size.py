"""How small a result is to be: every way to ask for it becomes a keep ratio, once the model's shapes are known.

A target size counts everything that is in the weight files: matrices in their storage, embeddings, norms, biases, and
what the files say of their tensors. What is not known before the ranks are is counted as much as it can be, so the
result is never larger than asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from pydantic import ByteSize
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.errors import BudgetError
from bolaco.models.structure import Site, Structure, parameter_limit
from bolaco.models.weights import in_dtype
from bolaco.recipe.recipe import BaseRecipe, LowRankRecipe
from bolaco.storage.budget import ratio_of

R = TypeVar("R", bound=BaseRecipe)

# Bytes of a tensor's entry in a safetensors header beside its name; the entries that a factored matrix has more.
_ENTRY, _MORE_ENTRIES = 100, 3
# The same of a matrix with codes, factored or not.
_MORE_CODED, _MORE_DENSE = 5, 1


@dataclass(frozen=True)
class Shapes:
    """A model as its sizes are counted; its tensors may be on the meta device.

    Attributes:
        model: the model.
        structure: its decoder.
        dtype: number format of the result.
    """

    model: PreTrainedModel
    structure: Structure
    dtype: torch.dtype

    @property
    def linears(self) -> int:
        """Parameters of the decoder linears."""
        return sum(site.size for site in self.structure.sites)

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def bytes_in_memory(self) -> int:
        """Of its parameters as they are loaded."""
        return sum(parameter.numel() * parameter.dtype.itemsize for parameter in self.model.parameters())

    def bytes_at(self, linears: int) -> int:
        """Bytes of the model's weights with so many parameters in its decoder linears, without a header."""
        tensors = dict.fromkeys((*self.model.parameters(), *self._buffers()))
        whole = sum(tensor.numel() * self._itemsize(tensor) for tensor in tensors)
        return whole + (linears - self.linears) * self.dtype.itemsize

    def _itemsize(self, tensor: Tensor) -> int:
        return (self.dtype if tensor.dtype == self.model.dtype else tensor.dtype).itemsize

    def _buffers(self) -> Iterator[Tensor]:
        """Those that checkpoints hold."""
        saved = self.model.state_dict(keep_vars=True).keys()
        return (buffer for name, buffer in self.model.named_buffers() if name in saved)

    @property
    def header(self) -> int:
        """Bytes of the header of the weight file, at most."""
        return sum(len(name) + _ENTRY for name in self.model.state_dict())


def settled(recipe: R, shapes: Shapes) -> R:
    """The recipe with the keep ratio that its size comes to: the largest one that keeps to it.

    A size that cannot be reached becomes the smallest keep ratio there is, for the allocator to refuse.
    """
    total = shapes.linears
    if recipe.keep is not None or total == 0:
        return recipe
    if recipe.keep_model is not None:
        allowed = parameter_limit(recipe.keep_model, shapes.parameters)
        limit = allowed - (shapes.parameters - total) - _new_biases(recipe, shapes)
    else:
        assert recipe.target_size is not None  # a recipe has one of the three
        left = recipe.target_size - shapes.bytes_at(0) - shapes.header - _storage_bytes(recipe, shapes)
        limit = left // shapes.dtype.itemsize
        if isinstance(recipe, LowRankRecipe) and recipe.counts_bits:
            # What the ratio is a share of, the recipe says by going on to have a size in bytes.
            storage = recipe.priced(shapes.dtype)
            total = sum(storage.dense_cost(site) for site in shapes.structure.sites)
            return recipe.model_copy(update={"keep": ratio_of(min(max(8 * left, 1), total), total)})
    keep = ratio_of(min(max(limit, 1), total), total)
    return recipe.model_copy(update={"keep": keep, "keep_model": None, "target_size": None})


def _factored(recipe: BaseRecipe, shapes: Shapes) -> list[Site]:
    """Matrices, or stacks of them, that may be factored."""
    if not isinstance(recipe, LowRankRecipe):
        return []
    storage, multiple = recipe.form, recipe.search.rank_multiple
    units = storage.units(shapes.structure, recipe.dense_types).sites
    return [site for site in units if site.type not in recipe.dense_types and storage.max_rank(site, multiple) > 0]


def _new_biases(recipe: BaseRecipe, shapes: Shapes) -> int:
    """Parameters of the biases that factored matrices may get."""
    return new_biases(recipe, _factored(recipe, shapes))


def new_biases(recipe: BaseRecipe, factored: Iterable[Site]) -> int:
    """Parameters of the biases that matrices get when they are factored; a budget does not count them."""
    if not isinstance(recipe, LowRankRecipe) or not (recipe.chosen.method.centred or recipe.refinement.fit):
        return 0
    return sum(site.out_features for site in factored if not site.bias)


def _storage_bytes(recipe: BaseRecipe, shapes: Shapes) -> int:
    """Bytes that factored matrices may take beside the parameters that a budget counts."""
    if not isinstance(recipe, LowRankRecipe):
        return 0
    size, dtype = _new_biases(recipe, shapes) * shapes.dtype.itemsize, shapes.dtype
    if recipe.counts_bits:
        factored = {member.name for site in _factored(recipe, shapes) for member in site.members}
        for site in shapes.structure.sites:
            size += (_MORE_CODED if site.name in factored else _MORE_DENSE) * (len(site.name) + _ENTRY)
        return size
    for site in _factored(recipe, shapes):
        rank = recipe.search.rank_multiple
        bits = recipe.form.bits(site, rank, dtype) - 8 * dtype.itemsize * recipe.form.parameters(site, rank)
        # The index of a storage, and what the header says of more tensors.
        size += max(bits, 0) // 8 + _MORE_ENTRIES * sum(len(member.name) + _ENTRY for member in site.members)
    return size


@contextmanager
def refused_as_asked(recipe: BaseRecipe, shapes: Shapes) -> Iterator[None]:
    """A budget that cannot be met is refused in the words of the recipe, with the smallest one that can.

    Args:
        recipe: as it was given, not settled.
        shapes: of the model.
    """
    try:
        yield
    except BudgetError as error:
        if recipe.keep is not None or error.least is None:
            raise
        if recipe.keep_model is not None:
            least = shapes.parameters - shapes.linears + error.least + _new_biases(recipe, shapes)
            share = least / shapes.parameters
            # Rounded up: what is said must be possible.
            smallest = f"{math.ceil(share * 1e4) / 1e4:.4f} of all parameters"
        else:
            size = smallest_bytes(recipe, shapes, error.least)
            smallest = f"{size} bytes ({ByteSize(size).human_readable(decimal=True)})"
        raise BudgetError(f"{recipe.asked}: too small, the smallest possible is {smallest}", error.least) from None


def smallest_bytes(recipe: BaseRecipe, shapes: Shapes, least: int) -> int:
    """The target size that allows ``least`` parameters in the decoder linears, or bits where it counts those."""
    if isinstance(recipe, LowRankRecipe) and recipe.counts_bits:
        return shapes.bytes_at(0) + -(-least // 8) + shapes.header + _storage_bytes(recipe, shapes)
    return shapes.bytes_at(least) + shapes.header + _storage_bytes(recipe, shapes)


def saved_tensors(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a model as they are saved in a number format."""
    return in_dtype(dict(model.state_dict()), model.dtype, dtype)
