"""Quantized matrices of a block: input factors on the inputs they have, output factors on what those make of them.

The product ``B A`` of a factored matrix is the same for any scale of its components. Columns of ``B`` are given length
one, so that runs of them share a scale without loss, and the singular values go into the rows of ``A``, whose scales
absorb them. ``A`` is quantized by GPTQ (arXiv 2210.17323) under the second moment C of its input. ``B`` is then
solved for again: ``B A C Q^T (Q C Q^T)^-1`` gives, with the quantized ``Q`` in the place of ``A``, the outputs nearest
to those of ``B A``; it is quantized under ``Q C Q^T``, the second moment of what ``Q`` gives. A bias takes what is left
of the mean output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bolaco.errors import NonFiniteError
from bolaco.layers import FollowerLinear, LowRankLinear, QuantizedLinear, put_module
from bolaco.models.structure import Site, Structure
from bolaco.quantize.gptq import Feedback, gptq
from bolaco.quantize.grid import GridSpec
from bolaco.quantize.matrix import QuantizedMatrix, round_to_nearest
from bolaco.quantize.settings import WHOLE, grid_spec
from bolaco.statistics.moments import MOMENTS, Moments
from bolaco.statistics.statistic import SiteStatistics
from bolaco.storage.block import place_in_block

# Added to the diagonal, 1 at first, of what output factors are solved for with.
_RIDGE = 1e-3
# Bits of each matrix, or stack of matrices, by site name; WHOLE is not quantized.
Bits = dict[str, int]


@dataclass(frozen=True)
class RoundedPair:
    """A quantized product.

    Attributes:
        reduce: ``[rank, in]``.
        expands: one ``[out, rank]`` for each matrix that has this input factor.
    """

    reduce: QuantizedMatrix
    expands: list[QuantizedMatrix]


class InputFeedback:
    """What the inputs ``[..., columns]`` of some matrices say of errors; without inputs every error counts alike."""

    def __init__(self, moment: Tensor | None, damping: float) -> None:
        self.damping = damping
        self.known = None if moment is None else Feedback(moment, damping)

    @property
    def moment(self) -> Tensor | None:
        """Their second moment."""
        return None if self.known is None else self.known.hessian

    def round(self, weight: Tensor, spec: GridSpec) -> QuantizedMatrix:
        """A matrix ``[rows, columns]`` so that outputs change little."""
        return round_to_nearest(weight, spec) if self.known is None else gptq(weight, self.known, spec)


def round_pair(
    expands: list[Tensor], reduce: Tensor, inputs: InputFeedback, bits: int, group: int, correct: bool = True
) -> RoundedPair:
    """Quantizes products ``[out, rank] @ [rank, in]`` that have one input factor; computed in float64.

    Args:
        expands, reduce: the factors.
        inputs: of ``reduce``.
        bits: of a code.
        group: numbers of a row that share a scale.
        correct: solve for the output factors again once the input factor is quantized.
    """
    spec = grid_spec(bits, group)
    outs = [len(expand) for expand in expands]
    expand, reduce = torch.cat(expands).double(), reduce.double()
    lengths = _lengths(expand)
    expand, reduce = expand / lengths, reduce * lengths[:, None]
    first = inputs.round(reduce, spec)
    if correct:
        # What is solved for has columns of other lengths. The scales of rows take them, exactly: powers of two.
        lengths = 2.0 ** _lengths(_solved(expand, reduce, first.dense().double(), inputs.moment)).log2().round()
        first = _rows_scaled(first, lengths)
        expand = _solved(expand, reduce, first.dense().double(), inputs.moment)
    found = first.dense().double()
    after = found @ found.T if inputs.moment is None else found @ inputs.moment @ found.T
    second = InputFeedback((after + after.T) / 2, inputs.damping)
    return RoundedPair(first, [second.round(part, spec) for part in expand.split(outs)])


def _lengths(expand: Tensor) -> Tensor:
    """Of columns; 1 for those that are zero."""
    lengths: Tensor = expand.norm(dim=0)
    return lengths.where(lengths > 0, 1.0)


def _solved(expand: Tensor, reduce: Tensor, found: Tensor, moment: Tensor | None) -> Tensor:
    """The output factor that makes of ``found``'s outputs what is nearest to ``expand @ reduce``'s."""
    seen = found if moment is None else found @ moment
    size = (found * seen).sum(dim=1).sqrt()
    size = size.where(size > 0, 1.0)  # components count alike, whatever their scales
    normal = (seen @ found.T) / size / size[:, None]
    normal.diagonal().add_(_RIDGE)
    drift = (reduce - found) @ seen.T / size
    solved: Tensor = expand + expand @ torch.linalg.solve(normal, drift.T).T / size
    return solved


def _rows_scaled(matrix: QuantizedMatrix, factors: Tensor) -> QuantizedMatrix:
    grid = matrix.grid
    return replace(matrix, grid=replace(grid, scales=(grid.scales.double() * factors[:, None]).to(grid.scales.dtype)))


class BlockRounding:
    """Quantizes the matrices of decoder blocks.

    Args:
        structure: of the decoder; its sites are quantized each with its own bits.
        bits: of each site.
        group: numbers of a row that share a scale.
        damping: of the Hessians.
    """

    def __init__(self, structure: Structure, bits: Mapping[str, int], group: int, damping: float) -> None:
        self.structure, self.bits, self.group, self.damping = structure, bits, group, damping

    def run(self, layer: int, block: nn.Module, inputs: Mapping[str, SiteStatistics]) -> None:
        """Puts quantized layers into the place of every Linear of a block's matrices.

        Args:
            layer: which block.
            block: with nothing shared, every dense matrix a Linear.
            inputs: the moments of the inputs, by input group.

        Raises:
            NonFiniteError: naming the matrix.
        """
        known: dict[tuple[str, bool], InputFeedback] = {}
        for site in self.structure.of_layer(layer):
            bits = self.bits[site.name]
            if bits == WHOLE:
                continue
            layers = [block.get_submodule(place_in_block(self.structure, member)) for member in site.members]
            biased = all(_bias(found) is not None for found in layers)
            moments = inputs[site.input_group][MOMENTS] if site.input_group in inputs else None
            key = site.input_group, biased
            try:
                if key not in known:
                    known[key] = InputFeedback(_moment(moments, biased), self.damping)
                self._site(site, block, layers, known[key], moments if biased else None, bits)
            except NonFiniteError as error:
                raise NonFiniteError(f"{site.name}: {error}") from None

    def _site(
        self,
        site: Site,
        block: nn.Module,
        layers: list[nn.Module],
        inputs: InputFeedback,
        moments: Moments | None,
        bits: int,
    ) -> None:
        lead, group = layers[0], self.group
        if not isinstance(lead, LowRankLinear):
            for member, found in zip(site.members, layers, strict=True):
                assert isinstance(found, nn.Linear)
                made = quantized_linear(found, inputs.round(found.weight.detach(), grid_spec(bits, group)), group)
                _keep_mean(found.weight.double(), made.weight.double(), made.bias, moments)
                put_module(block, place_in_block(self.structure, member), made)
            return
        expands = [_expand(found) for found in layers]
        pair = round_pair([e.weight.detach() for e in expands], lead.reduce.weight.detach(), inputs, bits, group)
        before = [e.weight.double() @ lead.reduce.weight.double() for e in expands]
        reduce = quantized_linear(lead.reduce, pair.reduce, group)
        for found, expand, rounded, product in zip(layers, expands, pair.expands, before, strict=True):
            made = quantized_linear(expand, rounded, group)
            _keep_mean(product, made.weight.double() @ reduce.weight.double(), made.bias, moments)
            put_module(found, "expand", made)
        put_module(lead, "reduce", reduce)


def quantized_linear(linear: nn.Linear, matrix: QuantizedMatrix, group: int) -> QuantizedLinear:
    """The layer of a quantized matrix in the place of a Linear, whose bias it has."""
    with torch.device("meta"):
        made = QuantizedLinear(
            linear.in_features, linear.out_features, linear.bias is not None, matrix.grid.spec.bits, group
        )
    state = {"codes": matrix.codes, "scales": matrix.grid.scales.to(linear.weight.dtype)}
    if linear.bias is not None:
        state["bias"] = linear.bias.detach().clone()
    made.load_state_dict(state, assign=True)
    return made.to(linear.weight.device).requires_grad_(False).eval()


def _expand(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, LowRankLinear | FollowerLinear)
    return layer.expand


def _bias(layer: nn.Module) -> Tensor | None:
    found: Tensor | None = (_expand(layer) if isinstance(layer, LowRankLinear | FollowerLinear) else layer).bias  # type: ignore[assignment]
    return found


def _moment(moments: Moments | None, centred: bool) -> Tensor | None:
    """Centred where a bias takes what the mean of an error makes."""
    if moments is None:
        return None
    return moments.covariance if centred else moments.second_moment


def _keep_mean(before: Tensor, after: Tensor, bias: nn.Parameter | None, moments: Moments | None) -> None:
    """Adds to a bias what the mean output has lost."""
    if bias is not None and moments is not None:
        bias.data += ((before - after) @ moments.mean.to(before.device)).to(bias.dtype)
