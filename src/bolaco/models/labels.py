"""What matrices are called: canonical types where the field has a name for them, else their own name in the block.

The tables label and group; nothing is refused for not being in them.
"""

from __future__ import annotations

import re

# Name of a linear module inside a decoder block -> the matrices it holds, top to bottom.
LAYOUT: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
    "self_attn.out_proj": ("o",),
    "self_attn.qkv_proj": ("q", "k", "v"),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.gate_up_proj": ("gate", "up"),
    "mlp.down_proj": ("down",),
    "fc1": ("up",),
    "fc2": ("down",),
    "attn.c_attn": ("q", "k", "v"),
    "attn.c_proj": ("o",),
    "mlp.c_fc": ("up",),
    "mlp.c_proj": ("down",),
    # BERT and what was made from it.
    "attention.output.dense": ("o",),
    "intermediate.dense": ("up",),
    "output.dense": ("down",),
}
# Matrix type -> the input it shares with others where none was observed.
INPUT_OF = {
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "o": "o",
    "gate": "mlp",
    "up": "mlp",
    "down": "down",
}
TYPES = tuple(INPUT_OF)
# Matrices on one input that can be stacked and factored as one (arXiv 2402.16319).
STACKS = {"qk": ("q", "k"), "gate_up": ("gate", "up")}

_ATTENTION = r"(self_attn|attn|attention|self_attention|attn\.attention|attention\.self|attention\.self_attention)"
_MLP = r"(mlp|ffn|feed_forward|feedforward|ff)"
_ALIASES: tuple[tuple[str, str], ...] = (
    (rf"{_ATTENTION}\.(q_proj|q|query|wq|q_lin|Wq)", "q"),
    (rf"{_ATTENTION}\.(k_proj|k|key|wk|k_lin|Wk)", "k"),
    (rf"{_ATTENTION}\.(v_proj|v|value|wv|v_lin|Wv)", "v"),
    (rf"{_ATTENTION}\.(o_proj|out_proj|o|wo|Wo|dense|c_proj|out_lin)", "o"),
    (rf"{_MLP}\.(gate_proj|w1)", "gate"),
    (rf"{_MLP}\.(up_proj|w3|fc1|fc_in|c_fc|dense_h_to_4h|wi)", "up"),
    (rf"{_MLP}\.(down_proj|w2|fc2|fc_out|c_proj|dense_4h_to_h|wo)", "down"),
)
_INDEX = re.compile(r"\.\d+(?=\.|$)")


def types_of(name: str) -> tuple[str, ...]:
    """Types of the matrices that a linear module holds, from its name inside its block; several if it is fused."""
    if name in LAYOUT:
        return LAYOUT[name]
    for pattern, kind in _ALIASES:
        if re.fullmatch(pattern, name):
            return (kind,)
    return (own_type(name),)


def own_type(name: str) -> str:
    """The type of a matrix without a canonical one: its name, without the number of an expert.

    The matrices of experts are called ``experts.`` and theirs, wherever in the block the experts are.
    """
    plain = _INDEX.sub("", name)
    place = re.search(r"(^|\.)(\w*experts)\.(.*)$", plain)
    return plain if place is None else f"{place[2]}.{place[3].removesuffix('_proj')}"


def layer_of(name: str) -> int:
    """Index of the decoder block that a matrix of this name is in."""
    return next(int(part) for part in name.split(".") if part.isdecimal())


def type_of(name: str) -> str:
    """Type of the matrix of this name, such as ``q``."""
    tail = name.rpartition(".")[2]
    if tail in TYPES:
        return tail
    inside = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
    # Of stacked matrices the first one's.
    return types_of(inside.partition("+")[0])[0]


def ordered(types: set[str]) -> list[str]:
    """Types in the order in which tables list them: stacks and canonical ones first, then by name."""
    known = (*STACKS, *TYPES)
    return [kind for kind in known if kind in types] + sorted(types - set(known))
