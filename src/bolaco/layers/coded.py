"""What layers whose weights are looked up from codes have in common: when that is done, and what is kept of it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bolaco.layers.base import Entry

# When codes are looked up.
LOOKUPS = ("once", "always")


class CodedLinear(nn.Module):
    """A Linear whose weight a subclass computes from ``codes``, a buffer, and one other tensor.

    Attributes:
        lookup: when the codes are looked up in inference. ``"once"``: in the first pass, and the weight is kept, which
            then takes the memory of a dense one. ``"always"``: anew in each pass, which keeps no weight and takes
            several times as long for a single token. Where gradients are computed, they are looked up in each pass,
            backward too.
    """

    bias: nn.Parameter | None
    codes: Tensor

    def __init__(self, in_features: int, out_features: int, bits: int, lookup: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.lookup = in_features, out_features, bits, lookup
        # The weight, with the tensors it was looked up from and their versions; not part of the module's state.
        self._kept: tuple[Tensor, Tensor, Tensor, tuple[int, int]] | None = None

    @property
    def weight(self) -> Tensor:
        """The weight, ``[out, in]``, looked up anew."""
        raise NotImplementedError

    @property
    def values(self) -> nn.Parameter:
        """What the codes are looked up in."""
        raise NotImplementedError

    def _known(self) -> Tensor:
        """The weight, looked up once for all passes in which codes and values are the same."""
        values, codes, kept = self.values, self.codes, self._kept
        # Tensors of inference mode have no version, and those that are made in it must not be kept beyond it.
        if self.lookup != "once" or self.training or values.is_inference() or codes.is_inference():
            return self.weight
        versions = (values._version, codes._version)
        if kept is None or kept[1] is not values or kept[2] is not codes or kept[3] != versions:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = kept = (self.weight.contiguous(), values, codes, versions)
        return kept[0]

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        if not torch.is_grad_enabled():
            return F.linear(x, self._known(), self.bias)
        made: Tensor = checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=False)
        return made

    def forget(self) -> None:
        """Drops the weight that was kept, if one was; the next pass looks it up anew."""
        self._kept = None

    def train(self, mode: bool = True) -> "CodedLinear":
        """Switches the mode; values change in training, so that no weight is kept for it."""
        self.forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "CodedLinear":
        # Conversions replace the data of a parameter, which is still the same object.
        self.forget()
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}


def coded(layer: nn.Module, make: Callable[[nn.Linear], CodedLinear]) -> nn.Module:
    """``layer`` with ``make`` of every Linear in it in that one's place; of a Linear, what ``make`` makes of it."""
    if isinstance(layer, nn.Linear):
        return make(layer)
    for name, child in layer.named_children():
        setattr(layer, name, coded(child, make))
    return layer


def lookup_in(entry: Entry) -> str:
    """When the codes of an entry are looked up; ValueError if it says something else."""
    lookup = entry.get("lookup", "once")
    if lookup not in LOOKUPS:
        raise ValueError(f"lookup must be one of {', '.join(LOOKUPS)}, not {str(lookup)[:40]!r}")
    return str(lookup)
