"""Work given out by cost: who is done first gets the next largest piece."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Attributes:
        cost: in any unit.
        common: what it shares with others, which is done once by each worker that has one of them; None: nothing.
        common_cost: of that.
    """

    cost: float
    common: Hashable = None
    common_cost: float = 0.0


def spread(pieces: Sequence[Piece], workers: int) -> list[int]:
    """The worker of every piece: the largest first, each to whom it leaves done the earliest.

    The same pieces are given out in the same way everywhere.
    """
    loads = [0.0] * workers
    known: list[set[Hashable]] = [set() for _ in range(workers)]
    given = [0] * len(pieces)

    def after(worker: int, piece: Piece) -> float:
        new = piece.common is not None and piece.common not in known[worker]
        return loads[worker] + piece.cost + (piece.common_cost if new else 0.0)

    order = sorted(range(len(pieces)), key=lambda i: (-pieces[i].cost - pieces[i].common_cost, i))
    for index in order:
        piece = pieces[index]
        worker = min(range(workers), key=lambda w: (after(w, piece), w))
        loads[worker] = after(worker, piece)
        known[worker].add(piece.common)
        given[index] = worker
    return given
