"""The processes of one run, which torchrun starts: its *ranks*.

All ranks go through the same story and meet in the functions of this file, in the same order. The first one decides and
writes; each computes its share; what they found is added up, or handed to the first. torch.distributed carries it: gloo
between processors, NCCL between GPUs. Without torchrun, and outside :func:`together`, there is one rank and every
function does its work at once, so nobody has to ask which it is.

What goes over the wire beside tensors is JSON. What fails on one rank fails on all, with the same error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bolaco import errors
from bolaco.errors import BolacoError, RankError
from bolaco.parallel.launch import launched, launched_as

V = TypeVar("V")
A = TypeVar("A")

# Seconds that a rank waits for another before it gives up. Stages that only the first one does may take hours; that a
# process has died is noticed at once.
_WAIT_VARIABLE, _WAIT = "BOLACO_RANK_TIMEOUT", 4 * 3600.0


@dataclass(frozen=True)
class _Team:
    rank: int = 0
    count: int = 1


_ALONE = _Team()
_team = _ALONE
# What all ranks have failed with, so that it is printed once.
_shared: list[BaseException] = []


def count() -> int:
    """How many ranks work together here; 1 alone."""
    return _team.count


def rank() -> int:
    """Which of them this is, from 0."""
    return _team.rank


def is_first() -> bool:
    """Whether this is the one that decides and writes."""
    return _team.rank == 0


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """While it lasts, the processes that torchrun has started are ranks of one run.

    Raises:
        RankError: they cannot reach one another.
    """
    global _team
    if launched() == 1 or _team.count > 1:
        yield
        return
    _join(device)
    before, _team = _team, _Team(dist.get_rank(), dist.get_world_size())
    try:
        yield
    finally:
        _team = before


@contextmanager
def apart() -> Iterator[None]:
    """While it lasts this rank is alone: what it does is no concern of the others. It stays the one that it is."""
    global _team
    before, _team = _team, _Team(_team.rank, 1)
    try:
        yield
    finally:
        _team = before


def _join(device: torch.device) -> None:
    # It is not left again: a second group of the same processes would find the addresses of the first.
    if dist.is_initialized():
        return
    wait = timedelta(seconds=float(os.environ.get(_WAIT_VARIABLE, _WAIT)))
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=wait)
    except (RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise RankError(f"rank {launched_as()}: the processes of torchrun cannot reach one another ({why})") from error


@contextmanager
def _wire() -> Iterator[None]:
    """Around everything that waits for other ranks.

    Raises:
        RankError: one of them is not there any more.
    """
    try:
        yield
    except RuntimeError as error:
        why = " ".join(str(error).split())[:160]
        raise RankError(
            f"rank {_team.rank}: another process of this run has ended or does not answer, and its own message says "
            f"why; the same command continues where this one was ({why})"
        ) from error


def _broadcast(value: Any) -> Any:
    """A JSON value of the first rank, on all."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if is_first() else None
    size = torch.tensor([0 if data is None else len(data)])
    with _wire():
        dist.broadcast(size, 0)
        data = torch.empty(int(size), dtype=torch.uint8) if data is None else data
        dist.broadcast(data, 0)
    return json.loads(data.numpy().tobytes())


def gather(value: Any) -> list[Any]:
    """The JSON values of all ranks, on all, in their order."""
    if _team.count == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_team.count)]
    with _wire():
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(int(size) for size in sizes)
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, torch.cat([data, data.new_zeros(longest - len(data))]))
    return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


def barrier() -> None:
    """Waits until all ranks are here."""
    gather(None)


def first(work: Callable[[], V]) -> V:
    """What the first rank's ``work`` gives, on all ranks; the others wait. It must be something that JSON can hold.

    Raises:
        BolacoError: whatever the first rank has failed with.
    """
    if _team.count == 1:
        return work()
    if not is_first():
        value: V = _taken(_broadcast(None), 0)
        return value
    try:
        with apart():
            found = work()
        message = json.loads(json.dumps({"value": found}))
    except Exception as error:
        _shared.append(error)
        _broadcast({"failed": _described(error)})
        raise
    _broadcast(message)
    return found


def agreed(value: V) -> V:
    """The first rank's value, on all ranks."""
    return first(lambda: value)


def each(work: Callable[[], V]) -> V:
    """This rank's own ``work``, in which it meets no other; if it fails on one rank, it fails on all.

    Raises:
        BolacoError: what the first of the ranks that failed has failed with.
    """
    if _team.count == 1:
        return work()
    error: Exception | None = None
    try:
        with apart():
            value = work()
    except Exception as failure:  # noqa: BLE001 - it is raised below, on all ranks
        error = failure
    outcomes = gather(None if error is None else _described(error))
    for number, failed in enumerate(outcomes):
        if failed is not None:
            raised = error if number == _team.rank and error is not None else _rebuilt(failed, number)
            _shared.append(raised)
            raise raised
    return value


