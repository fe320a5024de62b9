"""Tensor-train adapters on q and v (TT-LoRA, arXiv 2408.01008): only some hundred numbers for each matrix are trained.

An adapter adds its output to that of a matrix, whether that is dense or factored. The adapters are written without the
model, which they name; ``bolaco.load`` and bolaco's commands take both. With ``whole`` the unchanged model is written
beside them, which stock transformers loads without them. Adapters of dense matrices can be merged instead. A factored
matrix cannot take one in: its rank would rise.

Deviations from the paper: sizes for which it gives no factorization are factored by a rule of ours
(:func:`bolaco.layers.tensor_train.factorization`), and the paper's early stopping is an option of all modes
(``training.patience``, of which it has 10), which is off by default.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bolaco.errors import RecipeError, UnsupportedModelError
from bolaco.layers.tensor_train import TensorTrain, TrainAdapter, shape_of, train_sizes
from bolaco.models.adapters import LARGEST_RANK, TRAIN_JSON, TRAIN_TENSORS, attach_trains, save_trains
from bolaco.models.load import lasting_name
from bolaco.tune.mode import Context, Defaults, Matrix, Mode, Options, Prepared

# Matrix types that get adapters if the settings name none.
TYPES = ("q", "v")
_FILES = f"The adapter is in `{TRAIN_TENSORS}` and `{TRAIN_JSON}`; what was trained is measured with it. "
_NOTE = _FILES + (
    "Load the folder with `bolaco.load` to have it. Stock transformers loads the model without the adapter, as it was "
    "before tuning."
)
_ALONE = _FILES + (
    "The folder holds no model: `bolaco.load`, `bolaco eval` and `bolaco bench` of it load `{}` and put the adapter "
    "on. `--set options.whole=true` writes the model too."
)


class TrainOptions(Options):
    """Size of the trains, and what becomes of them."""

    rank: int = Field(5, gt=0, le=LARGEST_RANK, description="size of every bond between two cores")
    alpha: float = Field(16.0, gt=0, description="an adapter's output is multiplied by it")
    factors: int = Field(
        4, gt=0, description="a matrix's size is the product of at most so many numbers; published ones are kept"
    )
    merge: bool = Field(False, description="merge the adapters into the matrices, which must all be dense")
    whole: bool = Field(False, description="write the unchanged model beside the adapters, and not only its name")


def prepare(context: Context) -> Prepared:
    """Adds the adapters, whose parameters require gradients."""
    model, options = context.model, context.options
    matrices = _chosen(context)
    adapters: dict[str, TrainAdapter] = {}
    for i, matrix in enumerate(matrices):
        layer = matrix.of(model)
        generator = torch.Generator().manual_seed(context.settings.seed * 100_003 + i)
        inputs, outputs = train_sizes(*shape_of(layer), options.rank, options.factors)
        train = TensorTrain(inputs, outputs, options.rank, generator, model.dtype, model.device)
        adapters[matrix.name] = TrainAdapter(layer, train, options.alpha)
        matrix.put(model, adapters[matrix.name])

    def finish() -> PreTrainedModel:
        for matrix in matrices:
            adapter = adapters[matrix.name]
            matrix.put(model, adapter.merged() if options.merge else adapter.layer)
        return model

    if options.merge:
        return Prepared(finish, frozenset(f"{matrix.name}.weight" for matrix in matrices))
    base = None if options.whole else lasting_name(context.settings.model)
    return Prepared(
        finish,
        frozenset(),
        save_extra=lambda folder: save_trains(folder, adapters, base),
        alone=base is not None,
        note=_NOTE if base is None else _ALONE.format(context.settings.model),
    )


def _chosen(context: Context) -> tuple[Matrix, ...]:
    """The matrices that get an adapter.

    Raises:
        UnsupportedModelError: there is none.
        RecipeError: adapters are to be merged, and one of these matrices is not dense.
    """
    types = context.settings.types or TYPES
    found = tuple(matrix for matrix in context.matrices if set(matrix.types) & set(types))
    if not found:
        raise UnsupportedModelError(f"{context.settings.model}: has no matrix of type {', '.join(types)} to adapt")
    for matrix in found if context.options.merge else ():
        if not isinstance(matrix.of(context.model), nn.Linear | Conv1D):
            raise RecipeError(
                f"options.merge: {matrix.name} is no dense matrix ({type(matrix.of(context.model)).__name__}), and "
                "merging would raise its rank; leave the option out to keep the adapter in files of its own"
            )
    return found


MODE = Mode(
    name="tt-lora",
    paper="arXiv 2408.01008",
    summary="tensor-train adapters on q and v, kept beside the model or merged into dense matrices (TT-LoRA)",
    defaults=Defaults(learning_rate=1e-3, warmup=0.05, schedule="linear"),
    prepare=prepare,
    options=TrainOptions,
    same_ranks=False,
    coded=True,
    check=_chosen,
    attach=attach_trains,
    written=("whole",),
)
