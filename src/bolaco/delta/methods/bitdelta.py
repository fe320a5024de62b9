"""BitDelta (arXiv 2402.10193): the signs of D, and one size for each matrix, trained on the fine-tuned model's logits.

A size begins with the mean of |D|. All sizes are then trained together by AdamW with a cosine schedule towards the
logits of the fine-tuned model, on rows of calibration text; nothing else changes. One bit a number is all it can do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bolaco.delta.forms.signs import Signs
from bolaco.delta.method import DENSE_BITS, DeltaMethod, DeltaTask
from bolaco.errors import BudgetError, NonFiniteError
from bolaco.models.structure import Site
from bolaco.models.walk import no_gradients
from bolaco.settings import Section
from bolaco.work.tensors import load_tensors, save_tensors


class BitDeltaOptions(Section):
    """The training of the sizes."""

    steps: int = Field(100, ge=0, description="of training; 0 leaves the mean of |D| (the paper: 100 to 200)")
    batch: int = Field(4, gt=0, description="rows of a step")
    length: int = Field(128, ge=2, description="tokens of a row")
    learning_rate: float = Field(1e-4, gt=0)


def compress(task: DeltaTask, options: BitDeltaOptions) -> None:
    """Signs and sizes.

    Raises:
        BudgetError: less than a bit for each number.
        NonFiniteError: training diverged.
    """
    sites = [site for layer in range(task.layers) for site in task.sites(layer)]
    needed = sum(8 * -(-site.size // 8) + DENSE_BITS for site in sites)
    if needed > task.total:
        least = Fraction(needed, DENSE_BITS * sum(site.size for site in task.subject.structure.sites))
        raise BudgetError(
            f"bitdelta: takes a bit for each number and a size for each matrix, {needed:,} bits, not {task.total:,}; "
            f"give --ratio {math.ceil(float(least) * 1e5) / 1e5:g} or more, or take another method"
        )
    sizes = {site.name: task.subject.weight(site).abs().mean().float() for site in sites}
    if options.steps and sites and not task.store.complete(task.layers):
        sizes = _trained(task, sites, sizes, options)
    task.each_block("signs", lambda site, delta: Signs.of(delta, sizes[site.name]))


def _trained(
    task: DeltaTask, sites: list[Site], start: dict[str, Tensor], options: BitDeltaOptions
) -> dict[str, Tensor]:
    """Sizes by name after training; what a killed run has done so far is there already."""
    folder = task.folder("sizes", options)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sizes.safetensors"
    rows = task.tokens.reshape(-1)
    rows = rows[: len(rows) // options.length * options.length].view(-1, options.length)
    names = [site.name for site in sites]
    sizes = nn.Parameter(torch.stack([start[name] for name in names]))
    first, second, done = torch.zeros_like(sizes), torch.zeros_like(sizes), 0
    if file.is_file():
        kept = load_tensors(file)
        sizes.data, first, second, done = kept["sizes"], kept["first"], kept["second"], int(kept["step"])
    model = task.subject.model
    with no_gradients(model), task.reporter.stage("train sizes", options.steps) as tick:
        tick(done)
        for step in range(done, options.steps):
            chosen = torch.randint(0, len(rows), (options.batch,), generator=torch.Generator().manual_seed(step))
            batch = rows[chosen].to(model.device)
            with torch.no_grad():
                wanted = model(input_ids=batch, use_cache=False).logits.float()
            with _signed(task, sites, sizes):
                loss = F.mse_loss(model(input_ids=batch, use_cache=False).logits.float(), wanted)
            if not torch.isfinite(loss):
                raise NonFiniteError(f"bitdelta: the loss of step {step} is not finite; lower options.learning_rate")
            (gradient,) = torch.autograd.grad(loss, sizes)
            # AdamW without decay, in the open so that a killed run goes on with the same moments.
            rate = options.learning_rate * (1 + math.cos(math.pi * step / options.steps)) / 2
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            move = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            sizes = nn.Parameter(sizes.detach() - rate * move)
            if step % 10 == 9 or step + 1 == options.steps:
                state = {"sizes": sizes.detach(), "first": first, "second": second, "step": torch.tensor(step + 1)}
                save_tensors(file, state)
            tick(1)
    return {name: sizes.detach()[i] for i, name in enumerate(names)}


@contextmanager
def _signed(task: DeltaTask, sites: list[Site], sizes: Tensor) -> Iterator[None]:
    """While it lasts, the fine-tuned model is the base plus signs times sizes, differentiable in the sizes."""
    subject, handles = task.subject, []
    base = subject.model.base_model

    def correction(site: Site, size: Tensor) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            delta = subject.weight(site)
            signs = torch.where(delta >= 0, 1.0, -1.0)
            # The module computes with the fine-tuned weight: what is missing is size * signs - D.
            change = F.linear(args[0], (size * signs - delta).to(args[0].dtype))
            pieces = [output[..., : site.rows[0]], output[..., slice(*site.rows)] + change, output[..., site.rows[1] :]]
            return torch.cat(pieces, dim=-1)

        handles.append(base.get_submodule(site.module).register_forward_hook(hook))

    for site, size in zip(sites, sizes):
        correction(site, size)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


METHOD = DeltaMethod(
    name="bitdelta",
    paper="arXiv 2402.10193",
    summary="signs, and a size for each matrix that is trained on the fine-tuned model's logits",
    compress=compress,
    options=BitDeltaOptions,
)