def lead(work: Callable[[Callable[[A], V]], Any], follow: Callable[[A], V]) -> Any:
    """The first rank's ``work``, which calls all ranks to :func:`follow` it; what it gives, on all ranks.

    Args:
        work: is given what it calls ``follow`` by; argument and what it gives are JSON.
        follow: done by all ranks, which meet in it.

    Raises:
        BolacoError: whatever one of them has failed with.
    """
    if _team.count == 1:
        return work(follow)
    if not is_first():
        while True:
            message = _broadcast(None)
            if "follow" not in message:
                return _taken(message, 0)
            follow(message["follow"])

    def call(argument: A) -> V:
        _broadcast({"follow": argument})
        return follow(argument)

    try:
        found = json.loads(json.dumps({"value": work(call)}))
    except Exception as error:
        if not failed_on_all(error):  # else they know, and are gone
            _shared.append(error)
            _broadcast({"failed": _described(error)})
        raise
    _broadcast(found)
    return found["value"]


@contextmanager
def held(make: Callable[[], AbstractContextManager[str]]) -> Iterator[str]:
    """A context that only the first rank opens and closes; its value, a text, on all ranks."""
    if _team.count == 1:
        with make() as value:
            yield value
        return
    stack = ExitStack()
    value = first(lambda: stack.enter_context(make()))
    with stack:  # where the block fails on this rank, it is left as it is left alone
        yield value
        barrier()
        first(stack.close)


def failed_on_all(error: BaseException) -> bool:
    """Whether all ranks have failed with this, so that one of them can say it for all."""
    return any(known is error for known in _shared)


def _described(error: Exception) -> list[str]:
    return [type(error).__name__, str(error)]


def _taken(message: Mapping[str, Any], number: int) -> Any:
    """The value in a message of another rank, or its failure raised here."""
    if "failed" not in message:
        return message["value"]
    raised = _rebuilt(message["failed"], number)
    _shared.append(raised)
    raise raised


def _rebuilt(failed: list[str], number: int) -> BolacoError:
    """The error of another rank."""
    name, message = failed
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, BolacoError):
        return kind(message)
    return RankError(f"rank {number} has failed: {name}: {' '.join(message.split())}")


def share(total: int) -> slice:
    """This rank's part of so many things in a row, which all ranks have parts of that differ by one at most."""
    return shares(total)[_team.rank if _team.count > 1 else 0]


def enough(total: int, what: str) -> None:
    """Stops all ranks if there are fewer things than ranks.

    Raises:
        RankError: ``what`` there is too little of.
    """
    if total < _team.count:
        error = RankError(f"{_team.count} processes, but {total} {what} to share; start {total} at most")
        _shared.append(error)
        raise error


def batches(total: int, batch: int) -> list[slice]:
    """The parts of all ranks of so many sequences, in whole batches: those are then the ones of one process."""
    return [slice(p.start * batch, min(p.stop * batch, total)) for p in shares(-(-total // batch))]


def share_of_batches(total: int, batch: int, what: str) -> slice:
    """This rank's of :func:`batches`.

    Raises:
        RankError: there are fewer batches of ``what`` than ranks.
    """
    enough(-(-total // batch), f"batches of {what}")
    return batches(total, batch)[_team.rank if _team.count > 1 else 0]


def shares(total: int) -> list[slice]:
    """The parts of all ranks."""
    bounds = [total * number // _team.count for number in range(_team.count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def all_reduce(tensors: Mapping[str, Tensor]) -> None:
    """Adds up each tensor over all ranks, in place; they have the same names and shapes everywhere."""
    if _team.count == 1:
        return
    with _wire():
        for name in sorted(tensors):
            dist.all_reduce(tensors[name])


def complete(rows: Tensor, parts: Sequence[slice] | None = None) -> None:
    """Gives every rank all rows ``[n, ...]`` of a tensor on the CPU, of which each has computed a part.

    ``parts`` are those of all ranks; by default their :func:`share`.
    """
    if _team.count == 1:
        return
    with _wire():
        for number, part in enumerate(shares(len(rows)) if parts is None else parts):
            if part.stop > part.start:
                # As bytes: not every number format goes over every wire.
                dist.broadcast(rows[part].view(torch.uint8) if rows.ndim else rows, number)


def collected(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the first rank, the tensors of all ranks by name, on the CPU; on the others their own."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    listed = gather([[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in own.items()])
    for number in range(1, _team.count):
        for name, dtype, shape in listed[number]:
            if is_first():
                own[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            elif number != _team.rank:
                continue
            if own[name].numel():
                flat = own[name].view(-1).view(torch.uint8)
                with _wire():
                    dist.recv(flat, number) if is_first() else dist.send(flat, 0)
    return own


def own_file(path: Path) -> Path:
    """A name of this rank's own for a file that the first one has under this name."""
    return path if is_first() else path.with_name(f"{path.stem}-rank-{_team.rank}{path.suffix}")
