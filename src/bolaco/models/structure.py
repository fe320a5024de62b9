"""What a decoder is: its blocks, the linear matrices inside them, and what else is there and stays as it is.

Orientation is settled here, once: a site's weight is always ``[out, in]``, whatever the module stores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.errors import UnsupportedModelError
from bolaco.models.labels import INPUT_OF, STACKS


@dataclass(frozen=True)
class Site:
    """One compressible matrix.

    Attributes:
        name: unique name in the causal model; parts of a fused module end in ``.q``, ``.gate``, ...
        module: name of the module, relative to the base model (the one without the language-model head).
        layer: index of the decoder block.
        type: one of ``q k v o gate up down``, else what the module is called inside its block.
        part: the type again where the module is fused, else None.
        rows: first and last-plus-one output row inside the module.
        out_features, in_features: shape of the matrix.
        bias: whether the original has a bias.
        group: key of the input it was seen to share with others of its block; empty if nobody has looked.
        expert: of a matrix of a mixture of experts the number of its expert, else None.
    """

    name: str
    module: str
    layer: int
    type: str
    part: str | None
    rows: tuple[int, int]
    out_features: int
    in_features: int
    bias: bool
    group: str = ""
    expert: int | None = None

    @property
    def input_group(self) -> str:
        """Key of the input this site shares with others of its block."""
        if self.group:
            return self.group
        own = self.type if self.expert is None else f"{self.type}.{self.expert}"
        return INPUT_OF.get(self.type, own)

    @property
    def tie(self) -> tuple[int, str] | None:
        """Matrices with the same tie, those of a block's experts of one type, are given one rank; None: it has none."""
        return None if self.expert is None else (self.layer, self.type)

    @property
    def size(self) -> int:
        """Parameters of the dense matrix, bias not counted."""
        return self.out_features * self.in_features

    @property
    def members(self) -> tuple[Site, ...]:
        """The matrices of the model that it consists of: itself."""
        return (self,)


@dataclass(frozen=True, kw_only=True)
class Stack(Site):
    """Matrices on one input, stacked along their outputs and compressed as one, ``[sum of out, in]``.

    ``module``, ``part`` and ``rows`` mean nothing here; ``type`` is a key of :data:`bolaco.models.labels.STACKS`.
    """

    stacked: tuple[Site, ...]

    @property
    def input_group(self) -> str:
        """Key of the input its matrices share; of experts, of what all of them are sent."""
        first = self.stacked[0]
        return first.input_group if first.expert is None else all_experts(first.type)

    @property
    def members(self) -> tuple[Site, ...]:
        """The matrices, top to bottom."""
        return self.stacked


def all_experts(kind: str) -> str:
    """Key of the inputs of all experts of a block together, from the type of their first matrix."""
    return f"{kind} of all experts"


@dataclass(frozen=True)
class Kept:
    """Parameters of the decoder blocks that stay dense whatever the recipe says.

    Attributes:
        name: of the module inside its block, without numbers.
        size: parameters, over all blocks.
        reason: why, in a word or two.
    """

    name: str
    size: int
    reason: str


# Where in the arguments of a call something is: positions and keys, from the outside in.
Place = tuple[Any, ...]


@dataclass(frozen=True)
class Walk:
    """How the decoder can be run block by block.

    Attributes:
        hooks: why it cannot, so that statistics need whole forward passes; empty where it can.
        batch_dim: dimension of the hidden states that counts sequences.
        varying: block and place of what blocks are called with that depends on the tokens, beside hidden states.
        emptied: places of dictionaries in which blocks leave things, and that may as well be empty.
    """

    hooks: str = ""
    batch_dim: int = 0
    varying: tuple[tuple[int, Place], ...] = ()
    emptied: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Structure:
    """The decoder of one model: where its blocks are, and every compressible matrix, in order of execution.

    Attributes:
        blocks: name of each decoder block, relative to the base model.
        sites: the matrices.
        kept: what else the blocks hold, apart from vectors.
        size: parameters of all blocks.
        walk: how blocks are run.
        active: of each block, the share of its experts that a token is sent to; empty if nobody has looked.
        offered: stacks of some of the sites that an allocation can take in their place.
    """

    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    kept: tuple[Kept, ...] = ()
    size: int = 0
    walk: Walk = Walk()
    active: tuple[float, ...] = ()
    offered: tuple[Stack, ...] = ()

    def idle(self, sizes: Mapping[str, int]) -> int:
        """Parameters of experts that a token is not sent to, from the sizes of the matrices by name."""
        shares = dict(enumerate(self.active))
        idle = 0.0
        for site in self.sites:
            if site.members[0].expert is None:
                continue
            size = float(sizes[site.name])
            if site.expert is None and size < site.size:
                # An input factor that all experts have in common is used by every token.
                size *= site.out_features / (site.out_features + site.in_features)
            idle += size * (1 - shares.get(site.layer, 1.0))
        return round(idle)

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def types(self) -> set[str]:
        """Types of the matrices."""
        return {site.type for site in self.sites}

    def of_layer(self, layer: int) -> list[Site]:
        """Sites of one decoder block."""
        return [site for site in self.sites if site.layer == layer]

    @property
    def units(self) -> tuple[Site, ...]:
        """Everything that is factored: the sites, and what is offered in the place of some."""
        return (*self.sites, *self.offered)

    def taken(self, ranks: Mapping[str, int | None]) -> Structure:
        """The structure with those of the offered stacks that have a rank in the place of their matrices."""
        stacks = {member: stack for stack in self.offered if stack.name in ranks for member in stack.members}
        sites = dict.fromkeys(stacks.get(site, site) for site in self.sites)
        return replace(self, sites=tuple(sites), offered=())

    def modules(self, layer: int) -> dict[str, list[Site]]:
        """The model's matrices of one decoder block by the name of their module; a fused module holds several."""
        found: dict[str, list[Site]] = {}
        for site in self.of_layer(layer):
            for member in site.members:
                found.setdefault(member.module, []).append(member)
        return found

    @property
    def stack(self) -> str:
        """Name of the list that the blocks are in, relative to the base model.

        Raises:
            UnsupportedModelError: there are several.
        """
        lists = {name.rpartition(".")[0] for name in self.blocks}
        if len(lists) > 1:
            raise UnsupportedModelError(f"the decoder has several lists of blocks ({', '.join(sorted(lists))})")
        return lists.pop()

    def block_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """The decoder blocks of ``model``, in order."""
        return [model.base_model.get_submodule(name) for name in self.blocks]

    def name_in_block(self, site: Site) -> str:
        """Name of the site's module inside its decoder block."""
        return site.module.removeprefix(f"{self.blocks[site.layer]}.")


