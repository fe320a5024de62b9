"""What a form is: the delta of one matrix as it is stored, with its cost to the last bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from bolaco.errors import CheckpointError
from bolaco.plugins import Registry, in_folder
from bolaco.settings import Values, first_problem

S = TypeVar("S", bound=BaseModel)


class Form(ABC):
    """The delta D ``[out, in]`` of one matrix.

    Attributes:
        name: of the form, as ``bolaco.json`` has it.
        paper, summary: where it is from, and what it is.
        shape: ``[out, in]``.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    summary: ClassVar[str]
    shape: tuple[int, int]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by names of its own."""

    @abstractmethod
    def entry(self) -> Values:
        """What must be known beside the tensors and the shape."""

    @classmethod
    @abstractmethod
    def read(cls, entry: Values, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Form:
        """The form again.

        Raises:
            CheckpointError: these are not what was stored.
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """D, float32 ``[out, in]``."""

    def times(self, x: Tensor) -> Tensor:
        """``x D^T`` for ``x`` ``[..., in]``, in the number format of ``x``."""
        return x @ self.dense().to(x.dtype).T

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """B ``[out, rank]`` and A ``[rank, in]``, float32, with D = B A; None of a form that is no product."""
        return None

    @property
    def bits(self) -> int:
        """Bits of all that is stored."""
        return sum(8 * tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def rank(self) -> int | None:
        """Of the product; None of a form that is none."""
        return None

    def plan(self) -> str:
        """How the bits are spent, in a few words."""
        return self.summary


def values_of(section: type[S], entry: Values) -> S:
    """The entry of a form as it should be.

    Raises:
        CheckpointError: it is not.
    """
    try:
        return section.model_validate(entry)
    except ValidationError as error:
        raise CheckpointError(f"damaged ({first_problem(error, 'the entry')})") from None


def expect(tensors: Mapping[str, Tensor], **wanted: tuple[torch.dtype, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless there are exactly these tensors, of these types and shapes."""
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise CheckpointError(f"tensor {name} is {_shown(found.get(name))}, not {_shown(wanted.get(name))}")


def _shown(found: tuple[Any, ...] | None) -> str:
    return "not there" if found is None else f"{str(found[0]).removeprefix('torch.')} {list(found[1])}"


FORMS: Registry[Any] = Registry("form of a delta", "form", object, in_folder("bolaco.delta.forms", "FORM"))


def read_form(name: str, entry: Values, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Form:
    """A form by its name.

    Raises:
        CheckpointError: unknown, or not what was stored.
    """
    if name not in FORMS:
        raise CheckpointError(f"its form {name!r:.40} is not known; take a newer bolaco")
    kind: type[Form] = FORMS.get(name)
    return kind.read(entry, tensors, shape)
