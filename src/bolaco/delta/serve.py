"""One base in memory and any number of deltas beside it, chosen for every row of a batch.

The base's product is computed once for all rows; to the rows of each delta its own product is added, through the thin
side where the delta is one of thin matrices. Deltas stay packed in memory. Those that were used last are kept unpacked,
as many as was asked for; the others are unpacked in every pass, which costs time and no memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from bolaco.delta.folder import Delta, read_delta, sites_of
from bolaco.delta.form import Form
from bolaco.delta.pair import base_digest
from bolaco.errors import CheckpointError, RecipeError, UnsupportedModelError
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model
from bolaco.models.structure import Site, Structure, prefix_of
from bolaco.settings import meant

# Rows that are the base's own.
BASE = "base"


@dataclass
class _At:
    """What a delta changes in one module."""

    matrices: list[tuple[Site, Form]] = field(default_factory=list)
    rest: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Served:
    """A delta, by the modules that it changes."""

    delta: Delta
    modules: Mapping[str, _At]


class DeltaModel:
    """A base model that answers as any of its fine-tunes.

    Args:
        base: hub id, folder, .gguf file or alias, or the model itself, which then belongs to this object.
        deltas: folders that ``bolaco delta`` wrote, by the names that rows are given.
        unpacked: how many deltas are kept unpacked, those that were used last.
        dtype, device: of the base in memory, where it is loaded here.

    Attributes:
        model: the base.

    Raises:
        CheckpointError: a delta is damaged, or of another base.
        UnsupportedModelError: the base is a mixture of experts that are one tensor.
    """

    def __init__(
        self,
        base: str | PreTrainedModel,
        deltas: Mapping[str, str | Path] | None = None,
        *,
        unpacked: int = 1,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        stored = load_model(base, "auto", device) if isinstance(base, str) else base
        # Before it is converted: a delta is for the weights as they are stored.
        self._digest = base_digest(stored)
        self.model: PreTrainedModel = stored if dtype == "auto" else stored.to(getattr(torch, dtype))
        self.model.eval()
        self._structure: Structure = inspect_structure(self.model)
        if any(site.expert is not None for site in self._structure.sites):
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: a mixture of experts, whose rows are mixed by its router; "
                "use `bolaco delta apply` for each delta"
            )
        if unpacked < 0:
            raise RecipeError(f"unpacked {unpacked}: the number of deltas that are kept unpacked is 0 or more")
        self.unpacked = unpacked
        self._deltas: dict[str, _Served] = {}
        self._factors: OrderedDict[str, dict[str, tuple[Tensor, ...]]] = OrderedDict()
        self._hooks: dict[str, Any] = {}
        self._rows: tuple[str, ...] = ()
        self._inside = False
        for name, folder in (deltas or {}).items():
            self.add(name, folder)

    @property
    def names(self) -> list[str]:
        """Of the deltas."""
        return list(self._deltas)

    def add(self, name: str, folder: str | Path) -> None:
        """Takes in another delta.

        Raises:
            CheckpointError: damaged, or of another base.
            RecipeError: the name is taken.
        """
        if name == BASE or name in self._deltas:
            raise RecipeError(f"delta {name!r}: the name is taken; give it another one")
        delta = read_delta(folder)
        if delta.info.base_sha256 != self._digest:
            raise CheckpointError(
                f"{folder}: made for {delta.info.base} with the weights {delta.info.base_sha256[:12]}, and those of "
                f"this base are {self._digest[:12]}; take the base it was made from"
            )
        device, prefix = self.model.device, prefix_of(self.model)
        modules: dict[str, _At] = {}
        for own, site in sites_of(delta, folder, self._structure).items():
            modules.setdefault(f"{prefix}{site.module}", _At()).matrices.append((site, delta.forms[own]))
        state = self.model.state_dict(keep_vars=True)
        for own, tensor in delta.rest.items():
            for module, attribute in self._places(state[own]):
                modules.setdefault(module, _At()).rest[attribute] = tensor.to(device, self.model.dtype)
        self._deltas[name] = _Served(delta, modules)
        for module in modules:
            if module not in self._hooks:
                hook = self.model.get_submodule(module).register_forward_hook(self._hook(module), with_kwargs=True)
                self._hooks[module] = hook

    def remove(self, name: str) -> None:
        """Lets go of a delta."""
        self._deltas.pop(self._known(name))
        self._factors.pop(name, None)

    def _places(self, tensor: Tensor) -> Iterator[tuple[str, str]]:
        """Module and name of every parameter or buffer that is this tensor; tied ones are several."""
        for module_name, module in self.model.named_modules():
            own = [*module._parameters.items(), *module._buffers.items()]
            for name, found in own:
                if found is not None and found.data_ptr() == tensor.data_ptr() and found.shape == tensor.shape:
                    yield module_name, name

    def _known(self, name: str) -> str:
        if name not in self._deltas:
            raise RecipeError(f"delta {name!r}: there is none of this name{meant(name, [BASE, *self._deltas])}")
        return name

    @contextmanager
    def using(self, deltas: str | Sequence[str]) -> Iterator[PreTrainedModel]:
        """While it lasts, the model answers as these: one name for all rows, or one for each row of the batch.

        ``base`` names the base itself.

        Raises:
            RecipeError: there is no delta of a name.
        """
        before, rows = self._rows, (deltas,) if isinstance(deltas, str) else tuple(deltas)
        for name in rows:
            if name != BASE:
                self._known(name)
        self._rows = rows
        for name in dict.fromkeys(rows):
            self._unpack(name)
        try:
            yield self.model
        finally:
            self._rows = before

    def __call__(self, input_ids: Tensor, deltas: str | Sequence[str], **words: Any) -> Any:
        """The model's output for ``input_ids`` ``[batch, length]``; see :meth:`using`."""
        self._check_rows(input_ids, deltas)
        with self.using(deltas) as model:
            return model(input_ids=input_ids, **words)

    def generate(self, input_ids: Tensor, deltas: str | Sequence[str], **words: Any) -> Tensor:
        """``model.generate`` with one delta for all rows or one for each; ``input_ids`` ``[batch, length]``.

        Rows of different lengths are padded on the left, with an ``attention_mask``, as ever.
        """
        self._check_rows(input_ids, deltas)
        with self.using(deltas) as model, torch.inference_mode():
            found: Tensor = model.generate(input_ids, **words)  # type: ignore[operator]
        return found

    def _check_rows(self, input_ids: Tensor, deltas: str | Sequence[str]) -> None:
        if not isinstance(deltas, str) and len(deltas) != len(input_ids):
            raise RecipeError(
                f"{len(deltas)} deltas for a batch of {len(input_ids)} rows: name one for each row, or one"
            )

    @property
    def bytes(self) -> dict[str, int]:
        """In memory: of the base, of the packed deltas, and of those that are unpacked now."""
        unpacked = [t for factors in self._factors.values() for parts in factors.values() for t in parts]
        return {
            "base": sum(p.numel() * p.element_size() for p in self.model.parameters()),
            "deltas": sum(served.delta.bytes for served in self._deltas.values()),
            "unpacked": sum(tensor.numel() * tensor.element_size() for tensor in unpacked),
        }

    def _unpack(self, name: str) -> None:
        """Keeps the factors of a delta, and lets go of those that were not used for longest."""
        if name == BASE or not self.unpacked:
            return
        if name in self._factors:
            self._factors.move_to_end(name)
            return
        while len(self._factors) >= self.unpacked:
            oldest = next(iter(self._factors))
            if oldest in self._rows:
                return  # a batch of more deltas than are kept: the others are unpacked as they are used
            del self._factors[oldest]
        forms = [(site, form) for at in self._deltas[name].modules.values() for site, form in at.matrices]
        self._factors[name] = {site.name: self._parts(form) for site, form in forms}

    def _parts(self, form: Form) -> tuple[Tensor, ...]:
        """What a product needs: both factors, or the whole delta, in the model's number format."""
        parts = form.factors() or (form.dense(),)
        return tuple(part.to(self.model.device, self.model.dtype) for part in parts)

    def _product(self, name: str, site: Site, form: Form, x: Tensor) -> Tensor:
        kept = self._factors.get(name, {}).get(site.name)
        for part in reversed(kept or self._parts(form)):
            x = F.linear(x, part)
        return x

    def _hook(self, module_name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._inside or not any(self._at(name, module_name) for name in self._rows):
                return None
            result: Tensor = output
            if len(self._rows) == 1:
                return self._changed(self._rows[0], module, module_name, args, kwargs, result)
            # A search with beams has several rows for each.
            times = max(1, len(result) // len(self._rows))
            names = [name for name in self._rows for _ in range(times)]
            result = result.clone()
            for name in dict.fromkeys(names):
                if self._at(name, module_name):
                    rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=result.device)
                    given = [a[rows] if isinstance(a, Tensor) and len(a) == len(names) else a for a in args]
                    words = {
                        k: v[rows] if isinstance(v, Tensor) and len(v) == len(names) else v for k, v in kwargs.items()
                    }
                    result[rows] = self._changed(name, module, module_name, tuple(given), words, result[rows])
            return result

        return hook

    def _at(self, name: str, module_name: str) -> _At | None:
        return None if name == BASE else self._deltas[name].modules.get(module_name)

    def _changed(
        self,
        name: str,
        module: nn.Module,
        module_name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor:
        """The output of a module as a delta has it, from that of the base."""
        at = self._at(name, module_name)
        if at is None:
            return output
        if at.rest:
            self._inside = True
            try:
                output = functional_call(module, at.rest, args, kwargs)
            finally:
                self._inside = False
        x = args[0] if args else next(iter(kwargs.values()))
        for site, form in at.matrices:
            change = self._product(name, site, form, x)
            if site.rows == (0, output.shape[-1]):
                output = output + change
            else:
                before, after = output[..., : site.rows[0]], output[..., site.rows[1] :]
                output = torch.cat([before, output[..., slice(*site.rows)] + change, after], dim=-1)
        return output
