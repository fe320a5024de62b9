"""The factorization methods by name. A method is one small file with one registered function."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from bolaco.errors import RecipeError
from bolaco.factorize.solver import Factors, InputMetric
from bolaco.statistics.moments import Moments

# prepare(weight [out, in], metric, moments, max_rank) -> factors; methods that use gradients take a fifth argument, the
# second moment of the loss gradient at the output [out, out].
Prepare = Callable[..., Factors]


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        metric: the input metric, from the input's moments; computed once for matrices that share an input.
        prepare: factors of one matrix under that metric.
        gradients: whether it needs the loss gradients.
        comparable: whether squared errors of different matrices are in one unit.
        centred: whether inputs are centred and the mean output restored by a bias.
    """

    name: str
    paper: str
    summary: str
    metric: Callable[[Moments], InputMetric]
    prepare: Prepare
    gradients: bool = False
    comparable: bool = False
    centred: bool = False


@dataclass(frozen=True)
class _Entry:
    module: str
    paper: str
    summary: str
    gradients: bool = False
    comparable: bool = False
    centred: bool = False


# Listed here with what `bolaco methods` prints; the code is imported when a method is used.
METHODS: dict[str, _Entry] = {
    "afm": _Entry(
        "bolaco.factorize.afm",
        "arXiv 2405.10616",
        "feature PCA: pooled output covariance, with bias (Bolaco, AFM, LoRD)",
        centred=True,
    ),
    "kfac": _Entry(
        "bolaco.factorize.kfac",
        "arXiv 2505.17974",
        "two-sided: feature PCA weighted by the Kronecker-factored Fisher of the output, with bias",
        gradients=True,
        comparable=True,
        centred=True,
    ),
    "svd-llm": _Entry(
        "bolaco.factorize.svd_llm", "arXiv 2403.07378", "second moment of the input, no bias (SVD-LLM, DRONE)"
    ),
    "svd": _Entry("bolaco.factorize.svd", "Eckart-Young 1936", "plain truncated SVD of the weight"),
}


def get_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        RecipeError: unknown; says which was probably meant.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(METHODS)}"
        raise RecipeError(f"factorization.method: unknown method {name!r}{hint}")
    entry = METHODS[name]
    module = importlib.import_module(entry.module)
    flags = (entry.gradients, entry.comparable, entry.centred)
    return Method(name, entry.paper, entry.summary, module.metric, module.prepare, *flags)
