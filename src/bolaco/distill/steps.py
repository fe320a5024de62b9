"""Optimiser steps that go on after an interruption, as if there had been none.

What a step draws depends on its number only, so parameters, the state of the optimiser and what was recorded are all
that has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bolaco.errors import NonFiniteError
from bolaco.work.tensors import damaged, load_record, load_tensors, save_tensors

# A step's number -> its loss; the gradient is left in the parameters.
Step = Callable[[int], float]
# What a set of parameters is worth, less being better; None if there is nothing to tell by.
Worth = Callable[[], float | None]
_STATE = ("exp_avg", "exp_avg_sq")


class Steps:
    """Trains tensors with AdamW (arXiv 1711.05101), without weight decay unless it is given.

    Args:
        file: where the state is kept between steps, and the result in the end.
        parameters: leaves with gradients, by name; they are changed in place.
        learning_rate: falls to zero along a cosine, after a tenth of the steps that it rises in.
        total: number of steps.
        every: steps between two evaluations, and between two states that are kept.
        decay: weight decay.

    Attributes:
        losses: of every step.
        worths: number of a step -> what the parameters before it were worth.
        notes: what else the steps want to keep, in values that JSON can hold.
        tensors: the same in tensors.

    Raises:
        ResumeError: the file is damaged.
    """

    def __init__(
        self,
        file: Path,
        parameters: Mapping[str, Tensor],
        learning_rate: float,
        total: int,
        every: int,
        decay: float = 0.0,
    ) -> None:
        self.file, self.parameters, self.total, self.every = file, dict(parameters), total, every
        self._rate = learning_rate
        self._optimizer = torch.optim.AdamW(self.parameters.values(), lr=learning_rate, weight_decay=decay)
        self._best = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}
        self.done, self.losses, self.worths, self.notes = 0, list[float](), dict[int, float](), dict[str, Any]()
        self.tensors: dict[str, Tensor] = {}
        if file.exists():
            self._read()

    def run(self, step: Step, worth: Worth | None = None, tick: Callable[[int], object] | None = None) -> None:
        """Makes the steps that are left, and leaves the best parameters that were seen in place.

        Args:
            step: computes the loss and its gradient.
            worth: evaluates the parameters, at the beginning, every so many steps and in the end; without it the last
                ones are the best.
            tick: is told of steps.

        Raises:
            NonFiniteError: a loss is.
        """
        if tick is not None and self.done:
            tick(self.done)
        while self.done < self.total:
            if self.done % self.every == 0 and self.done not in self.worths:
                self._evaluate(worth)
                self._write()
            for group in self._optimizer.param_groups:
                group["lr"] = self._rate * self._shape(self.done)
            self._optimizer.zero_grad()
            loss = step(self.done)
            if not loss == loss or abs(loss) == float("inf"):
                raise NonFiniteError(f"{self.file.stem}: the loss of step {self.done} is {loss}; lower learning_rate")
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self._optimizer.step()
            self.losses.append(loss)
            self.done += 1
            if tick is not None:
                tick(1)
        if self.done not in self.worths:
            self._evaluate(worth)
            self._write()
        with torch.no_grad():
            for name, tensor in self.parameters.items():
                tensor.copy_(self._best[name])

    def _evaluate(self, worth: Worth | None) -> None:
        value = None if worth is None else worth()
        if value is None or value < min(self.worths.values(), default=float("inf")):
            self._best = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}
        if value is not None:
            self.worths[self.done] = value

    def _shape(self, step: int) -> float:
        """The learning rate of a step, as a share of the highest."""
        rising = max(1, self.total // 10)
        if step < rising:
            return (step + 1) / rising
        passed = (step - rising) / max(1, self.total - rising)
        return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * passed))))

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.parameters.items():
            tensors |= {f"now.{name}": tensor, f"best.{name}": self._best[name]}
            state = self._optimizer.state.get(tensor, {})
            tensors |= {f"{kind}.{name}": state[kind] for kind in _STATE if kind in state}
        tensors |= {f"kept.{name}": tensor for name, tensor in self.tensors.items()}
        record = {"done": self.done, "losses": self.losses, "worths": self.worths, "notes": self.notes}
        # Copies, for two names may share a tensor.
        save_tensors(self.file, {name: tensor.detach().clone() for name, tensor in tensors.items()}, record)

    def _read(self) -> None:
        record, found = load_record(self.file), load_tensors(self.file)
        try:
            self.done, self.losses, self.notes = record["done"], record["losses"], record["notes"]
            self.worths = {int(step): value for step, value in record["worths"].items()}
            kept = "kept."
            self.tensors = {name.removeprefix(kept): found[name] for name in found if name.startswith(kept)}
            with torch.no_grad():
                for name, tensor in self.parameters.items():
                    tensor.copy_(found[f"now.{name}"])
                    self._best[name] = found[f"best.{name}"].to(tensor)
                    state = {kind: found[f"{kind}.{name}"].to(tensor) for kind in _STATE if f"{kind}.{name}" in found}
                    if state:
                        self._optimizer.state[tensor] = {"step": torch.tensor(float(self.done)), **state}
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise damaged(self.file, error) from error
