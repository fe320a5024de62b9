"""Just CHOP (arXiv 2305.14864): whole decoder blocks are removed at once; the first and the last one always stay.

A pattern says where the removed blocks were. The paper finds ``input`` best at 1.1B and 7B parameters, ``max-gap`` or
``both`` at 300M, ``output`` worst, all of it after continued pretraining.

Deviations from the paper: the number of blocks follows from the parameter budget instead of being half of them, and
nothing is trained before or after: ``bolaco tune --mode continued`` is for that, and its option ``fill`` for what comes
before. What is measured right after removal decides the default, ``middle``: it leaves
more of SmolLM2 than every other pattern (docs/results.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.errors import BudgetError, UnsupportedModelError
from bolaco.layers import put_module
from bolaco.models.find import meta_model
from bolaco.models.structure import Structure, vocabulary
from bolaco.models.walk import split_arguments
from bolaco.settings import Section
from bolaco.transform.base import Transform


class ChopOptions(Section):
    """Which blocks go."""

    pattern: Literal["max-gap", "input", "output", "middle", "both"] = Field(
        "middle", description="where the removed blocks were; max-gap: evenly spread; both: half at either end"
    )


def _evenly(layers: int, keep: int) -> list[int]:
    """``keep`` of ``layers`` indices, first and last among them, gaps differing by one at most."""
    return [(2 * i * (layers - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)]


# Pattern -> the indices that stay, of (layers, keep), 2 <= keep <= layers.
PATTERNS: dict[str, Callable[[int, int], list[int]]] = {
    "max-gap": _evenly,
    "input": lambda layers, keep: [0, *range(layers - keep + 1, layers)],
    "output": lambda layers, keep: [*range(keep - 1), layers - 1],
    # Of an odd number the larger half stays, or goes, at the input.
    "middle": lambda layers, keep: [*range((keep + 1) // 2), *range(layers - keep // 2, layers)],
    "both": lambda layers, keep: [
        0,
        *range(1 + (layers - keep + 1) // 2, 1 + (layers - keep + 1) // 2 + keep - 2),
        layers - 1,
    ],
}


def kept_blocks(layers: int, keep: int, pattern: str) -> tuple[int, ...]:
    """Indices of the ``keep`` blocks out of ``layers`` that stay, ascending; the first and the last always do.

    Raises:
        ValueError: an unknown pattern, or ``keep`` not from 2 to ``layers`` (from 1 where there is one block only).
    """
    if pattern not in PATTERNS:
        raise ValueError(f"unknown pattern {pattern!r}; there is {', '.join(PATTERNS)}")
    if not min(2, layers) <= keep <= layers:
        raise ValueError(f"{keep} of {layers} blocks: the first and the last always stay")
    return (0,) if layers == 1 else tuple(PATTERNS[pattern](layers, keep))


def plan(structure: Structure, keep: float, limit: int, options: ChopOptions) -> tuple[int, ...]:
    """The largest number of blocks whose matrices have at most ``limit`` parameters, in the pattern of the options.

    Raises:
        BudgetError: the first and the last block alone are not.
    """
    layers = structure.num_layers
    sizes = [sum(site.size for site in structure.of_layer(layer)) for layer in range(layers)]
    fewest = min(2, layers)
    for count in range(layers, fewest - 1, -1):
        blocks = kept_blocks(layers, count, options.pattern)
        if sum(sizes[block] for block in blocks) <= limit:
            return blocks
    least = sum(sizes[block] for block in {0, layers - 1})
    raise BudgetError(
        f"keep {keep} allows {limit:,} parameters in the decoder linears, but the first and the last "
        f"block, which always stay, have {least:,}; raise --keep",
        least,
    )


def chop(model: PreTrainedModel, structure: Structure, blocks: tuple[int, ...]) -> PreTrainedModel:
    """``model`` with only these blocks, its configuration changed to match; tensors are shared.

    ``model`` itself is not changed.

    Raises:
        UnsupportedModelError: the architecture cannot say this in its configuration, or blocks depend on their depth.
    """
    tensors = (*model.parameters(), *model.buffers())
    smaller = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    chop_config(smaller.config, blocks)
    place, stack = structure.stack, structure.block_modules(smaller)
    kept = nn.ModuleList([stack[block] for block in blocks])
    for layer, block in enumerate(kept):
        # The index by which a block finds its part of the KV cache.
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", layer)  # noqa: B010 - to mypy an attribute of a module is a module
    put_module(smaller.base_model, place, kept)
    _check_configuration(smaller, structure)
    _check_logits(model, smaller, structure, blocks)
    return smaller


def chop_config(config: Any, blocks: tuple[int, ...]) -> None:
    """Changes a configuration to these blocks only: their number, and every list that has an entry for each block."""
    layers = config.num_hidden_layers
    lists = {
        name: value
        for name, value in config.to_dict().items()
        if "layer" in name and isinstance(value, list) and len(value) == layers
    }
    # Qwen: blocks from this one on have a sliding window.
    windows_from = getattr(config, "max_window_layers", None)
    config.num_hidden_layers = len(blocks)
    for name, value in lists.items():
        setattr(config, name, [value[block] for block in blocks])
    if isinstance(windows_from, int):
        config.max_window_layers = sum(block < windows_from for block in blocks)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module, which it got from the configuration: numbers, switches and words."""
    values = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
    values.pop("training", None)
    return values


