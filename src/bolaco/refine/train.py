"""Local training of compressed blocks towards what the original blocks give (AA-SVD, arXiv 2604.02119, section on block
refinement). It uses gradients, but no labels and nothing beyond the blocks that are trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from bolaco.layers import FollowerLinear, LowRankLinear
from bolaco.models.walk import BlockRunner
from bolaco.parallel import team
from bolaco.refine.loss import Loss, OutputLoss
from bolaco.refine.settings import Refinement
from bolaco.work.blockstore import BlockStore
from bolaco.work.memory import free_memory

# Looks at the held-out sequences while a block is trained, at most, and the least steps between two: a look at 16
# sequences is as long as more than one step on four.
_LOOKS, _STEPS_A_LOOK = 10, 5
# Seconds after which a training that is not finished is written down, and by how much longer that took.
_WRITTEN_EVERY, _WRITTEN_SHARE = 60.0, 20.0
# Of the memory that is free, what the activations of all blocks may take; else they are computed twice.
_ACTIVATIONS = 0.25


@dataclass
class Training:
    """What came of a training.

    Attributes:
        losses: of every step.
        held_out: the loss on the sequences that are held out, before the first step and at every look.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Stretch:
    """Consecutive blocks of the compressed model, and the hidden states at both ends.

    Attributes:
        layer: the first of them.
        blocks: changed in place.
        inputs: ``[sequences, length, d]``, its inputs in the compressed model.
        targets: the original's outputs of the last of them.
    """

    layer: int
    blocks: Sequence[nn.Module]
    inputs: Tensor
    targets: Tensor

    def run(self, runner: BlockRunner, rows: Tensor) -> Tensor:
        """Outputs on some of the sequences.

        With gradients, activations of all blocks are kept where there is memory for them; elsewhere only what goes from
        one block to the next is, and the rest is computed again.
        """
        state, sparing = self.inputs[rows], False
        for offset, block in enumerate(self.blocks):
            if sparing:
                state = checkpoint(runner.run, self.layer + offset, state, block, rows, use_reentrant=False)
            elif offset or not torch.is_grad_enabled() or len(self.blocks) == 1:
                state = runner.run(self.layer + offset, state, block, rows)
            else:
                with _counted() as kept:
                    state = runner.run(self.layer, state, block, rows)
                sparing = sum(kept.values()) * len(self.blocks) > _ACTIVATIONS * free_memory(runner.model.device)
        return state


