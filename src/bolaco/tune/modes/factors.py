"""The low-rank factors are trained, and nothing else unless asked for: LRC-only training of WeLore (arXiv 2407.11239).

Deviations from the paper: factored matrices are trained as two balanced factors, whatever form they are stored in.
"""

from __future__ import annotations

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from bolaco.tune.factored import stored, two_factors
from bolaco.tune.mode import Context, Defaults, Mode, Options, Prepared


class FactorOptions(Options):
    """What is trained beside the factors."""

    norms: bool = Field(False, description="the norms' weights too")
    biases: bool = Field(False, description="the factored matrices' biases too")


def prepare(context: Context) -> Prepared:
    """Makes the factors of every factored matrix require gradients."""
    model, options = context.model, context.options
    matrices = context.factored
    for layer in two_factors(model, matrices).values():
        for linear in layer.linears().values():
            linear.weight.requires_grad_(True)
        if options.biases and layer.expand.bias is not None:
            layer.expand.bias.requires_grad_(True)
    touched = {matrix.name for matrix in matrices}
    if options.norms:
        touched |= train_norms(model)

    def finish() -> PreTrainedModel:
        stored(model, matrices)
        return model

    return Prepared(finish, frozenset(touched))


def train_norms(model: nn.Module) -> set[str]:
    """Makes the parameters of all norms require gradients; returns their names."""
    found = set()
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            for key, parameter in module.named_parameters(name, recurse=False):
                parameter.requires_grad_(True)
                found.add(key)
    return found


MODE = Mode(
    name="factors",
    paper="arXiv 2407.11239",
    summary="the low-rank factors themselves, everything else frozen (WeLore, LRC-only)",
    defaults=Defaults(
        learning_rate=5e-5, distill_rate=1e-4, warmup=0.2, schedule="cosine", final_rate=0.1, weight_decay=0.0
    ),
    prepare=prepare,
    check=lambda context: context.factored,
    options=FactorOptions,
)