def _check_configuration(model: PreTrainedModel, structure: Structure) -> None:
    """Checks, block by block, that the configuration of a chopped model builds this very model."""
    stacks = [m.base_model.get_submodule(structure.stack) for m in (model, meta_model(copy.deepcopy(model.config)))]
    for layer, (block, other) in enumerate(zip(*(stack.children() for stack in stacks), strict=True)):
        for (name, module), (_, built) in zip(block.named_modules(), other.named_modules(), strict=True):
            left, right = _plain(module), _plain(built)
            for key in left.keys() & right.keys():
                if left[key] != right[key]:
                    raise UnsupportedModelError(
                        f"{structure.stack}.{layer}{'.' if name else ''}{name}: {key} is {left[key]!r} here, but the "
                        f"configuration of a chopped {model.config.model_type} model makes it {right[key]!r}"
                    )


def skipping_logits(model: PreTrainedModel, structure: Structure, blocks: tuple[int, ...], tokens: Tensor) -> Tensor:
    """Logits ``[sequences, length, vocabulary]`` of ``model`` with the other blocks passing on what they get."""

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        state = split_arguments(args, kwargs)[0]
        return (state, *output[1:]) if isinstance(output, tuple) else state

    stack = structure.block_modules(model)
    handles = [
        stack[layer].register_forward_hook(skip, with_kwargs=True) for layer in range(len(stack)) if layer not in blocks
    ]
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
            return logits
    finally:
        for handle in handles:
            handle.remove()


def _check_logits(
    model: PreTrainedModel, smaller: PreTrainedModel, structure: Structure, blocks: tuple[int, ...]
) -> None:
    """Checks on a few tokens that the smaller model computes what the original does with those blocks skipped.

    It does not where a block's depth is part of its computation.
    """
    tokens = torch.arange(8, device=model.device)[None] % vocabulary(model)
    expected = skipping_logits(model, structure, blocks, tokens).float()
    with torch.no_grad():
        actual = smaller(input_ids=tokens, use_cache=False).logits.float()
    tolerance = 1e-3 * float(expected.abs().max())
    if torch.isfinite(expected).all() and not torch.allclose(actual, expected, rtol=0, atol=tolerance):
        raise UnsupportedModelError(
            f"{type(model).__name__} ({model.config.model_type}): its blocks depend on their depth, so that removing "
            "some changes the others; --method chop cannot be used"
        )


TRANSFORM = Transform(
    name="chop",
    paper="arXiv 2305.14864",
    summary="whole decoder blocks are removed, the first and the last stay; a stock checkpoint (Just CHOP)",
    plan=plan,
    apply=chop,
    options=ChopOptions,
)