def has_module(root: nn.Module, name: str) -> bool:
    """Whether there is a module of this name inside ``root``."""
    try:
        root.get_submodule(name)
    except AttributeError:
        return False
    return True


def weight_of(module: nn.Module) -> Tensor:
    """The module's weight as ``[out, in]`` (a view; GPT-2's Conv1D stores the transpose)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def parameter_limit(keep: float, total: int) -> int:
    """The parameters that a keep ratio allows of ``total``, through the decimal the user wrote: 0.8 of 10 is 8."""
    return math.floor(Fraction(str(keep)) * total)


def prefix_of(model: PreTrainedModel) -> str:
    """What the names of the base model's parts begin with in the causal model: ``model.`` in most families."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def trunk(model: PreTrainedModel) -> nn.Module:
    """The part of a causal model that makes final hidden states of tokens: all but the language-model head.

    Raises:
        UnsupportedModelError: there is no such part.
    """
    base: nn.Module = model.base_model
    if base is not model:
        return base
    for child in model.children():
        if isinstance(child, PreTrainedModel):
            return child
    raise UnsupportedModelError(f"{type(model).__name__} ({model.config.model_type}) has no base model")


def hidden_size(model: PreTrainedModel) -> int:
    """Length of the embeddings of tokens."""
    return int(weight_of(model.get_input_embeddings()).shape[1])


def vocabulary(model: PreTrainedModel) -> int:
    """Number of tokens that have an embedding."""
    return int(weight_of(model.get_input_embeddings()).shape[0])


def positions_of(config: Any) -> int | None:
    """The longest sequence of tokens that a model takes, from its configuration; None if there is no limit."""
    own = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    positions = getattr(own, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def stacked(structure: Structure, dense_types: Iterable[str] = ()) -> Structure:
    """The same decoder with the groups of ``STACKS`` as one site each, where all of a group may be factored.

    Matrices that were seen to have different inputs are not stacked. The first matrices of a block's experts are: what
    they are sent is of one space.
    """
    dense = set(dense_types)
    sites: list[Site] = []
    for layer in range(structure.num_layers):
        of_type = {site.type: site for site in structure.of_layer(layer) if site.expert is None}
        stacks: dict[str, Stack] = {}
        for kind, types in STACKS.items():
            if of_type.keys() >= set(types) and not dense & set(types):
                members = tuple(of_type[t] for t in types)
                if len({(site.input_group, site.in_features) for site in members}) == 1:
                    stacks |= dict.fromkeys(types, stack_of(kind, members))
        pooled = _first_of_experts(structure, layer, dense)
        for site in structure.of_layer(layer):
            if site.expert is None:
                sites.append(stacks.get(site.type, site))
            else:
                sites.append(pooled if pooled is not None and site in pooled.members else site)
        sites = list(dict.fromkeys(sites))
    return replace(structure, sites=tuple(sites))


def with_offers(structure: Structure, dense_types: Iterable[str] = ()) -> Structure:
    """The same decoder with the first matrices of each block's experts on offer as one stack."""
    dense = set(dense_types)
    stacks = [_first_of_experts(structure, layer, dense) for layer in range(structure.num_layers)]
    return replace(structure, offered=tuple(stack for stack in stacks if stack is not None))


def _first_of_experts(structure: Structure, layer: int, dense: set[str]) -> Stack | None:
    """The first matrices of a block's experts as one; None where there are not several, or they stay dense."""
    experts = [site for site in structure.of_layer(layer) if site.expert is not None]
    first = [site for site in experts if site.tie == experts[0].tie]
    return stack_of(first[0].type, tuple(first)) if len(first) > 1 and first[0].type not in dense else None


def stack_of(kind: str, members: tuple[Site, ...]) -> Stack:
    """Matrices on one input as one."""
    first, out = members[0], sum(site.out_features for site in members)
    endings = "+".join(site.name.rpartition(".")[2] for site in members[1:])
    return Stack(
        name=f"{first.name}+{endings}",
        module=first.module,
        layer=first.layer,
        type=kind,
        part=first.part,
        rows=(0, out),
        out_features=out,
        in_features=first.in_features,
        bias=any(site.bias for site in members),
        stacked=members,
    )
