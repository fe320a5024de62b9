"""What to try next: a Gaussian process over keep ratios, expected improvement, the budget as a linear constraint.

BoTorch proposes (arXiv 2405.10616, sections 3.2 and 4.2). Every proposal depends only on the seed and on the trials
finished so far, so a search that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.exceptions import BadInitialCandidatesWarning, InputDataWarning, OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.optim import optimize_acqf
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from bolaco.allocate.space import SearchSpace

_RAW_SAMPLES, _RESTARTS, _STEPS = 256, 8, 60
# Objectives are capped at this multiple of the best one before the surrogate sees them: how bad a useless allocation
# is says nothing about where the good ones lie, and a perplexity of 1e30 would flatten everything else.
_CAP = 100.0
# Length scales of the paper's surrogate, for attention and feed-forward ratios.
_ATTENTION_SCALE, _FFN_SCALE = 1.0, 0.8

Constraint = tuple[Tensor, Tensor, float]


class Proposer:
    """Proposes keep ratios.

    Args:
        space: the search space; its budget is the constraint.
        slack: proposals may use this share of all linears less than the budget.
        surrogate: ``fitted`` (log objective, length scales learnt from the trials) or ``paper`` (raw objective, fixed
            length scales).
        seed: seed of the run.
    """

    def __init__(self, space: SearchSpace, slack: float, surrogate: str, seed: int) -> None:
        self.space, self.surrogate, self.seed = space, surrogate, seed
        sizes = torch.tensor([d.size for d in space.dimensions], dtype=torch.float64) / space.budget.total
        index = torch.arange(len(sizes))
        available = (space.budget.limit - space.fixed) / space.budget.total
        lower = [d.levels[0].keep for d in space.dimensions]
        # A little under the lowest level where rounding put it above the nominal bound, so that the polytope is never
        # empty.
        low = torch.tensor([min(space.min_keep, x) for x in lower], dtype=torch.float64)
        self.bounds = torch.stack([low, torch.ones_like(low)])
        self.constraints: list[Constraint] = [(index, -sizes, -available)]
        # A budget beyond "everything dense" needs no lower plane.
        most, least = min(available, float(sizes.sum())), float(sizes @ low)
        floor = most - max(slack, 1e-4)
        if floor > least:
            self.constraints.append((index, sizes, floor))
        self._sizes, self._spend = sizes, (max(floor, least), most)

    def random(self, count: int, stream: int = 0) -> list[list[float]]:
        """``count`` independent points spread over the constrained box; other ``stream`` numbers give other points.

        Each is a uniform point of the box, its coordinates pulled up or down together until it spends what it should:
        the coordinates' densities become exponential, which is what those of a uniform point of the budget's plane are
        in many dimensions. (A Markov chain hardly moves between two planes this close in 20 dimensions.)
        """
        generator = torch.Generator().manual_seed(_mix(self.seed, stream))
        start = torch.rand(count, len(self._sizes), generator=generator, dtype=torch.float64)
        low, most = self._spend
        target = low + (most - low) * torch.rand(count, 1, generator=generator, dtype=torch.float64)
        width = self.bounds[1] - self.bounds[0]
        weight = self._sizes * width / (self._sizes * width).mean()
        pull = torch.zeros_like(target)
        reach = 1e6
        # Bisection: the spending rises with the pull.
        for _ in range(60):
            points = self.bounds[0] + width * _pulled(start, pull * weight)
            spent = (points * self._sizes).sum(dim=1, keepdim=True)
            pull = pull + torch.where(spent < target, reach, -reach)
            reach /= 2
        return points.tolist()

    def suggest(self, keeps: Sequence[Sequence[float]], objectives: Sequence[float]) -> list[float]:
        """The ratios to try after these trials (their realised ratios and objectives).

        A suggestion that would settle on levels tried already is passed over for the next best start of the
        optimiser, and for random points after that.
        """
        tried = {self.space.settle(k) for k in keeps}
        for candidate in self._optimise(keeps, objectives):
            if self.space.settle(candidate) not in tried:
                return candidate
        fallback = self.random(64, stream=1000 + len(keeps))
        return next((c for c in fallback if self.space.settle(c) not in tried), fallback[0])

    def _optimise(self, keeps: Sequence[Sequence[float]], objectives: Sequence[float]) -> list[list[float]]:
        x = torch.tensor(keeps, dtype=torch.float64)
        y = torch.tensor(objectives, dtype=torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf)
        # In units of the best; where that is infinite too, all are equally useless.
        y = (y / y.min()).nan_to_num(nan=_CAP, posinf=_CAP).clamp(max=_CAP)
        y = y.log() if self.surrogate == "fitted" else y
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(_mix(self.seed, len(keeps)))
        try:
            with warnings.catch_warnings():
                for kind in (
                    InputDataWarning,
                    OptimizationWarning,
                    BadInitialCandidatesWarning,
                    NumericalWarning,
                ):
                    warnings.simplefilter("ignore", kind)
                model = self._surrogate(x, -y[:, None])
                acquisition = LogExpectedImprovement(model, best_f=-y.min())
                starts = self._starts(acquisition, x[y.argmin()], len(keeps))
                candidates, values = optimize_acqf(
                    acquisition,
                    bounds=self.bounds,
                    q=1,
                    num_restarts=len(starts),
                    batch_initial_conditions=starts,
                    inequality_constraints=self.constraints,
                    return_best_only=False,
                    options={"maxiter": _STEPS},
                )
        finally:
            torch.random.set_rng_state(generator_state)
        assert values is not None
        order = values.flatten().argsort(descending=True)
        return candidates[order].flatten(1).tolist()

    def _starts(self, acquisition: LogExpectedImprovement, best: Tensor, trial: int) -> Tensor:
        """The most promising of many feasible points: some spread over the polytope, some near the best trial."""
        points = torch.tensor(self.random(_RAW_SAMPLES, stream=trial), dtype=torch.float64)
        # Feasible points mixed with a feasible point stay feasible: the polytope is convex.
        share = torch.rand(len(points) // 2, 1, dtype=torch.float64) ** 2
        points[: len(points) // 2] = share * points[: len(points) // 2] + (1 - share) * self._inside(best, points)
        with torch.no_grad():
            values = acquisition(points[:, None])
        return points[values.topk(_RESTARTS).indices][:, None]

    def _inside(self, best: Tensor, points: Tensor) -> Tensor:
        """``best``, or where it violates a constraint by rounding, the sample closest to it."""
        feasible = all(float(coefficients @ best) >= bound for _, coefficients, bound in self.constraints)
        feasible = feasible and bool((best >= self.bounds[0]).all())
        return best if feasible else points[(points - best).norm(dim=1).argmin()]

    def _surrogate(self, x: Tensor, y: Tensor) -> SingleTaskGP:
        dimensions = x.shape[-1]
        if self.surrogate == "paper":
            kernel = MaternKernel(nu=2.5, ard_num_dims=dimensions)
            scales = [
                _ATTENTION_SCALE if d.name.split("/")[0] in ("qk", "v", "o") else _FFN_SCALE
                for d in self.space.dimensions
            ]
            kernel.lengthscale = torch.tensor(scales, dtype=torch.float64)
            kernel.raw_lengthscale.requires_grad_(False)
            model = SingleTaskGP(
                x,
                y,
                likelihood=GaussianLikelihood(),
                covar_module=ScaleKernel(kernel),
                outcome_transform=Standardize(1),
            )
        else:
            model = SingleTaskGP(
                x,
                y,
                input_transform=Normalize(dimensions, bounds=self.bounds),
                outcome_transform=Standardize(1),
            )
        if len(x) > 1:
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model


def _pulled(uniform: Tensor, rate: Tensor) -> Tensor:
    """Quantiles of the density proportional to exp(rate t) on [0, 1]."""
    up = rate > 0
    rate = -rate.abs().clamp(min=1e-9)
    downward = torch.log1p(torch.where(up, 1 - uniform, uniform) * torch.expm1(rate)) / rate
    return torch.where(up, 1 - downward, downward).clamp(0, 1)


def _mix(seed: int, stream: int) -> int:
    return (seed * 1_000_003 + stream) % 2**31
