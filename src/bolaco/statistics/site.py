"""What a factorization method gets to know about one matrix, and the store of the part that comes from the loss."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.blockstore import BlockStore
from bolaco.models.structure import Site, Structure
from bolaco.progress import Reporter
from bolaco.recipe import Calibration
from bolaco.statistics.gradients import GradientWalk
from bolaco.statistics.moments import Moments
from bolaco.statistics.symmetric import fold, folded_size, unfold


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of one matrix ``[out, in]``. What the method did not ask for is None.

    Attributes:
        moments: of its input; one object for all matrices that share the input. None for methods that look at the
            weights only.
        gradient: ``[out, out]``, E[g g^T] with g a token's loss gradient at the output (nats per unit of output),
            labels sampled from the model.
        fisher: ``[in]``, the mean over sequences of (dL/dW)^2, L the loss of the sequence's own next tokens summed over
            the sequence (nats), added up over the outputs.
        outputs, inputs: ``[out]`` and ``[in]``, first-order importance of the elements during pruning, added up over a
            row and over a column.
    """

    moments: Moments | None
    gradient: Tensor | None = None
    fisher: Tensor | None = None
    outputs: Tensor | None = None
    inputs: Tensor | None = None


def of_members(site: Site, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The fields of a site that come from loss gradients, from those of its members by name.

    Of a stack: the gradients' moment is block-diagonal, its matrices' outputs count as uncorrelated; importances of
    inputs add up.
    """
    parts = [found.get(member.name, {}) for member in site.members]
    if len(parts) == 1:
        return dict(parts[0])
    joined: dict[str, Tensor] = {}
    for field in parts[0]:
        values = [part[field] for part in parts]
        if field == "gradient":
            joined[field] = torch.block_diag(*values)
        else:
            joined[field] = torch.cat(values) if field == "outputs" else torch.stack(values).sum(dim=0)
    return joined


def loss_bytes(
    fields: Iterable[str], model: PreTrainedModel, structure: Structure, tokens: Tensor, settings: Calibration
) -> int:
    """What estimating these fields on the first ``gradient_sequences`` of the tokens takes on disk, at most."""
    walks = {"gradient", "fisher"}.intersection(fields)
    if not walks:
        return 0
    members = [member for site in structure.sites for member in site.members]
    sizes = {"gradient": lambda site: folded_size(site.out_features), "fisher": lambda site: site.in_features}
    moments = 4 * sum(sizes[field](member) for field in walks for member in members)
    states = tokens[: settings.gradient_sequences].numel() * model.config.hidden_size * model.dtype.itemsize
    # Where the walk is, the place before while that is written, and perhaps the inputs of every block.
    return moments + states * (2 + (structure.num_layers + 1 if settings.cache == "disk" else 0))


def _at(store: BlockStore) -> BlockStore:
    """Where a walk is: the gradient at the input of the last block it has finished."""
    return BlockStore(store.folder / "walk")


def _interrupted(store: BlockStore, layers: int) -> tuple[int, Tensor] | None:
    """Last block of a walk that was interrupted, and the gradient at its input."""
    at = _at(store)
    finished = [layer for layer in range(layers) if at.has(layer)]
    return (finished[0], at.read(finished[0])["gradient"]) if finished else None


# Field of SiteStatistics -> folder of its blocks.
_FOLDERS = {"gradient": "gradients", "fisher": "fisher", "outputs": "importance-out", "inputs": "importance-in"}


class LossStatistics:
    """The fields of :class:`SiteStatistics` that come from loss gradients, block by block on disk.

    Args:
        folder: a folder for each field is made in it.
        wanted: names of the fields; may be empty.
    """

    def __init__(self, folder: Path, wanted: Iterable[str] = ()) -> None:
        self._stores = {field: BlockStore(folder / _FOLDERS[field]) for field in wanted}

    def estimate(
        self,
        model: PreTrainedModel,
        structure: Structure,
        tokens: Tensor,
        batch: int,
        reporter: Reporter,
        seed: int = 0,
        cache: bool = False,
    ) -> None:
        """Estimates every field that is not there yet; importances are :meth:`put` there before, by pruning.

        Args:
            model: the model, in evaluation mode.
            structure: its structure.
            tokens: ``[sequences, length]``.
            batch: sequences per pass.
            reporter: where progress goes.
            seed: of sampled labels.
            cache: keep block inputs in files beside the result instead of in memory.

        Raises:
            NonFiniteError: a gradient with NaN or infinity; names the matrix.
        """
        layers = structure.num_layers
        for field, store in self._stores.items():
            if all(store.has(layer) for layer in range(layers)):
                continue
            folder = store.folder / "inputs" if cache else None
            walk = GradientWalk(model, structure, tokens, batch, seed, folder, weights=field == "fisher")
            with reporter.stage("loss gradients", (layers + 1) * len(tokens)) as tick:
                for layer, found in walk.run(tick, _interrupted(store, layers)):
                    values = {name: value.float() for name, value in found.items()}
                    # Half of what a run of a wide model has on disk.
                    store.write(layer, {n: fold(v) for n, v in values.items()} if field == "gradient" else values)
                    _at(store).write(layer, {"gradient": walk.gradient})
                    _at(store).path(layer + 1).unlink(missing_ok=True)
            shutil.rmtree(_at(store).folder)

    def put(self, field: str, layer: int, values: Mapping[str, Tensor]) -> None:
        """Stores a field of one block's matrices that was found elsewhere, by site name."""
        self._stores[field].write(layer, dict(values))

    def of_layer(self, layer: int, device: torch.device) -> Mapping[str, Mapping[str, Tensor]]:
        """Fields of one block's matrices on ``device``, by site name and field; empty where no field is wanted.

        Raises:
            ResumeError: missing or damaged; names the file.
        """
        result: dict[str, dict[str, Tensor]] = {}
        for field, store in self._stores.items():
            for name, value in store.read(layer).items():
                try:
                    whole = unfold(value.to(device)) if field == "gradient" else value.to(device)
                except ValueError as error:
                    raise store.damaged(layer, error) from error
                result.setdefault(name, {})[field] = whole
        return result
