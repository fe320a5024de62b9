"""What tests/test_ranks.py has torchrun start: functions of several processes against their definitions, and commands.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.ranks_script check
    python -m torch.distributed.run --nproc-per-node 2 -m tests.ranks_script commands FILE [KILLED]

FILE has a JSON list of command lines, done one after the other. With KILLED, a layer, rank 1 ends at once, without a
word, when it is to factor matrices of that layer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from bolaco.errors import DataError, NonFiniteError, RankError
from bolaco.models.find import inspect_structure
from bolaco.models.structure import Structure
from bolaco.parallel import team
from bolaco.parallel.launch import launched, launched_as
from bolaco.statistics.backward import BlockGradientWalk
from bolaco.statistics.fisher import FISHER
from bolaco.statistics.gradient import GRADIENT, _OutputMoment
from bolaco.statistics.magnitude import Magnitudes
from bolaco.statistics.moments import PooledMoments
from tests.models import tiny_llama
from tests.types import tokens_for


def check() -> None:
    """Every function of bolaco.parallel.team, and what accumulators add up to."""
    assert team.count() == 1
    with team.together(torch.device("cpu")):
        assert (team.count(), team.rank()) == (launched(), launched_as())
        _values()
        _failures()
        _tensors()
        _statistics()
        with team.apart():
            assert team.count() == 1
            assert team.is_first() == (launched_as() == 0)
            assert team.share(5) == slice(0, 5)
            assert team.first(launched_as) == launched_as()
    assert team.count() == 1
    print(f"rank {launched_as()} is content")


def _values() -> None:
    me, all_ = team.rank(), team.count()
    assert team.gather({"rank": me}) == [{"rank": n} for n in range(all_)]
    assert team.first(lambda: [me, None, float("inf")]) == [0, None, float("inf")]
    assert team.agreed(me + 10) == 10
    assert team.each(lambda: me) == me
    seen: list[int] = []

    def follow(value: int) -> int:
        seen.append(value)
        return sum(team.gather(value * (team.rank() + 1)))

    total = sum(range(1, all_ + 1))
    assert team.lead(lambda call: [call(3), call(5)], follow) == [3 * total, 5 * total]
    assert seen == [3, 5]
    parts = team.shares(7)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(7))
    assert team.share(7) == parts[me]
    with pytest.raises(RankError, match="2 processes, but 1 batches of text to share; start 1 at most"):
        team.share_of_batches(3, 4, "text")
    assert team.share_of_batches(7, 2, "text") == [slice(0, 4), slice(4, 7)][me]


def _failures() -> None:
    """What fails on one rank fails on all, as what it is."""

    def fail() -> None:
        if team.rank() == 1:
            raise NonFiniteError("block 3: not a number")

    with pytest.raises(NonFiniteError, match="block 3") as error:
        team.each(fail)
    assert team.failed_on_all(error.value)

    def refuse() -> None:
        raise DataError("no text")

    with pytest.raises(DataError, match="no text"):
        team.first(refuse)

    def lead(call: object) -> None:
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        team.lead(lead, lambda value: value)

    def odd() -> None:
        if team.rank() == 1:
            raise KeyError("what is this")

    with pytest.raises(RankError if team.rank() != 1 else KeyError, match="what is this"):
        team.each(odd)


def _tensors() -> None:
    me, all_ = team.rank(), team.count()
    numbers = torch.full((3,), float(me + 1), dtype=torch.float64)
    team.all_reduce({"numbers": numbers})
    assert torch.equal(numbers, torch.full((3,), float(sum(range(1, all_ + 1))), dtype=torch.float64))
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        rows = torch.zeros(5, 2, dtype=dtype)
        own = team.share(5)
        rows[own] = me + 1
        team.complete(rows)
        for number, part in enumerate(team.shares(5)):
            assert (rows[part] == number + 1).all()
    found = team.collected({f"of {me}": torch.full((me, 2), me, dtype=torch.bfloat16), f"{me}": torch.tensor(me)})
    names = {f"of {n}" for n in range(all_)} | {f"{n}" for n in range(all_)}
    assert found.keys() == (names if me == 0 else {f"of {me}", f"{me}"})
    assert all(value.numel() == 0 or (value == int(name[-1])).all() for name, value in found.items())


def _statistics() -> None:
    """Of vectors that ranks share: as of all of them; also where a rank has seen none."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=draw, dtype=torch.float64) * torch.logspace(0, 2, 6) + 50
    for parts in (team.shares(40), [slice(0, 40), slice(0, 0)], [slice(0, 0), slice(0, 40)]):
        whole, own = PooledMoments(6, 2), PooledMoments(6, 2)
        for group, rows in enumerate((slice(0, 25), slice(25, 40))):
            whole.update(x[rows], group)
            mine = parts[team.rank()]
            own.update(x[max(rows.start, mine.start) : max(rows.start, min(rows.stop, mine.stop))], group)
        own.reduce()
        one, other = whole.finalize(), own.finalize()
        torch.testing.assert_close(other.covariance, one.covariance)
        torch.testing.assert_close(other.mean, one.mean)
        torch.testing.assert_close(other.group_means, one.group_means)
        assert torch.equal(other.group_counts, one.group_counts)
    part = team.shares(40)[team.rank()]
    sizes, gathered = Magnitudes(6), Magnitudes(6)
    sizes.update(x)
    gathered.update(x[part])
    gathered.reduce()
    torch.testing.assert_close(gathered.finalize(), sizes.finalize())
    # Gradients are scaled by what each rank sees first.
    gradients = (x - 50) * 1e-20
    gradients[20:] *= 1000
    one_, other_ = _OutputMoment(6, torch.device("cpu")), _OutputMoment(6, torch.device("cpu"))
    one_.update(x, gradients)
    other_.update(x[part], gradients[part])
    other_.reduce()
    torch.testing.assert_close(other_.result() * 1e36, one_.result() * 1e36)
    nothing = _OutputMoment(6, torch.device("cpu"))
    nothing.reduce()
    assert torch.equal(nothing.result(), torch.eye(6, dtype=torch.float64))
    model = tiny_llama()
    _walk(model, inspect_structure(model))
    site = inspect_structure(model).sites[0]
    inputs = torch.randn(4, 3, site.in_features, generator=draw)
    outputs = torch.randn(4, 3, site.out_features, generator=draw)
    all_of, mine_of = FISHER.accumulator(site, torch.device("cpu")), FISHER.accumulator(site, torch.device("cpu"))
    all_of.update(inputs, outputs)
    rows = team.share(4)
    mine_of.update(inputs[rows], outputs[rows])
    mine_of.reduce()
    torch.testing.assert_close(mine_of.result(), all_of.result())


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for rounding, which is as large as that of the largest number."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def _walk(model: PreTrainedModel, structure: Structure) -> None:
    """Loss gradients of all ranks are those of one, and one goes on where they have stopped."""
    tokens = tokens_for(model, 7, 12)

    def walk() -> BlockGradientWalk:
        return BlockGradientWalk(model, structure, tokens, 2, GRADIENT, seed=4)

    with team.apart():
        one = walk()
        found = []
        for layer, values in one.run():
            found.append((layer, values, one.gradient.clone()))
    together = walk()
    layer, values = next(together.run())
    gradient = together.whole_gradient()
    assert layer == found[0][0]
    torch.testing.assert_close(gradient, found[0][2], rtol=1e-4, atol=1e-7)
    for name, value in values.items():
        _close(value, found[0][1][name])
    with team.apart():
        rest = list(walk().run(earlier=(layer, gradient)))
    for (layer, values, _), (same, others) in zip(found[1:], rest, strict=True):
        assert layer == same
        for name, value in values.items():
            _close(others[name], value)
    rest = list(walk().run(earlier=(found[0][0], found[0][2])))
    assert [layer for layer, _ in rest] == [layer for layer, _, _ in found[1:]]
    for name, value in rest[0][1].items():
        _close(value, found[1][1][name])


def commands(file: Path, killed: int | None) -> None:
    """Command lines, one after the other; ends with the status of the first that fails."""
    from bolaco.cli import main
    from bolaco.factorize import run

    if killed is not None and launched_as() == 1:
        made = run._of_sites

        def end(layer: int, *rest: object) -> object:
            if layer == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            return made(layer, *rest)  # type: ignore[arg-type]

        run._of_sites = end  # type: ignore[assignment]
    for words in json.loads(file.read_text()):
        code = main(words)
        if code:
            sys.exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "check":
        check()
    else:
        commands(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
