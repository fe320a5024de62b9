"""A Linear whose weights are entries of small tables (SketchTune, arXiv 2410.06364)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bolaco.layers.base import LARGEST, Entry, build_layer, builds, inner_in, size_in

# When codes are looked up.
LOOKUPS = ("once", "always")


class SketchLinear(nn.Module):
    """``W[i, j] = lut[i, j // size, code[i, j]]``: a table for each row and each run of columns.

    ``lut`` is ``[out, groups, 2**bits]``, a run has ``size = ceil(in / groups)`` columns, and ``codes`` holds the codes
    of a row in ``bits`` bytes for every eight.

    Attributes:
        lookup: when the codes are looked up in inference. ``"once"``: in the first pass, and the weight is kept, which
            then takes the memory of a dense one. ``"always"``: anew in each pass, which keeps no weight and takes
            several times as long for a single token. Where gradients are computed, they are looked up in each pass,
            backward too.
    """

    kind = "sketch"

    def __init__(
        self, in_features: int, out_features: int, bias: bool, bits: int, groups: int, lookup: str = "once"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.groups = in_features, out_features, bits, groups
        self.size = -(-in_features // groups)
        self.lookup = lookup
        self.lut = nn.Parameter(torch.zeros(out_features, groups, 2**bits))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("codes", pack(torch.zeros(out_features, groups * self.size, dtype=torch.uint8), bits))
        self.codes: Tensor
        # The weight, with the tensors it was looked up from and their versions; not part of the module's state.
        self._kept: tuple[Tensor, Tensor, Tensor, tuple[int, int]] | None = None

    @property
    def weight(self) -> Tensor:
        """The weight, ``[out, in]``, looked up anew."""
        indices = unpack(self.codes, self.bits)[:, : self.groups * self.size].long()
        found: Tensor = self.lut.gather(2, indices.view(self.out_features, self.groups, self.size))
        weight: Tensor = found.view(self.out_features, -1)[:, : self.in_features]
        return weight

    def _known(self) -> Tensor:
        """The weight, looked up once for all passes in which tables and codes are the same."""
        # Tensors of inference mode have no version, and those that are made in it must not be kept beyond it.
        if self.lookup != "once" or self.training or self.lut.is_inference() or self.codes.is_inference():
            return self.weight
        lut, codes, kept = self.lut, self.codes, self._kept
        versions = (lut._version, codes._version)
        if kept is None or kept[1] is not lut or kept[2] is not codes or kept[3] != versions:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = kept = (self.weight.contiguous(), lut, codes, versions)
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

    def train(self, mode: bool = True) -> "SketchLinear":
        """Switches the mode; tables change in training, so that no weight is kept for it."""
        self.forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "SketchLinear":
        # Conversions replace the data of a parameter, which is still the same object.
        self.forget()
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def extra_repr(self) -> str:
        """Shape and code length, for printing a model."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, groups={self.groups}, lookup={self.lookup}"


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[rows, n]`` below ``2**bits`` (bits up to 4) as bytes ``[rows, bits * ceil(n / 8)]``, first lowest."""
    eights = F.pad(codes.int(), (0, -codes.shape[1] % 8)).view(len(codes), -(-codes.shape[1] // 8), 8)
    words = (eights << (bits * torch.arange(8, dtype=torch.int32, device=codes.device))).sum(-1, dtype=torch.int64)
    found = (words[..., None] >> (8 * torch.arange(bits, device=codes.device))) & 255
    return found.to(torch.uint8).flatten(1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """What :func:`pack` packed, ``[rows, 8 * ceil(n / 8)]``: zeros follow the last code."""
    places = torch.arange(8, dtype=torch.int32, device=packed.device)
    eights = packed.view(len(packed), packed.shape[1] // bits, bits).int()
    words = (eights << (8 * places[:bits])).sum(-1, dtype=torch.int32)
    found: Tensor = (words[..., None] >> (bits * places)) & (2**bits - 1)
    return found.to(torch.uint8).flatten(1)


def sketched(layer: nn.Module, bits: int, groups: int, lookup: str = "once") -> nn.Module:
    """``layer`` with every Linear in it, or itself, as a :class:`SketchLinear` of that shape, without content."""
    if isinstance(layer, nn.Linear):
        return SketchLinear(layer.in_features, layer.out_features, layer.bias is not None, bits, groups, lookup)
    for name, child in layer.named_children():
        setattr(layer, name, sketched(child, bits, groups, lookup))
    return layer


@builds(SketchLinear.kind)
def _sketch(in_features: int, entry: Entry) -> nn.Module:
    bits, groups = size_in(entry, "bits", 4), size_in(entry, "groups", LARGEST)
    lookup = entry.get("lookup", "once")
    if lookup not in LOOKUPS:
        raise ValueError(f"lookup must be one of {', '.join(LOOKUPS)}, not {str(lookup)[:40]!r}")
    return sketched(build_layer(in_features, inner_in(entry)), bits, groups, lookup)
