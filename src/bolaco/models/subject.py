"""What is factored: the matrices of a model, or whatever else there is one of for each matrix of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.models.structure import Site, Structure, weight_of


@dataclass(frozen=True)
class Subject:
    """The matrices of a model. A subclass has others of the same shapes, such as what fine-tuning added to each.

    Attributes:
        model: the model whose activations and gradients weigh the errors.
        structure: its decoder; the sites are what is factored, one factorization each.
    """

    model: PreTrainedModel
    structure: Structure

    def matrix(self, site: Site) -> Tensor:
        """One matrix of the model, ``[out, in]``, detached; a view where the layout allows. Subclasses override it."""
        return weight_of(self.model.base_model.get_submodule(site.module))[slice(*site.rows)].detach()

    def offset(self, site: Site) -> Tensor | None:
        """The bias that belongs to one matrix, ``[out]``, detached, or None. Subclasses override it."""
        bias = getattr(self.model.base_model.get_submodule(site.module), "bias", None)
        return None if bias is None else bias[slice(*site.rows)].detach()

    def weight(self, site: Site) -> Tensor:
        """What is factored for a site, ``[out, in]``: its matrix, or those of its members stacked."""
        matrices = [self.matrix(member) for member in site.members]
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices)

    def bias(self, site: Site) -> Tensor | None:
        """Bias of a site, ``[out]``, or None; of a stack's matrices without one it is zero if another has one."""
        biases = [(self.offset(member), member.out_features) for member in site.members]
        known = next((bias for bias, _ in biases if bias is not None), None)
        if known is None or len(biases) == 1:
            return known
        return torch.cat([known.new_zeros(rows) if bias is None else bias for bias, rows in biases])

    def save_extra(self, folder: Path) -> None:
        """Writes into a result's folder what belongs to it beside the model: nothing, if a subclass has nothing."""
