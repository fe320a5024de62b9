"""All parameters are trained, as in pretraining; layer-chopped models need it (arXiv 2305.14864v3).

It takes any model, dense ones included. Deviations from the paper: the warm-up is a share of the steps instead of 2,000
steps, and factored matrices are trained as two balanced factors, whatever form they are stored in. The 500 steps that
fill the optimizer's state before blocks are removed are an option, see :mod:`bolaco.tune.fill`.
"""

from __future__ import annotations

from pydantic import Field
from transformers import PreTrainedModel

from bolaco.errors import RecipeError
from bolaco.models.lowrank import is_compressed
from bolaco.tune.factored import stored, two_factors
from bolaco.tune.fill import check_fill, filled
from bolaco.tune.mode import Context, Defaults, Mode, Options, Prepared


class ContinuedOptions(Options):
    """What training begins with."""

    fill: int = Field(
        0,
        ge=0,
        description="steps on the model before its blocks were removed, that fill the optimizer's state (CHOP: 500)",
    )


def check(context: Context) -> None:
    """Raises RecipeError if only some types of matrices are to be tuned, or there was no model with more blocks."""
    if context.settings.types is not None:
        raise RecipeError("types: mode 'continued' trains all parameters; leave it out, or use --mode factors")
    if context.options.fill:
        check_fill(context)


def prepare(context: Context) -> Prepared:
    """Makes every parameter require a gradient."""
    model = context.model
    touched = frozenset(model.state_dict())
    matrices = context.factored if is_compressed(model.config) else ()
    two_factors(model, matrices)
    model.requires_grad_(True)

    def finish() -> PreTrainedModel:
        stored(model, matrices)
        return model

    moments = filled(context, context.options.fill) if context.options.fill else None
    return Prepared(finish, touched, moments=moments)


MODE = Mode(
    name="continued",
    paper="arXiv 2305.14864",
    summary="all parameters, as in pretraining; dense models too (CHOP's continued pretraining)",
    defaults=Defaults(
        learning_rate=3e-4, warmup=0.05, schedule="cosine", final_rate=0.1, weight_decay=0.1, betas=(0.9, 0.95)
    ),
    prepare=prepare,
    options=ContinuedOptions,
    check=check,
)
