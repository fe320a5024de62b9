"""How long a run will take on this machine, and how much memory and disk, from shapes and a second of measuring.

What takes long are products of matrices, passes over numbers, and eigenproblems. Their speed is measured on this
machine at the model's shapes (:class:`Machine`); how many of each the stages do is counted here. The counts are those
of the code, rounded to what matters, so a forecast is good to about a third (benchmarks/forecast.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import psutil
import torch

from bolaco.allocate.allocator import AllocationTask
from bolaco.data.texts import Texts
from bolaco.evaluation.objective import SLAB
from bolaco.models.structure import Site, Structure, hidden_size, vocabulary
from bolaco.recipe.recipe import LowRankRecipe
from bolaco.refine.settings import Refinement
from bolaco.refine.train import fast_bfloat16, look_steps
from bolaco.runs.factors import top_ranks
from bolaco.runs.size import Shapes
from bolaco.storage.budget import Ranks
from bolaco.storage.storage import TWO_FACTORS

# Rows of a product and numbers of a pass that are timed, at most; an eigenproblem's size.
_ROWS, _WORK, _NUMBERS, _EIGEN = 512, 4e9, 2**22, 640
# Passes over hidden states, and over what matrices give, in a block: norms, residuals, rotations, activations, copies.
_HIDDEN_PASSES, _OUTPUT_PASSES = 100.0, 12.0
# Passes over logits: their softmax and what is computed from it.
_LOGIT_PASSES = 4.0
# Products of a block's backward pass by those of its forward pass: to the inputs alone, and to weights too.
_TO_INPUTS, _TO_ALL = 1.0, 2.2
# Bytes a second from and to a disk, with their checksums.
_DISK = 3e8
# Forward passes of a batch by which is found out what a model is.
_LOOKED = 6
# Products of tokens and parameters from which on a run is long.
_LONG = 5e11
# Bytes that training takes of a parameter: itself in float32, its gradient, two moments, the best so far; and passes.
_TRAINED, _STEP_PASSES = 20, 20.0


class Speed(Protocol):
    """Seconds that a machine takes."""

    def product(self, rows: float, inner: int, outer: int, dtype: torch.dtype) -> float:
        """Of ``[rows, inner] @ [inner, outer]``."""

    def passes(self, numbers: float) -> float:
        """Of reading so many numbers, computing with each, and writing them."""

    def eigen(self, size: int) -> float:
        """Of all eigenvectors of a symmetric float64 matrix."""


class Machine:
    """A device as it is now, measured when something is first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._products: dict[tuple[int, int, torch.dtype], float] = {}

    def product(self, rows: float, inner: int, outer: int, dtype: torch.dtype) -> float:
        """See :class:`Speed`."""
        key = inner, outer, dtype
        if key not in self._products:
            count = int(max(16, min(_ROWS, _WORK / (2 * inner * outer))))
            x = torch.ones(count, inner, dtype=dtype, device=self.device)
            weight = torch.ones(outer, inner, dtype=dtype, device=self.device)
            self._products[key] = self._seconds(lambda: x @ weight.T) / count
        return rows * self._products[key]

    def passes(self, numbers: float) -> float:
        """See :class:`Speed`."""
        return numbers * self._pass

    @cached_property
    def _pass(self) -> float:
        x = torch.ones(_NUMBERS, device=self.device)
        return self._seconds(lambda: x * x) / _NUMBERS

    def eigen(self, size: int) -> float:
        """See :class:`Speed`."""
        return self._eigen * (size / _EIGEN) ** 3

    @cached_property
    def _eigen(self) -> float:
        half = torch.randn(_EIGEN, _EIGEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        matrix = (half @ half.T).to(self.device)
        return self._seconds(lambda: torch.linalg.eigh(matrix), rounds=1)

    def _seconds(self, call: Callable[[], object], rounds: int = 2) -> float:
        """The least of some rounds after one that is not counted."""
        found = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            found.append(time.perf_counter() - start)
        return min(found[1:])


@dataclass(frozen=True)
class Forecast:
    """What a run is thought to take.

    Attributes:
        seconds: of each stage.
        memory: bytes of this process at most, in files that are mapped too.
        disk: bytes of the work folder at most, the result not among them.
    """

    seconds: Mapping[str, float]
    memory: int
    disk: int

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    @property
    def line(self) -> str:
        """All of it in one line."""
        longest = sorted(self.seconds.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in longest if seconds >= 60)
        time_ = f"about {duration(self.total)} on this machine" + (f" ({parts})" if parts else "")
        return f"{time_}, {_gib(self.memory)} of memory, {_gib(self.disk)} in the work folder"


def duration(seconds: float) -> str:
    """Such as ``40 minutes``."""
    if seconds < 60:
        return "a minute"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


@dataclass(frozen=True)
class Amounts:
    """Tokens that a run reads: sequences and their length, by what they are for."""

    calibration: tuple[int, int]
    evaluation: tuple[int, int]
    validation: tuple[int, int] = (0, 0)


def amounts_of(recipe: LowRankRecipe, texts: Texts) -> Amounts:
    """What a run reads; of texts that were not read, as much as the recipe says."""
    calibration, (windows, length) = recipe.calibration, texts.evaluation.shape
    validation = (recipe.validation.sequences, recipe.validation.seq_len or calibration.seq_len)
    return Amounts(
        (calibration.sequences if recipe.calibrates else 0, calibration.seq_len),
        (windows or recipe.evaluation.windows or 0, length),
        validation if recipe.searches else (0, 0),
    )


def takes_long(shapes: Shapes, amounts: Amounts) -> bool:
    """Whether it is worth a few seconds to say how long a run takes."""
    sequences, length = amounts.calibration
    return sequences * length * shapes.linears > _LONG


def forecast(
    recipe: LowRankRecipe,
    shapes: Shapes,
    task: AllocationTask,
    ranks: Ranks,
    amounts: Amounts,
    speed: Speed,
    streamed: bool,
) -> Forecast:
    """What a run will take.

    Args:
        recipe: settled on a keep ratio.
        shapes: of the model.
        task: what an allocator gets to know.
        ranks: an allocation like that of the run.
        amounts: tokens that are read.
        speed: of the machine.
        streamed: weights are in memory for their block's turn only.
    """
    top = top_ranks(recipe, task.structure.units)
    return Forecaster(recipe, shapes, task.structure, ranks, top, amounts, speed, streamed).forecast()


class Forecaster:
    """Counts what one run does.

    Args:
        recipe: settled on a keep ratio.
        shapes: of the model.
        structure: the units that are factored.
        ranks: an allocation like that of the run.
        top: largest rank of each unit that is factored, by name.
        amounts: tokens.
        speed: of the machine.
        streamed: weights are in memory for their block's turn only.
    """

    def __init__(
        self,
        recipe: LowRankRecipe,
        shapes: Shapes,
        structure: Structure,
        ranks: Ranks,
        top: Mapping[str, int],
        amounts: Amounts,
        speed: Speed,
        streamed: bool = False,
    ) -> None:
        self.recipe, self.shapes, self.structure, self.ranks, self.top = recipe, shapes, structure, ranks, top
        self.amounts, self.speed, self.streamed = amounts, speed, streamed
        self.dtype = shapes.model.dtype
        self.width, self.words = hidden_size(shapes.model), vocabulary(shapes.model)
        self.layers = structure.num_layers
        sequences, length = amounts.calibration
        self.tokens = sequences * length
        self.gradient_tokens = min(sequences, recipe.calibration.gradient_sequences) * length

    def forecast(self) -> Forecast:
        """Seconds, memory and disk of the run."""
        seconds = {
            "load": self._weights / _DISK + self._looking(),
            "factorize": self._gradients() + self._moments() + self._factors(),
            "dense evaluation": self._evaluation(compressed=False),
            **({"search": self._search()} if self.recipe.searches else {}),
            **({"refine": self._refinement()} if self.recipe.refinement.active else {}),
            "write": self._packing() + 2 * self._result / _DISK,
            "evaluation": self._result / _DISK + self._evaluation(compressed=True),
        }
        return Forecast(seconds, self._memory(), self._disk())

    # --- what a pass over tokens takes, in seconds a token -------------------------------------------------------

    def _share(self, site: Site) -> float:
        """Of the tokens that reach a block, those that reach a matrix of it."""
        if site.members[0].expert is None:
            return 1.0
        if not self.structure.active:  # nobody has looked yet
            return self._sent
        return self.structure.active[site.layer]

    @cached_property
    def _sent(self) -> float:
        """Share of the experts that a token is sent to, by the configuration."""
        config = self.shapes.model.config.get_text_config(decoder=True)
        experts = len({member.expert for member in self._members() if member.expert is not None})
        return min(1.0, float(getattr(config, "num_experts_per_tok", None) or experts) / experts)

    def _members(self) -> Iterable[Site]:
        return (member for site in self.structure.sites for member in site.members)

    def _forward(self, length: int, dtype: torch.dtype, compressed: bool = False) -> float:
        """Of all blocks, on sequences of a length."""
        seconds = 0.0
        for site in self.structure.sites:
            rank, share = self.ranks.get(site.name) if compressed else None, self._share(site)
            if rank is None:
                seconds += share * self.speed.product(1, site.in_features, site.out_features, dtype)
            else:
                seconds += share * self.speed.product(1, site.in_features, rank, dtype)
                seconds += share * self.speed.product(1, rank, site.out_features, dtype)
            seconds += share * self.speed.passes(_OUTPUT_PASSES * site.out_features)
        # Scores and mixtures of a causal attention, of which half is computed.
        attention = self.speed.product(1, self.width, max(1, length), dtype)
        return seconds + self.layers * (attention + self.speed.passes(_HIDDEN_PASSES * self.width))

    def _head(self, dtype: torch.dtype) -> float:
        return self.speed.product(1, self.width, self.words, dtype) + self.speed.passes(_LOGIT_PASSES * self.words)

    # --- seconds of stages ---------------------------------------------------------------------------------------

    @property
    def _batch(self) -> int:
        """Sequences at a time."""
        return min(self.recipe.calibration.batch, self.amounts.calibration[0])

    def _looking(self) -> float:
        length = self.amounts.calibration[1]
        return _LOOKED * self._batch * length * self._forward(length, self.dtype)

    def _evaluation(self, compressed: bool) -> float:
        windows, length = self.amounts.evaluation
        return windows * length * (self._forward(length, self.dtype, compressed) + self._head(self.dtype))

    def _search(self) -> float:
        sequences, length = self.amounts.validation
        trials = int(self.recipe.allocator_options.model_dump().get("trials", 0))
        return (trials + 1) * sequences * length * (self._forward(length, self.dtype, True) + self._head(self.dtype))

    def _gradients(self) -> float:
        if not self.recipe.chosen.method.gradients:
            return 0.0
        length = self.amounts.calibration[1]
        forward = self._forward(length, self.dtype)
        blocks = forward * (1 + 1 + _TO_INPUTS)
        # Of the label, of what it was drawn from, and of the loss.
        head = 3 * self._head(self.dtype)
        outer = sum(
            self._share(site) * self.speed.product(1, site.out_features, site.out_features, torch.float32)
            for site in self._members()
            if site.name in self._factored
        )
        return self.gradient_tokens * (blocks + head + outer)

    @cached_property
    def _factored(self) -> set[str]:
        return {member.name for site in self.structure.sites if self.top.get(site.name, 0) for member in site.members}

    def _inputs(self) -> Iterable[Site]:
        """A matrix for each shared input."""
        return {(site.layer, site.input_group): site for site in self._members()}.values()

    def _moments(self) -> float:
        """The forward walk, and half of each input's outer products."""
        if not self.recipe.chosen.method.inputs:
            return 0.0
        outer = sum(
            0.6 * self._share(site) * self.speed.product(1, site.in_features, site.in_features, torch.float32)
            for site in self._inputs()
        )
        return self.tokens * (self._forward(self.amounts.calibration[1], self.dtype) + outer)

    def _factors(self) -> float:
        """Eigenproblems of the smaller sides, and the products around them."""
        seconds, roots = 0.0, {(site.layer, site.input_group) for site in self.structure.sites if _tall(site)}
        double = torch.float64
        for site in self.structure.sites:
            rank, out, inner = self.top.get(site.name, 0), site.out_features, site.in_features
            if not rank:
                continue
            small = min(out, inner)
            seconds += self.speed.eigen(small)
            if _tall(site):  # root, output metric twice, Gram matrix, QR decomposition, coefficients
                seconds += self.speed.product(out, inner, inner, double) * 2
                seconds += self.speed.product(2 * out, out, inner, double) + self.speed.product(
                    3 * out, inner, rank, double
                )
            else:
                seconds += self.speed.product(out, out, inner, double) + self.speed.product(out, inner, inner, double)
                seconds += self.speed.product(2 * out, inner, out, double)
        return seconds + len(roots) * 0.1 * self.speed.eigen(self.width)

    def _refinement(self) -> float:
        settings, (sequences, length) = self.recipe.refinement, self.amounts.calibration
        if self.structure.walk.hooks:
            return 0.0
        seen = min(sequences, settings.sequences or sequences)
        dtype = torch.bfloat16 if settings.autocast and fast_bfloat16(self._device) else torch.float32
        dense, after = self._forward(length, self.dtype), self._forward(length, self.dtype, True)
        trained, looked = self._forward(length, dtype, True), self._forward(length, dtype, True)
        total = seen * length * (dense + after)  # both models' hidden states
        total += 2 * self.dtype.itemsize * sum(map(self._pair, self.structure.sites)) / _DISK
        if settings.fit:
            total += 4 * seen * length * after
        held = min(settings.held_out, seen // 3)
        total += self._steps(settings, settings.steps, held, length, trained, looked)
        head = self._head(self.dtype)
        ends = (settings.end_steps if settings.on_logits else 0) + settings.scale_steps
        total += self._steps(settings, ends, held, length, trained + 1.3 * head, looked + head)
        return total

    def _steps(self, settings: Refinement, steps: int, held: int, length: int, trained: float, looked: float) -> float:
        looks = len(look_steps(steps)) + 1 if held and steps else 0
        trains = steps * self.speed.passes(_STEP_PASSES * sum(map(self._pair, self.structure.sites)))
        return trains + length * (steps * self._batch * trained * (1 + _TO_ALL) + looks * held * looked)

    def _packing(self) -> float:
        """A decomposition of each factored matrix that is stored in another form than it is trained in."""
        total = 0.0
        for site in self.structure.sites:
            rank = self.ranks.get(site.name)
            if rank and self.recipe.storage != TWO_FACTORS:
                total += self.speed.product(2 * rank, rank, max(site.out_features, site.in_features), torch.float64)
        return total

    # --- bytes ---------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.shapes.model.device.type == "meta" else self.shapes.model.device

    @cached_property
    def _weights(self) -> int:
        return self.shapes.bytes_in_memory

    @cached_property
    def _in_memory(self) -> int:
        """Of the original: all of it, or what is not in blocks and the largest block."""
        if not self.streamed:
            return self._weights
        item = self.dtype.itemsize
        blocks = [sum(s.size for s in self.structure.of_layer(i)) * item for i in range(self.layers)]
        return self._weights - sum(blocks) + max(blocks, default=0)

    @cached_property
    def _result(self) -> int:
        """Of the compressed weights."""
        storage = self.recipe.form
        linears = sum(storage.parameters(site, self.ranks.get(site.name)) for site in self.structure.sites)
        return self.shapes.bytes_at(linears)

    def _states(self, tokens: int, copies: float) -> int:
        """Hidden states that are held in memory."""
        size = int(copies * tokens * self.width * self.dtype.itemsize)
        cache = self.recipe.calibration.cache
        limit = 0.25 * psutil.virtual_memory().available if cache == "auto" else float("inf")
        return 0 if self.streamed or cache == "disk" or size > limit else size

    def _largest(self, size: Callable[[Site], float]) -> float:
        """The largest sum over the matrices of a block."""
        return max((sum(map(size, self.structure.of_layer(i))) for i in range(self.layers)), default=0.0)

    def _activations(self, dtype: torch.dtype) -> float:
        """What autograd keeps of a block on one batch."""
        tokens = self._batch * self.amounts.calibration[1]
        wide = self._largest(lambda site: self._share(site) * (site.in_features + site.out_features))
        return tokens * dtype.itemsize * (1.5 * wide + 8 * self.width)

    def _memory(self) -> int:
        logits = 4.0 * SLAB
        # Of a model that is loaded, what its weights take is counted below.
        here = 0 if self.shapes.model.device.type == "meta" else self._in_memory
        base = max(0, _resident() - here)
        stages = [self._weights_while_evaluated() + logits]
        method = self.recipe.chosen.method
        if method.gradients:
            stages.append(
                self._in_memory
                + self._states(self.gradient_tokens, self.layers + 2)
                + self._activations(self.dtype)
                + 12 * self._largest(lambda s: sum(m.out_features**2 for m in s.members))
                + logits
            )
        groups: dict[int, float] = {}
        for site in self._inputs():
            groups[site.layer] = groups.get(site.layer, 0.0) + 20.0 * site.in_features**2
        solver = max(
            (8.0 * (4 * s.size + 3 * max(s.out_features, s.in_features) ** 2) for s in self.structure.sites), default=0
        )
        factors = self._largest(
            lambda s: (
                self.dtype.itemsize * self.top.get(s.name, 0) * (s.out_features + s.in_features)
                + (8.0 * s.out_features**2 if method.gradients else 0.0)
            )
        )
        stages.append(
            self._in_memory + self._states(self.tokens, 1) + max(groups.values(), default=0.0) + solver + factors
        )
        if self.recipe.refinement.active:
            stages.extend(self._while_refined())
        if not self.streamed:
            stages.append(self._in_memory + 1.3 * self._result)
        return int(base + max(stages))

    def _weights_while_evaluated(self) -> float:
        return self._in_memory + (self._result / max(1, self.layers) if self.streamed else self._result)

    def _while_refined(self) -> Iterable[float]:
        settings = self.recipe.refinement
        seen = min(self.amounts.calibration[0], settings.sequences or self.amounts.calibration[0])
        states = self._states(seen * self.amounts.calibration[1], 3)
        trained = [sum(map(self._pair, self.structure.of_layer(i))) for i in range(self.layers)]
        yield self._in_memory + states + _TRAINED * max(trained, default=0) + self._activations(torch.float32)
        if settings.on_logits:
            count, ends = self._ends
            kept = min(count * self._activations(torch.float32), 0.25 * psutil.virtual_memory().available)
            yield self._in_memory + states + _TRAINED * ends + kept + 4.0 * SLAB

    @cached_property
    def _ends(self) -> tuple[int, int]:
        """Blocks that are trained on next tokens, and their parameters."""
        settings, count, ends = self.recipe.refinement, 0, 0
        for layer in reversed(range(self.layers)):
            size = sum(map(self._pair, self.structure.of_layer(layer)))
            if (count and ends + size > settings.logit_parameters) or count == settings.logits:
                break
            count, ends = count + 1, ends + size
        return count, ends

    def _pair(self, site: Site) -> int:
        """Parameters of a matrix while it is trained."""
        rank = self.ranks.get(site.name)
        return site.size if rank is None else rank * (site.out_features + site.in_features)

    def _disk(self) -> int:
        item = self.dtype.itemsize
        size = sum(self.top.get(s.name, 0) * (s.out_features + s.in_features) * item for s in self.structure.sites)
        for kind in self.recipe.chosen.method.stored:
            size += 4 * sum(kind.numbers(member) for member in self._members() if member.name in self._factored)
        if self.recipe.refinement.active:
            size += sum(map(self._pair, self.structure.sites)) * item
            if self.recipe.refinement.on_logits:
                # Once more, and the training as it is written down: parameters, moments, the best so far.
                size += self._ends[1] * (item + 16)
        return size


def _resident() -> int:
    """Bytes of memory that this process has."""
    return int(psutil.Process().memory_info().rss)


def _tall(site: Site) -> bool:
    return site.out_features > site.in_features
