"""Codes of 1 to 8 bits in bytes, and back, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from bolaco.errors import CheckpointError

# Codes that are packed together: they fill as many bytes as a code has bits.
_TOGETHER = 8


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below ``2 ** bits`` as one run of bits, ``[packed_bytes]`` uint8.

    Args:
        codes: uint8 of any shape, in the order in which its elements lie.
        bits: of a code, 1 to 8; the first code is in the lowest bits of the first byte.
    """
    flat = codes.reshape(-1)
    size = packed_bytes(len(flat), bits)
    words = torch.zeros(-(-len(flat) // _TOGETHER), _TOGETHER, dtype=_word(bits), device=codes.device)
    words.view(-1)[: len(flat)] = flat.to(words.dtype)
    word = words[:, 0].clone()
    for place in range(1, _TOGETHER):
        word |= words[:, place] << bits * place
    packed = torch.stack([(word >> 8 * place) & 255 for place in range(bits)], dim=1)
    return packed.to(torch.uint8).reshape(-1)[:size].clone()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``[count]`` uint8 codes that :func:`pack` was given.

    Raises:
        CheckpointError: so many codes of so many bits are not that many bytes.
    """
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(count, bits),):
        raise CheckpointError(
            f"{count} codes of {bits} bits are {packed_bytes(count, bits)} bytes, "
            f"not {str(packed.dtype).removeprefix('torch.')} {tuple(packed.shape)}"
        )
    if bits == 8:
        return packed.clone()
    if _TOGETHER % bits == 0:  # no code is in two bytes
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes: Tensor = (packed[:, None] >> shifts) & (1 << bits) - 1
        return codes.reshape(-1)[:count]
    groups = -(-count // _TOGETHER)
    parts = torch.zeros(groups * bits, dtype=_word(bits), device=packed.device)
    parts[: len(packed)] = packed.to(parts.dtype)
    parts = parts.view(groups, bits)
    word = parts[:, 0].clone()
    for place in range(1, bits):
        word |= parts[:, place] << 8 * place
    shifts = torch.arange(_TOGETHER, dtype=parts.dtype, device=packed.device) * bits
    codes = ((word[:, None] >> shifts) & (1 << bits) - 1).to(torch.uint8)
    return codes.reshape(-1)[:count]


def _word(bits: int) -> torch.dtype:
    """An integer that eight codes fit into; what its sign bit spreads to is masked out."""
    return torch.int32 if bits <= 4 else torch.int64