class BlockTrainer:
    """Trains stretches of blocks of one model.

    Args:
        runner: calls blocks.
        settings: steps, learning rate, what is held out.
        seed: of the order of the sequences.
        partial: where a training that takes long is written down, so that it goes on there; None: nowhere.
    """

    def __init__(self, runner: BlockRunner, settings: Refinement, seed: int, partial: BlockStore | None = None) -> None:
        self.runner, self.settings, self.seed, self.partial = runner, settings, seed, partial
        self.autocast = settings.autocast and fast_bfloat16(runner.model.device)

    def train(
        self,
        stretch: Stretch,
        loss: Loss,
        steps: int,
        tick: Callable[[int], Any] | None = None,
        parameters: Sequence[nn.Parameter] | None = None,
        rate: float | None = None,
    ) -> Training:
        """Trains the parameters of the stretch's blocks (factors, norms, biases).

        Args:
            stretch: what is trained; without gradients afterwards.
            loss: what is minimised.
            steps: at most; fewer where the held-out sequences say that it gets no better.
            tick: called with the steps that are done or left out, ``steps`` in all.
            parameters: those that are trained, float32; all by default.
            rate: learning rate; that of the settings by default.

        Returns:
            Losses. Where sequences are held out the blocks are as they were at the best look at them.
        """
        blocks = nn.ModuleList(stretch.blocks)
        dtype = next(blocks.parameters()).dtype
        if parameters is None:
            blocks.float()  # steps are too small for half precision
            for block in blocks:
                balance(block)
            parameters = [p for p in blocks.parameters() if p.is_floating_point()]
        rate = rate or self.settings.learning_rate
        state = _State(parameters, rate, self.settings.weight_decay, steps, self.seed * 100_003 + stretch.layer)
        runner, total = self.runner, len(stretch.inputs)
        held = min(self.settings.held_out, total // 3)
        known = total - held
        looks = look_steps(steps) if held else frozenset()
        if self.partial is not None and team.agreed(self.partial.has(stretch.layer)):
            state.restore(self.partial.read(stretch.layer))
            if tick:
                tick(state.step)
        if isinstance(loss, OutputLoss):
            self._begin(stretch, loss, state)
        if held and not state.found.held_out:
            state.look(self._held_out(stretch, loss, known))
        size, due = runner.slices[0].stop, time.monotonic() + _WRITTEN_EVERY
        while state.step < steps and state.worse < self.settings.patience:
            state.descend(*self._mean_loss(stretch, loss, state.rows(size, known)))
            if state.step in looks:
                state.look(self._held_out(stretch, loss, known))
            if tick:
                tick(1)
            if self.partial is not None and (now := time.monotonic()) > due:
                self.partial.write(stretch.layer, state.saved())
                due = (done := time.monotonic()) + max(_WRITTEN_EVERY, _WRITTEN_SHARE * (done - now))
        if tick and state.step < steps:
            tick(steps - state.step)
        state.finish()
        blocks.to(dtype)
        return state.found

    def _mean_loss(self, stretch: Stretch, loss: Loss, rows: Tensor) -> tuple[Tensor | None, float]:
        """This rank's part of the loss of a batch, which adds up to the batch's over the ranks, and the latter.

        None where the batch has no sequence for this rank.
        """
        own = rows[team.share(len(rows))]
        part = None
        if len(own):
            self.runner.know(len(own))
            target = stretch.targets[own].to(self.runner.model.device)
            with torch.enable_grad():
                part = loss(self._output(stretch, own), target, own) * (len(own) / len(rows))
        whole = torch.zeros(1, dtype=torch.float64) if part is None else part.detach().double().cpu().view(1)
        team.all_reduce({"loss": whole})
        return part, float(whole)

    def _output(self, stretch: Stretch, rows: Tensor) -> Tensor:
        try:
            with torch.autocast(self.runner.model.device.type, torch.bfloat16, enabled=self.autocast):
                return stretch.run(self.runner, rows)
        except RuntimeError:
            if not self.autocast:
                raise
            # Some families put results of several precisions into one tensor.
            self.autocast = False
            return stretch.run(self.runner, rows)

    @torch.no_grad()
    def _held_out(self, stretch: Stretch, loss: Loss, known: int) -> float:
        """Mean loss of the sequences that are not trained on."""
        size, total = self.runner.slices[0].stop, 0.0
        starts = range(known, len(stretch.inputs), size)
        for start in starts[team.share(len(starts))]:
            stop = min(start + size, len(stretch.inputs))
            # A batch is of the size that blocks were seen to be called with; what is not held out does not count.
            rows, new = torch.arange(stop - size, stop), slice(size - (stop - start), size)
            target = stretch.targets[rows].to(self.runner.model.device)
            output = self._output(stretch, rows)
            total += float(loss(output[new], target[new], rows[new])) * (stop - start)
        whole = torch.tensor([total], dtype=torch.float64)
        team.all_reduce({"held out": whole})
        return float(whole) / (len(stretch.inputs) - known)

    @torch.no_grad()
    def _begin(self, stretch: Stretch, loss: OutputLoss, state: _State) -> None:
        """Tells a loss what it is before the first step, on the first batch."""
        if state.begun is None:
            rows = torch.arange(self.runner.slices[0].stop)
            output = stretch.run(self.runner, rows)
            begun = loss.begin(output, stretch.targets[rows].to(output.device))
            state.begun = loss.scale = cast(tuple[float, float], tuple(team.agreed(list(begun))))
        else:
            loss.scale = state.begun


class _State:
    """Where a training is: parameters, moments, what comes next, the best so far."""

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float, decay: float, steps: int, seed: int) -> None:
        self.parameters = list(parameters)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate)
        self.rate, self.steps, self.warm = rate, steps, max(1, steps // 10)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.step = 0
        self.worse = 0  # looks since the best one
        self.begun: tuple[float, float] | None = None
        self.best: list[Tensor] | None = None
        self.found = Training()

    def rows(self, size: int, known: int) -> Tensor:
        """The sequences of the next step; each comes once before any comes again."""
        while len(self.order) < size:
            self.order = torch.cat([self.order, torch.randperm(known, generator=self.generator)])
        chosen, self.order = self.order[:size], self.order[size:]
        return chosen

    def descend(self, part: Tensor | None, loss: float) -> None:
        """One step; ``part`` of the loss is this rank's, if it has one."""
        done, left = self.step, max(1, self.steps - self.warm)
        factor = min(1.0, (done + 1) / self.warm) * 0.5 * (1 + math.cos(math.pi * max(0, done - self.warm) / left))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        if part is not None:
            part.backward()
        self._add_up()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.found.losses.append(loss)
        self.step += 1

    def _add_up(self) -> None:
        """Gradients of all ranks, on each of them."""
        if team.count() == 1:
            return
        # What no loss depends on has no gradient anywhere, and is not moved.
        used = torch.tensor([0 if p.grad is None else 1 for p in self.parameters])
        team.all_reduce({"used": used})
        moved = [p for p, known in zip(self.parameters, used.tolist(), strict=True) if known]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in moved])
        team.all_reduce({"gradients": flat})
        for parameter, part in zip(moved, flat.split([p.numel() for p in moved]), strict=True):
            parameter.grad = part.view_as(parameter)

    def look(self, held_out: float) -> None:
        """Takes a loss on what is held out."""
        known = self.found.held_out
        better = not known or held_out < min(known)
        known.append(held_out)
        self.worse = 0 if better else self.worse + 1
        if better:
            self.best = [p.detach().clone() for p in self.parameters]

    def finish(self) -> None:
        """The parameters at their best, without gradients."""
        for i, parameter in enumerate(self.parameters):
            parameter.requires_grad_(False)
            parameter.grad = None
            if self.best is not None:
                parameter.data.copy_(self.best[i])

    def saved(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        values = {
            "order": self.order,
            "generator": self.generator.get_state(),
            "counts": torch.tensor([self.step, self.worse]),
            "losses": torch.tensor(self.found.losses, dtype=torch.float64),
            "held_out": torch.tensor(self.found.held_out, dtype=torch.float64),
        }
        if self.begun is not None:
            values["begun"] = torch.tensor(self.begun, dtype=torch.float64)
        for i, parameter in enumerate(self.parameters):
            values[f"{i}"] = parameter.detach()
            for name, moment in self.optimizer.state.get(parameter, {}).items():
                values[f"{i}.{name}"] = moment
            if self.best is not None:
                values[f"{i}.best"] = self.best[i]
        return values

    def restore(self, values: dict[str, Tensor]) -> None:
        """What :meth:`saved` gave."""
        self.order = values["order"]
        self.generator.set_state(values["generator"])
        self.step, self.worse = values["counts"].tolist()
        self.found = Training(values["losses"].tolist(), values["held_out"].tolist())
        if "begun" in values:
            first, second = values["begun"].tolist()
            self.begun = first, second
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(values[f"{i}"])
            moments = {n.partition(".")[2]: v for n, v in values.items() if n.startswith(f"{i}.")}
            best = moments.pop("best", None)
            if best is not None:
                self.best = [*(self.best or []), best.to(parameter.device)]
            if moments:
                self.optimizer.state[parameter] = {
                    name: value.clone() if name == "step" else value.to(parameter.device, copy=True)
                    for name, value in moments.items()
                }


def look_steps(steps: int) -> frozenset[int]:
    """After which of so many steps the held-out sequences are looked at; the last one is among them."""
    count = max(1, min(_LOOKS, steps // _STEPS_A_LOOK))
    return frozenset(round((i + 1) * steps / count) for i in range(count))


@contextmanager
def _counted() -> Iterator[dict[int, int]]:
    """Bytes of what autograd keeps while this lasts, by address."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are no slower than in float32: a CPU without instructions for them takes longer."""
    known = getattr(torch.cpu, "get_capabilities", None)  # not in older versions of torch
    if device.type != "cpu" or known is None:
        return True
    return any(value for name, value in known().items() if name.endswith("bf16"))


def balance(block: nn.Module) -> None:
    """Gives both factors of every component the same norm: Adam's steps are of one size for all parameters."""
    expands: dict[LowRankLinear, list[Tensor]] = {}
    for module in block.modules():
        if isinstance(module, LowRankLinear | FollowerLinear):
            owner = module.lead if isinstance(module, FollowerLinear) else module
            expands.setdefault(owner, []).append(module.expand.weight.data)
    for module, outputs in expands.items():
        reduce = module.reduce.weight.data
        ratio = (reduce.norm(dim=1) / torch.cat(outputs).norm(dim=0)).sqrt()
        ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
        for expand in outputs:
            expand *= ratio
        reduce /= ratio[:, None]
