"""A Linear whose weights are integer codes on levels of equal distance, with a scale for each run of columns."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bolaco.layers.base import LARGEST, Entry, build_layer, builds, inner_in, size_in
from bolaco.layers.coded import CodedLinear, coded, lookup_in


class QuantizedLinear(CodedLinear):
    """``W[i, j] = (code[i, j] - (2**bits - 1) / 2) * scales[i, j // group]``.

    ``codes`` are packed row by row into one run of bits, the first code in the lowest bits of the first byte;
    ``scales`` are ``[out, ceil(in / group)]``.
    """

    kind = "quantized"

    def __init__(
        self, in_features: int, out_features: int, bias: bool, bits: int, group: int, lookup: str = "once"
    ) -> None:
        super().__init__(in_features, out_features, bits, lookup)
        self.group = group
        self.scales = nn.Parameter(torch.zeros(out_features, -(-in_features // group)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        size = -(-in_features * out_features * bits // 8)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8))

    @property
    def weight(self) -> Tensor:
        """The weight, ``[out, in]``, computed in float32 at least."""
        wide = torch.promote_types(self.scales.dtype, torch.float32)
        steps = unpacked(self.codes, self.bits, self.out_features * self.in_features).to(wide)
        steps = steps.sub_((2**self.bits - 1) / 2).view(self.out_features, self.in_features)
        scales = self.scales.to(wide).repeat_interleave(self.group, dim=1)[:, : self.in_features]
        return (steps * scales).to(self.scales.dtype)

    @property
    def values(self) -> nn.Parameter:
        """The scales."""
        return self.scales

    def extra_repr(self) -> str:
        """Shape and number format, for printing a model."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, group={self.group}, lookup={self.lookup}"


def unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``[count]`` uint8 codes in a run of bits."""
    if bits == 8:
        return packed
    if 8 % bits == 0:  # no code is in two bytes
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[:, None] >> shifts) & (1 << bits) - 1).reshape(-1)[:count]
    # Eight codes fill as many bytes as a code has bits.
    words = F.pad(packed, (0, -len(packed) % bits)).view(-1, bits).long()
    places = torch.arange(8, device=packed.device)
    word = (words << (8 * places[:bits])).sum(-1)
    return ((word[:, None] >> (bits * places)) & (1 << bits) - 1).to(torch.uint8).reshape(-1)[:count]


def quantized(layer: nn.Module, bits: int, group: int, lookup: str = "once") -> nn.Module:
    """``layer`` with every Linear in it, or itself, as a :class:`QuantizedLinear` of that shape, without content."""
    return coded(
        layer, lambda old: QuantizedLinear(old.in_features, old.out_features, old.bias is not None, bits, group, lookup)
    )


def entry_of(layer: nn.Module) -> Entry:
    """The entry of a Linear or a factored layer, quantized or not, in the configuration."""
    codes = [module for module in layer.modules() if isinstance(module, QuantizedLinear)]
    if isinstance(layer, nn.Linear | QuantizedLinear):
        inner: Entry = {"kind": "dense", "out": layer.out_features, "bias": layer.bias is not None}
    else:
        inner = layer.entry()  # type: ignore[operator]
    if not codes:
        return inner
    return {"kind": QuantizedLinear.kind, "bits": codes[0].bits, "group": codes[0].group, "layer": inner}


@builds(QuantizedLinear.kind)
def _quantized(in_features: int, entry: Entry) -> nn.Module:
    bits, group = size_in(entry, "bits", 8), size_in(entry, "group", LARGEST)
    return quantized(build_layer(in_features, inner_in(entry)), bits, group, lookup_in(entry))
