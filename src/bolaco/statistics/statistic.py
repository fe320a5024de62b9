"""What a statistic of a matrix is: how it is estimated, how it is stacked, how it is stored and what that costs.

There are three kinds, by where they are estimated: :class:`InputStatistic` on the forward walk, for all matrices that
share an input, and never stored; :class:`GradientStatistic` on the backward walk; :class:`FoundStatistic` by whoever
makes the subject that is factored, such as pruning. The latter two are stored block by block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from bolaco.models.structure import Site

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)


class Statistic(ABC, Generic[V]):
    """One statistic; there is a single instance of each.

    Attributes:
        name: of the folder it is stored in.
    """

    name: str

    @abstractmethod
    def stack(self, values: Sequence[V]) -> V:
        """The statistic of matrices stacked along their outputs, from theirs."""


class InputAccumulator(Protocol[V_co]):
    """Takes the inputs of some matrices as they come."""

    def update(self, x: Tensor, group: int = 0) -> None:
        """Adds vectors ``[..., d]`` of one group; NonFiniteError for a NaN or infinity among them."""

    def reduce(self) -> None:
        """Adds up what all ranks have seen, on each of them."""

    def finalize(self) -> V_co:
        """The statistic so far."""


class InputStatistic(Statistic[V]):
    """A statistic of an input ``[d]``, which the matrices that share the input have in common."""

    @abstractmethod
    def accumulator(self, dim: int, groups: int, device: torch.device) -> InputAccumulator[V]:
        """An empty accumulator for inputs of length ``dim`` that come in so many groups."""

    def stack(self, values: Sequence[V]) -> V:
        """Stacked matrices have one input."""
        return values[0]

    def numbers(self, dim: int) -> int:
        """How many float64 numbers an accumulator holds, about."""
        return dim

    def pooled(self, values: Sequence[V], counts: Sequence[int]) -> V:
        """The statistic of several sets of vectors together, from that of each and their numbers; there is one."""
        return values[0]

    def of_experts(self, values: Sequence[V | None], counts: Sequence[int], common: bool, dim: int) -> list[V]:
        """The statistics of the inputs of a block's experts, where some have seen few tokens.

        Args:
            values: of each expert, from its own tokens; None if those were too few for any.
            counts: tokens of each expert.
            common: whether the inputs of all experts are of one space, as those of their first matrices are.
            dim: length of the inputs.

        Raises:
            ValueError: there are none at all.
        """
        known = [value for value in values if value is not None]
        if not known:
            raise ValueError("no expert has seen a token")
        return [known[0] if value is None else value for value in values]


class StoredStatistic(Statistic[Tensor]):
    """A statistic of each matrix that is kept on disk."""

    @abstractmethod
    def numbers(self, site: Site) -> int:
        """How many float32 numbers are stored for a matrix."""

    def encode(self, value: Tensor) -> Tensor:
        """What is stored: float32, if a statistic does not say otherwise."""
        return value.float()

    def decode(self, stored: Tensor) -> Tensor:
        """The value again; ValueError if this cannot be what was stored."""
        return stored


# What the statistic of a block's output is called among those of its matrices.
BLOCK = "block"


class GradientAccumulator(Protocol):
    """Takes inputs and output gradients of one matrix as they come."""

    def update(self, x: Tensor, gradient: Tensor) -> None:
        """Adds inputs ``[sequences, length, in]`` and gradients ``[sequences, length, out]`` of a token's loss."""

    def reduce(self) -> None:
        """Adds up what all ranks have seen, on each of them."""

    def result(self) -> Tensor:
        """The statistic so far, float64."""


class GradientStatistic(StoredStatistic):
    """A statistic of loss gradients.

    Attributes:
        labels: whose loss it is: that of tokens sampled from the model itself, or that of the text's own.
        per_sequence: whether it needs to know which tokens are of one sequence.
        of_outputs: estimates the same for the output of a whole block, ``[d]`` wide, under the name :data:`BLOCK`,
            where blocks are run one by one; None if it does not.
    """

    labels: Literal["sampled", "text"]
    per_sequence: bool = False
    of_outputs: Callable[[int, torch.device], GradientAccumulator] | None = None

    @abstractmethod
    def accumulator(self, site: Site, device: torch.device) -> GradientAccumulator:
        """An empty accumulator for one matrix."""

    def of_experts(
        self, values: Sequence[Tensor | None], counts: Sequence[int], tokens: int, common: bool
    ) -> list[Tensor]:
        """The statistics of one matrix of each of a block's experts, where some have seen few tokens.

        Args:
            values: of each expert, from its own tokens; None if there were none.
            counts: tokens of each expert.
            tokens: all tokens of the text.
            common: whether the outputs of all experts are of one space, as those of their last matrices are.

        Raises:
            ValueError: there are none at all.
        """
        known = [value for value in values if value is not None]
        if not known:
            raise ValueError("no expert has seen a token")
        return [torch.zeros_like(known[0]) if value is None else value for value in values]


class FoundStatistic(StoredStatistic):
    """A statistic that is found while the subject is made."""


class SiteStatistics:
    """Statistics of one site: what its method needs, and nothing else.

    Attributes:
        tokens: of an expert, how many it was sent; None for others.
    """

    def __init__(self, values: Mapping[Any, Any], tokens: int | None = None) -> None:
        self.values: dict[Statistic[Any], Any] = dict(values)
        self.tokens = tokens

    def __getitem__(self, statistic: Statistic[V]) -> V:
        """The value of a statistic.

        Raises:
            LookupError: the method did not ask for it.
        """
        if statistic not in self.values:
            raise LookupError(f"statistic {statistic.name!r} was not asked for; name it under Method.needs")
        value: V = self.values[statistic]
        return value

    def with_values(self, more: Mapping[Any, Any]) -> SiteStatistics:
        """These and others, by statistic."""
        return SiteStatistics(self.values | dict(more), self.tokens)
