"""A fused projection taken apart."""

import torch
from torch import Tensor, nn

from bolaco.layers.base import Entry, build_layer, builds, named_parts


class SplitLinear(nn.Module):
    """A fused projection (qkv, gate_up) whose parts are separate layers on the same input, outputs side by side."""

    kind = "split"

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., sum of the parts' out]``."""
        return torch.cat([part(x) for part in self.parts.values()], dim=-1)


@builds(SplitLinear.kind)
def _split(in_features: int, entry: Entry) -> SplitLinear:
    # A list, top to bottom, each with its name: transformers sorts the keys of a configuration.
    return SplitLinear({name: build_layer(in_features, part) for name, part in named_parts(entry).items()})
