"""The optimizer's moments of a model before blocks were removed from it, to begin its training with (Just CHOP).

AdamW takes some hundred steps until its running means of gradients and their squares are worth anything. The paper
(arXiv 2305.14864) trains the uncompressed model for 500 steps, so that the parameters that stay begin with filled ones.
Here the weights do not move meanwhile: training begins with the model that was written and measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bolaco.checkpoint.info import CompressedInfo
from bolaco.errors import NonFiniteError, RecipeError
from bolaco.evaluation.losses import summed_losses
from bolaco.evaluation.objective import Head, final_hidden
from bolaco.models.structure import prefix_of
from bolaco.tune.mode import Context, Moments, structure_of
from bolaco.work.tensors import load_tensors, save_tensors

# In the work folder.
_FILE = "moments.safetensors"


def check_fill(context: Context) -> None:
    """Raises RecipeError if the input is no model that blocks were removed from."""
    info = context.info
    if not isinstance(info, CompressedInfo) or info.storage is not None:
        raise RecipeError(
            f"options.fill: {context.settings.model} is no model that blocks were removed from (method chop); "
            "leave it out"
        )


def filled(context: Context, steps: int) -> Moments:
    """Moments of ``steps`` steps on the original, by names in the model that is tuned; found again in its folder.

    Raises:
        NonFiniteError: a gradient is not finite.
        UnsupportedModelError: the original cannot be loaded.
    """
    file = None if context.folder is None else context.folder / _FILE
    if file is not None and file.is_file():
        return _read(file, steps, context.model.device)
    original = context.original(None)
    moments = _moments(context, original, _names(context), steps)
    if file is not None:
        save_tensors(file, {f"{k}.{n}": v for k in ("mean", "square") for n, v in getattr(moments, k).items()})
    return moments


def _read(file: Path, steps: int, device: torch.device) -> Moments:
    state = {name: tensor.to(device) for name, tensor in load_tensors(file).items()}
    parts: dict[str, dict[str, Tensor]] = {"mean": {}, "square": {}}
    for key, tensor in state.items():
        kind, _, name = key.partition(".")
        parts[kind][name] = tensor
    return Moments(parts["mean"], parts["square"], steps)


def _names(context: Context) -> dict[str, str]:
    """Names of parameters of the original -> what they are called in the model that is tuned, if they are in it."""
    info, model = context.info, context.model
    assert isinstance(info, CompressedInfo)  # this was checked
    blocks = f"{prefix_of(model)}{structure_of(model).stack}."
    found = {}
    for name, _ in model.named_parameters():
        inner = name.removeprefix(blocks)
        layer, _, rest = inner.partition(".")
        found[f"{blocks}{info.layers[int(layer)]}.{rest}" if inner != name else name] = name
    return found


def _moments(context: Context, original: PreTrainedModel, names: Mapping[str, str], steps: int) -> Moments:
    training, trainer = context.settings.training, context.settings.trainer
    trained = {names[name]: parameter for name, parameter in original.named_parameters() if name in names}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    betas = (trainer.get("adam_beta1", 0.9), trainer.get("adam_beta2", 0.999))
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, betas=betas, weight_decay=0.0)
    head = Head(original)
    with torch.enable_grad(), context.reporter.stage("fill", steps) as tick:
        for step, batches in enumerate(_steps(context, steps)):
            optimizer.zero_grad(set_to_none=True)
            count = sum(targets.numel() for _, targets in batches)
            for tokens, targets in batches:
                with torch.autocast(original.device.type, torch.bfloat16, enabled=training.autocast):
                    states = final_hidden(original, tokens)[:, :-1]
                    loss = summed_losses(head, states, targets.to(original.device), chunk=context.settings.chunk)[0]
                (loss / count).backward()
            norm = nn.utils.clip_grad_norm_(trained.values(), training.max_grad_norm or torch.inf)
            if not torch.isfinite(norm):
                raise NonFiniteError(
                    f"options.fill: a gradient of step {step} is not finite; try training.autocast=false"
                )
            optimizer.step()
            tick(1)
    mean = {name: optimizer.state[p]["exp_avg"] for name, p in trained.items() if p in optimizer.state}
    square = {name: optimizer.state[p]["exp_avg_sq"] for name, p in trained.items() if p in optimizer.state}
    return Moments(mean, square, steps)


def _steps(context: Context, steps: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For each step its sequences ``[1, length]``, with the tokens that follow, from the beginning of the text on."""
    training = context.settings.training
    size = training.batch * training.gradient_accumulation
    sequences = cycle(context.tokens(steps * size))
    for _ in range(steps):
        yield [(tokens, tokens[:, 1:]) for tokens in islice(sequences, size)]


def begin_with(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: Moments) -> None:
    """Gives an optimizer its moments before the first step.

    Raises:
        RecipeError: it is no AdamW.
    """
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise RecipeError(f"options.fill: is for AdamW, and trainer.optim makes this a {type(optimizer).__name__}")
    on_device = {
        p: group.get("fused") or group.get("capturable") for group in optimizer.param_groups for p in group["params"]
    }
    for name, mean in moments.mean.items():
        parameter = parameters[name]
        step = torch.tensor(float(moments.steps), device=parameter.device if on_device[parameter] else "cpu")
        square = moments.square[name]
        optimizer.state[parameter] = {"step": step, "exp_avg": mean.clone(), "exp_avg_sq": square.clone()}
