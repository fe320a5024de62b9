"""Running decoder blocks on their own.

Between two blocks there is nothing but hidden states. What else a block is called with (masks, rotary angles) depends
on the batch's size only in most families and is recorded once; in some it depends on the tokens (embeddings of each
layer's own) and is recorded for every batch. Whether this holds for a model is tried, not known: :func:`check_walk`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.errors import NonFiniteError
from bolaco.models.structure import Place, Site, Structure, Walk, hidden_size, trunk
from bolaco.parallel import team
from bolaco.work.files import preallocate
from bolaco.work.memory import free_memory

# Of the memory that is free, what hidden states may take before they go to files.
_CACHED = 0.25

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Enough(Exception):
    """Stops a forward pass once what it was run for is known."""


def split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """A decoder block's hidden states, and the other arguments of its call."""
    kwargs = dict(kwargs)
    state = args[0] if args else kwargs.pop("hidden_states")
    return state, (args[1:], kwargs)


def state_in(output: Any) -> Any:
    """The hidden states in what a block gives back."""
    return output[0] if isinstance(output, tuple | list) else output


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Everything inside nested arguments, with its place."""
    if isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from leaves(item, (*place, index))
    elif isinstance(value, MutableMapping):
        for key, item in value.items():
            yield from leaves(item, (*place, key))
    else:
        yield place, value


def with_leaves(value: Any, given: Mapping[Place, Any], place: Place = ()) -> Any:
    """A copy of nested arguments with other things in some places; what is not nested is not copied."""
    if place in given:
        return given[place]
    if isinstance(value, tuple | list):
        items = [with_leaves(item, given, (*place, i)) for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)  # the type can be the family's own
        for key, item in value.items():
            changed[key] = with_leaves(item, given, (*place, key))
        return changed
    return value


def _at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value


def _emptied(arguments: Arguments, places: Iterable[Place]) -> Arguments:
    """The arguments with nothing in some of the dictionaries among them."""
    given = {}
    for place in places:
        try:
            given[place] = copy.copy(_at(arguments, place))
            given[place].clear()
        except (KeyError, IndexError):
            given.pop(place, None)  # not every block is called with it
    changed: Arguments = with_leaves(arguments, given)
    return changed


@dataclass(frozen=True)
class Call:
    """One call of a decoder block.

    Attributes:
        index: of the block.
        state: the hidden states it was given.
        arguments: what else.
        output: the hidden states it gave back; None if it was not looked at.
    """

    index: int
    state: Tensor
    arguments: Arguments
    output: Tensor | None = None


class Recorder:
    """Records what decoder blocks are called with, while a ``with`` block lasts.

    Attributes:
        first_only: stop a forward pass at the first block.
        cut: make the hidden states that enter the first block the beginning of autograd's graph.
    """

    def __init__(self, blocks: Sequence[nn.Module], cut: bool = False) -> None:
        self.blocks, self.cut, self.first_only = blocks, cut, False
        self._calls: list[Call] = []
        self._handles: list[Any] = []

    def run(self, model: PreTrainedModel, tokens: Tensor) -> list[Call]:
        """The calls of a forward pass of the base model on tokens ``[sequences, length]``, in order."""
        self._calls = []
        try:
            with torch.set_grad_enabled(self.cut):
                trunk(model)(input_ids=tokens.to(model.device), use_cache=False)
        except Enough:
            pass
        return self._calls

    def __enter__(self) -> Recorder:
        for index, block in enumerate(self.blocks):
            self._handles.append(block.register_forward_pre_hook(self._before(index), with_kwargs=True))
            if self.cut:
                self._handles.append(block.register_forward_hook(self._after))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, index: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state, rest = split_arguments(args, kwargs)
            rest = with_leaves(rest, {})  # blocks write to dictionaries that they are given
            changed = None
            if not self._calls and not self.first_only:
                # Some families change hidden states in place.
                recorded = state.detach()
                state = (recorded.requires_grad_() if self.cut else recorded).clone()
                changed = ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})
                state = recorded
            self._calls.append(Call(index, state, rest))
            if self.first_only:
                raise Enough
            return changed

        return hook

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._calls[-1] = dataclasses.replace(self._calls[-1], output=state_in(output))


def in_files(cache: str, model: PreTrainedModel, tokens: Tensor, copies: int) -> bool:
    """Whether hidden states go to files.

    Args:
        cache: ``disk``, ``memory``, or ``auto``: to files if they would take too much of the free memory.
        model: whose hidden states they are.
        tokens: ``[sequences, length]``.
        copies: hidden states of all tokens that are there at a time.
    """
    if cache != "auto":
        return cache == "disk"
    size = copies * tokens.numel() * hidden_size(model) * model.dtype.itemsize
    return size > _CACHED * free_memory(torch.device("cpu"))


def cache_tensor(shape: tuple[int, ...], dtype: torch.dtype, file: Path | None) -> Tensor:
    """An empty tensor in memory, or mapped to a file, which has all its room from the start.

    Raises:
        BolacoError: the disk is too full for the file.
    """
    if file is None:
        return torch.empty(shape, dtype=dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    preallocate(file, math.prod(shape) * dtype.itemsize, "hidden states")
    return torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in nested arguments, in another precision."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)
        for name, item in value.items():
            changed[name] = _cast(item, dtype)
        return changed
    return value


class BlockRunner:
    """Calls the decoder blocks of a model, or stand-ins for them, on given hidden states.

    Hidden states are kept with the sequences first, in whatever dimension the model has them.

    Args:
        model: the model, in evaluation mode.
        structure: its structure; its blocks can be run on their own.
        tokens: ``[sequences, length]``.
        batch: sequences per call.
        shared: all ranks have these sequences, and share what there is to do.

    Attributes:
        blocks: the model's decoder blocks.
        slices: the batches, as slices of the sequences.
        arguments: what each block is called with besides hidden states, by batch size.
    """

    def __init__(
        self, model: PreTrainedModel, structure: Structure, tokens: Tensor, batch: int, shared: bool = False
    ) -> None:
        self.model, self.structure, self.tokens, self.shared = model, structure, tokens, shared
        self.blocks = structure.block_modules(model)
        self.slices = [slice(a, min(a + batch, len(tokens))) for a in range(0, len(tokens), batch)]
        self.arguments: dict[int, list[Arguments]] = {}
        # What depends on the tokens, [sequences, ...], and of each block and place which of it.
        self._varying: list[Tensor] = []
        self._where: dict[tuple[int, Place], int] = {}
        self._dim = structure.walk.batch_dim

    def embed(self, file: Path | None = None) -> Tensor:
        """Hidden states that enter the first block, ``[sequences, ...]``; records the arguments.

        They are held in memory, or mapped to ``file``.
        """
        hidden: Tensor | None = None
        recorder = Recorder(self.blocks)
        with recorder:
            for rows in self.slices:
                size = rows.stop - rows.start
                # The first batch of each size runs whole: masks and rotary angles may differ from block to block.
                recorder.first_only = size in self.arguments and not self.structure.walk.varying
                calls = recorder.run(self.model, self.tokens[rows])
                self.record(rows, [call.arguments for call in calls])
                state = self.kept(calls[0].state)
                if hidden is None:
                    hidden = cache_tensor((len(self.tokens), *state.shape[1:]), state.dtype, file)
                hidden[rows] = state.to("cpu")
        assert hidden is not None  # there is at least one batch
        return hidden

    def know(self, size: int) -> None:
        """Records what blocks are called with on batches of another size than those of :attr:`slices`."""
        if size and size not in self.arguments:
            with Recorder(self.blocks) as recorder:
                calls = recorder.run(self.model, self.tokens[:size])
            self.record(slice(0, size), [call.arguments for call in calls])

    def record(self, rows: slice, arguments: list[Arguments]) -> None:
        """Takes what the blocks were called with on one batch."""
        size, walk = rows.stop - rows.start, self.structure.walk
        if len(arguments) == len(self.blocks) and size not in self.arguments:
            self.arguments[size] = [_emptied(given, walk.emptied) for given in arguments]
        found: dict[int, int] = {}
        for layer, place in walk.varying:
            leaf = _at(arguments[layer], place)
            # What is given to many blocks is kept once.
            key = self._where.setdefault((layer, place), found.setdefault(id(leaf), len(self._varying)))
            if key == len(self._varying):
                self._varying.append(torch.empty((len(self.tokens), *leaf.shape[1:]), dtype=leaf.dtype))
            self._varying[key][rows] = leaf.to("cpu")

    def kept(self, state: Tensor) -> Tensor:
        """Hidden states as they are kept: sequences first."""
        return state.movedim(self._dim, 0) if self._dim else state

    def placed(self, state: Tensor) -> Tensor:
        """Hidden states as the model has them, from those that are kept."""
        return state.movedim(0, self._dim) if self._dim else state

    def run(
        self, layer: int, state: Tensor, block: nn.Module | None = None, rows: slice | Tensor | None = None
    ) -> Tensor:
        """Output of block ``layer`` (or of ``block`` in its place) for one batch of hidden states.

        ``rows`` are the sequences of the batch; without them nothing the block is called with may depend on those.
        """
        args, kwargs = self.arguments[len(state)][layer]
        if self.structure.walk.varying and rows is not None:
            given = {
                place: self._varying[key][rows].to(self.model.device)
                for (index, place), key in self._where.items()
                if index == layer
            }
            args, kwargs = with_leaves((args, kwargs), given)
        block = block or self.blocks[layer]
        # A stand-in may be of another precision than the model (float32 while it is trained).
        dtype = next(block.parameters()).dtype
        args, kwargs = _cast((args, kwargs), dtype)
        entering = state.to(self.model.device, dtype, copy=True)  # some families change it in place
        output = block(self.placed(entering), *args, **kwargs)
        return self.kept(state_in(output))

    def advance(
        self,
        layer: int,
        hidden: Tensor,
        block: nn.Module | None = None,
        before: Callable[[slice], Any] | None = None,
        tick: Callable[[int], Any] | None = None,
    ) -> None:
        """Replaces the hidden states of all sequences by the outputs of block ``layer`` or of ``block`` in its place.

        ``before`` is called with each batch before it is run, ``tick`` with its size after.

        Raises:
            NonFiniteError: an output with NaN or infinity.
        """
        batches = self.slices[team.share(len(self.slices))] if self.shared else self.slices
        for rows in batches:
            if before:
                before(rows)
            with torch.no_grad():
                output = self.run(layer, hidden[rows], block, rows)
            if not torch.isfinite(output).all():
                which = "its" if block is None else "the compressed model's"
                raise NonFiniteError(
                    f"block {layer}: {which} output holds NaN or infinity on calibration sequences "
                    f"{rows.start}-{rows.stop - 1}; try --dtype float32"
                )
            hidden[rows] = output.to("cpu")
            if tick:
                tick(rows.stop - rows.start)
        if self.shared and team.count() > 1:
            parts = [self.slices[part] for part in team.shares(len(self.slices))]
            team.complete(hidden, [slice(part[0].start, part[-1].stop) if part else slice(0) for part in parts])
            if tick:
                tick(len(hidden) - sum(rows.stop - rows.start for rows in batches))

    def input_of(
        self, site: Site, state: Tensor, block: nn.Module | None = None, rows: slice | None = None
    ) -> Tensor | None:
        """Input ``[batch, length, in]`` of one matrix when its block runs on ``state``; what follows it is not run.

        Of an expert it is the tokens that its router sends it, ``[1, tokens, in]``; None if there are none.
        """
        block = block or self.blocks[site.layer]
        found: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise Enough

        handle = block.get_submodule(self.structure.name_in_block(site)).register_forward_pre_hook(take)
        try:
            with torch.no_grad():
                self.run(site.layer, state, block, rows)
        except Enough:
            pass
        finally:
            handle.remove()
        return by_sequence(site, found[0], len(state)) if found else None


def by_sequence(site: Site, x: Tensor, sequences: int) -> Tensor:
    """What a matrix was called with as ``[sequences, length, d]``; of an expert ``[1, tokens, d]``.

    Some families flatten sequences and positions before their feed-forward matrices.
    """
    return x.reshape(1 if site.expert is not None else sequences, -1, x.shape[-1])


def check_walk(model: PreTrainedModel, structure: Structure, tokens: Tensor) -> Walk:
    """Tries whether the decoder can be run block by block, on a few tokens ``[sequences, length]``.

    Every block is run on its own with what was recorded, and must give what it gave in the whole forward pass; and
    what enters a block must be what the block before it gave.
    """
    blocks = structure.block_modules(model)
    other = tokens.roll(1, dims=1).flip(0)
    with no_gradients(model), Recorder(blocks, cut=True) as recorder:
        calls, others = recorder.run(model, tokens), recorder.run(model, other)
        fewer = recorder.run(model, tokens[:-1]) if len(tokens) > 1 else []
    if [call.index for call in calls] != list(range(len(blocks))):
        return Walk("blocks are not called once each, in order")
    for a, b in pairwise(calls):
        # Another object can hold the same numbers.
        if a.output is not b.state and (
            a.output is None or a.output.shape != b.state.shape or not agrees(b.state, a.output, 0.0)
        ):
            return Walk(f"something happens between block {a.index} and the next")
    if calls[0].state.shape != calls[-1].state.shape:
        return Walk("hidden states change their shape")
    dims = [d for d, (a, b) in enumerate(zip(calls[0].state.shape, fewer[0].state.shape)) if a != b] if fewer else [0]
    if len(dims) != 1:
        return Walk("hidden states have no dimension for sequences")
    varying: list[tuple[int, Place]] = []
    emptied: dict[Place, None] = {}
    for call, again in zip(calls, others, strict=True):
        there = dict(leaves(again.arguments))
        for place, leaf in leaves(call.arguments):
            if not isinstance(leaf, Tensor):
                continue
            if leaf.requires_grad:
                container = _container(call.arguments, place)
                if container is None:
                    return Walk(f"block {call.index} is given what blocks before it computed")
                emptied[container] = None
            elif place not in there or leaf.shape != there[place].shape or not torch.equal(leaf, there[place]):
                if leaf.shape[:1] != tokens.shape[:1]:
                    return Walk(f"block {call.index} is given something of the tokens that has no sequences")
                varying.append((call.index, place))
    walk = Walk("", dims[0], tuple(varying), tuple(emptied))
    runner = BlockRunner(model, dataclasses.replace(structure, walk=walk), torch.cat([tokens, other]), len(tokens))
    hidden = runner.embed()
    for call, again in zip(calls, others, strict=True):
        # Both batches through one block before the next, as in a walk: neither may see what the other has left.
        assert call.output is not None
        assert again.output is not None
        expected = torch.cat([runner.kept(call.output), runner.kept(again.output)]).detach().to(hidden.device)
        try:
            runner.advance(call.index, hidden)
        except NonFiniteError:
            return walk  # nothing to compare; whoever walks will say so
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            return Walk(f"block {call.index} cannot be run alone ({type(error).__name__})")
        if not agrees(hidden, expected):
            return Walk(f"block {call.index} computes something else when it is run alone")
    return walk


def agrees(actual: Tensor, expected: Tensor, share: float = 1e-2) -> bool:
    """Whether two tensors are the same but for rounding, up to a share of the largest value.

    Where what is expected is not finite there is nothing to compare; whoever computes with it will say so.
    """
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    if not math.isfinite(scale):
        return True
    return torch.allclose(actual.detach().float(), expected.detach().float(), rtol=0, atol=share * scale)


def _container(arguments: Arguments, place: Place) -> Place | None:
    """The dictionary that something is in, if that is an argument: there blocks leave things for others."""
    for end in range(2, len(place)):
        if isinstance(_at(arguments, place[:end]), MutableMapping):
            return place[:end]
    return None


@contextmanager
def no_gradients(model: PreTrainedModel) -> Iterator[None]:
    """No parameter gets a gradient while this lasts: only activations are differentiated."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
