"""A Linear whose weights are entries of small tables (SketchTune, arXiv 2410.06364)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bolaco.layers.base import LARGEST, Entry, build_layer, builds, inner_in, size_in
from bolaco.layers.coded import CodedLinear, coded, lookup_in


class SketchLinear(CodedLinear):
    """``W[i, j] = lut[i, j // size, code[i, j]]``: a table for each row and each run of columns.

    ``lut`` is ``[out, groups, 2**bits]``, a run has ``size = ceil(in / groups)`` columns, and ``codes`` holds the codes
    of a row in ``bits`` bytes for every eight.
    """

    kind = "sketch"

    def __init__(
        self, in_features: int, out_features: int, bias: bool, bits: int, groups: int, lookup: str = "once"
    ) -> None:
        super().__init__(in_features, out_features, bits, lookup)
        self.groups = groups
        self.size = -(-in_features // groups)
        self.lut = nn.Parameter(torch.zeros(out_features, groups, 2**bits))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("codes", pack(torch.zeros(out_features, groups * self.size, dtype=torch.uint8), bits))

    @property
    def weight(self) -> Tensor:
        """The weight, ``[out, in]``, looked up anew."""
        indices = unpack(self.codes, self.bits)[:, : self.groups * self.size].long()
        found: Tensor = self.lut.gather(2, indices.view(self.out_features, self.groups, self.size))
        weight: Tensor = found.view(self.out_features, -1)[:, : self.in_features]
        return weight

    @property
    def values(self) -> nn.Parameter:
        """The tables."""
        return self.lut

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
    return coded(
        layer, lambda old: SketchLinear(old.in_features, old.out_features, old.bias is not None, bits, groups, lookup)
    )


@builds(SketchLinear.kind)
def _sketch(in_features: int, entry: Entry) -> nn.Module:
    bits, groups = size_in(entry, "bits", 4), size_in(entry, "groups", LARGEST)
    return sketched(build_layer(in_features, inner_in(entry)), bits, groups, lookup_in(entry))
