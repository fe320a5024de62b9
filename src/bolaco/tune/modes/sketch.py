"""Weights are coded into small tables, and only the tables are trained (SketchTune, arXiv 2410.06364).

Before training, every Linear of the chosen matrices is coded: a dense matrix, or each factor of a factored one. Every
weight becomes a code of 2 to 4 bits, an index into a table that it shares with others of its row; see
:mod:`bolaco.tune.tables`. This is done decoder block by decoder block, on calibration sequences, where the inputs of a
block come from the coded blocks before it. The result stores tables and packed codes, and no other copy of the weights.
A model that is coded already keeps its codes, and its tables are trained further.

Deviations from the paper: k-means of 16 centres takes the better of two starts, and factors of low-rank products are
coded too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.checkpoint.write import lowrank_model
from bolaco.layers import Entry, SketchLinear, put_module
from bolaco.models.lowrank import is_compressed
from bolaco.models.structure import prefix_of, weight_of
from bolaco.models.walk import BlockRunner
from bolaco.statistics.moments import PooledMoments
from bolaco.tune.mode import Context, Defaults, Matrix, Mode, Options, Prepared, structure_of
from bolaco.tune.tables import Coded, code, coded_layer, inverse_factor
from bolaco.work.files import require_space
from bolaco.work.tensors import load_tensors, save_tensors

# In the work folder: tables and codes as they are before training.
_FILE = "sketch.safetensors"


class SketchOptions(Options):
    """Size of codes and tables, and how they are found."""

    bits: Literal[2, 3, 4] = Field(3, description="length of a code")
    groups: int = Field(1, gt=0, description="tables for each row, each for a run of columns")
    sequences: int = Field(128, gt=0, description="training sequences to calibrate on")
    damping: float = Field(
        0.01, gt=0, description="added to the diagonal of the inputs' second moment, as a multiple of its mean"
    )
    power: float = Field(
        3.0, ge=0, description="how much k-means prefers columns whose errors cost more; 0: not at all"
    )
    store: Literal["bfloat16", "float16", "input"] = Field(
        "bfloat16",
        description="number format of tables and of all that is not coded, such as embeddings, if the input has more "
        "than 16 bits; input: the input's",
    )
    lookup: Literal["once", "always"] = Field(
        "once",
        description="once: a loaded model looks its weights up in the first pass and keeps them, in the memory of a "
        "dense model; always: in every pass, which takes less memory and is several times slower",
    )


def stored(options: SketchOptions, given: torch.dtype) -> torch.dtype:
    """The number format of the result, that of the input being given."""
    if options.store == "input" or given.itemsize <= 2:
        return given
    return torch.bfloat16 if options.store == "bfloat16" else torch.float16


def prepare(context: Context) -> Prepared:
    """Codes the matrices, or takes the codes of a run that was interrupted; the tables require gradients."""
    model, options = context.model, context.options
    matrices = context.matrices
    wanted = [matrix for matrix in matrices if any(_leaves(model, matrix))]
    file = None if context.folder is None else context.folder / _FILE
    if file is not None and file.is_file():
        state = {name: tensor.to(model.device) for name, tensor in load_tensors(file).items()}
        for name in {key.rpartition(".")[0] for key in state}:
            _put(model, name, Coded(state[f"{name}.lut"], state[f"{name}.codes"]), options.bits)
    elif wanted:
        if file is not None:  # it holds a byte for each weight; coding can take hours
            leaves = [weight_of(leaf) for matrix in wanted for _, leaf in _leaves(model, matrix)]
            require_space([(file.parent, sum(weight.numel() for weight in leaves))], "the codes")
        state = _code_blocks(context, wanted)
        if file is not None:
            save_tensors(file, state)
    for matrix in matrices:
        for module in matrix.of(model).modules():
            if isinstance(module, SketchLinear):
                module.lut.requires_grad_(True)

    def finish() -> PreTrainedModel:
        coded = _with_entries(model, wanted, options)
        _say_lookup(coded, matrices, options)
        return coded

    return Prepared(finish, frozenset(matrix.name for matrix in matrices))


def _leaves(model: nn.Module, matrix: Matrix) -> Iterator[tuple[str, nn.Module]]:
    """The Linears that a matrix consists of and that are not coded yet, each with its name in the model."""
    for name, module in matrix.of(model).named_modules(prefix=matrix.name):
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def _put(model: nn.Module, name: str, coded: Coded, bits: int) -> None:
    """Replaces a Linear by its coded form."""
    put_module(model, name, coded_layer(model.get_submodule(name), coded, bits))


def _code_blocks(context: Context, matrices: list[Matrix]) -> dict[str, Tensor]:
    """Codes matrices in place.

    Returns:
        Tables and codes as in :class:`bolaco.tune.tables.Coded`, by name: ``<Linear>.lut`` and ``<Linear>.codes``.
    """
    model, options = context.model, context.options
    sequences = [tokens[0] for tokens in context.tokens(options.sequences)]
    # Instructions differ in length. Joined, they are cut into pieces as long as the longest of them.
    stream, length = torch.cat(sequences), max(map(len, sequences))
    tokens = stream[: len(stream) // length * length].view(-1, length)
    structure = structure_of(model)
    runner = BlockRunner(model, structure, tokens, context.settings.training.batch)
    state: dict[str, Tensor] = {}
    with torch.no_grad(), context.reporter.stage("code", structure.num_layers) as tick:
        hidden = runner.embed()
        for layer in range(structure.num_layers):
            leaves = {name: leaf for m in matrices if m.layer == layer for name, leaf in _leaves(model, m)}
            moments = _moments(runner, layer, hidden, leaves)
            factors = {id(m): inverse_factor(m.finalize().second_moment, options.damping) for m in moments.values()}
            for name, leaf in leaves.items():
                weight = weight_of(leaf)
                coded = _empty(weight, options)
                if weight.numel():
                    coded = code(weight, factors[id(moments[name])], options.bits, options.groups, options.power)
                _put(model, name, coded, options.bits)
                state |= {f"{name}.lut": coded.lut, f"{name}.codes": coded.codes}
            runner.advance(layer, hidden)
            for name in leaves:
                coded_leaf = model.get_submodule(name)
                assert isinstance(coded_leaf, SketchLinear)  # it was put there above
                coded_leaf.forget()  # one block's looked-up weights are in memory at a time
            tick(1)
    return {name: tensor.cpu().contiguous() for name, tensor in state.items()}


def _empty(weight: Tensor, options: SketchOptions) -> Coded:
    """Tables and codes of a matrix without elements."""
    lut = torch.zeros(len(weight), options.groups, 2**options.bits, dtype=weight.dtype, device=weight.device)
    return Coded(lut, torch.zeros_like(weight, dtype=torch.uint8))


def _moments(runner: BlockRunner, layer: int, hidden: Tensor, leaves: dict[str, nn.Module]) -> dict[str, PooledMoments]:
    """Statistics of the input of every Linear in a block, by name.

    Linears that are called with the same tensor (q, k and v) have one object between them.

    Args:
        runner: runs the block.
        layer: index of the block.
        hidden: its inputs, ``[sequences, length, d]``.
        leaves: the Linears by name.
    """
    found: dict[str, PooledMoments] = {}
    seen: list[tuple[Tensor, PooledMoments]] = []

    def observe(name: str, x: Tensor) -> None:
        for other, known in seen:
            if other is x:
                found[name] = known
                return
        if name not in found:
            found[name] = PooledMoments(x.shape[-1], device=x.device)
        found[name].update(x)
        seen.append((x, found[name]))

    handles = [
        leaf.register_forward_pre_hook(lambda _, args, name=name: observe(name, args[0]))
        for name, leaf in leaves.items()
        if weight_of(leaf).numel()
    ]
    try:
        for rows in runner.slices if handles else ():
            runner.run(layer, hidden[rows])
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _with_entries(model: PreTrainedModel, matrices: list[Matrix], options: SketchOptions) -> PreTrainedModel:
    """Enters what was coded into the configuration; makes a compressed model of a dense one.

    Args:
        model: the model, whose layers are coded.
        matrices: the matrices that were coded.
        options: as in the run.

    Returns:
        The model to save.
    """
    prefix = prefix_of(model)
    coding: Entry = {"kind": SketchLinear.kind, "bits": options.bits, "groups": options.groups}
    entries: dict[str, Entry] = {}
    for matrix in matrices:
        entry = matrix.entry
        if entry is not None:
            # A part of a split projection has its name in its entry; the layer inside needs none.
            part = {"name": entry.pop("name")} if "name" in entry else {}
            inner = dict(entry)
            entry.clear()
            entry.update(part | coding | {"layer": inner})
            continue
        layer = matrix.of(model)
        assert isinstance(layer, SketchLinear)  # a matrix without an entry was dense
        plain: Entry = {"kind": "dense", "out": layer.out_features, "bias": layer.bias is not None}
        entries[matrix.name.removeprefix(prefix)] = coding | {"layer": plain}
    if is_compressed(model.config):
        model.config.lowrank["matrices"].update(entries)
        return model
    return lowrank_model(model, entries)


def _say_lookup(model: PreTrainedModel, matrices: tuple[Matrix, ...], options: SketchOptions) -> None:
    """Enters into the configuration when the codes of these matrices are looked up; without a word it is once."""
    entries, prefix = model.config.lowrank["matrices"], prefix_of(model)
    for matrix in matrices:
        entry = entries[matrix.name.removeprefix(prefix)] if matrix.entry is None else matrix.entry
        entry.pop("lookup", None)
        if options.lookup != "once":
            entry["lookup"] = options.lookup


MODE = Mode(
    name="sketch",
    paper="arXiv 2410.06364",
    summary="weights as 2 to 4 bit codes into tables, and only the tables (SketchTune, SpaLLM); dense models too",
    defaults=Defaults(learning_rate=8e-5, warmup=100, schedule="linear"),
    prepare=prepare,
    options=SketchOptions,
    exact_start=False,
    same_ranks=False,
    coded=True,
    written=("store", "lookup"),
    stored=stored,
)
