"""What an eigenproblem costs, by solver and by how much of it is asked for, and what a whole factorization costs.

    python benchmarks/eigen.py
    python benchmarks/eigen.py --sizes 512,1024 --width 1024 --hidden 2816

Three tables. Roots: a metric's symmetric root and its inverse from eigenvectors, against a Cholesky factor, which is as
good a start. Solvers: the leading eigenvectors of ``L^T W C W^T L`` by LAPACK's drivers, in float32, in float32 with a
step of refinement in float64 (Ogita and Aishima 2018), and by randomized block iteration (Halko and others 2011); the
excess is the squared error lost over the least at that rank, the bound what is known of it without the exact solution.
Matrices: :func:`bolaco.factorize.solver.low_rank` under both metrics, against the same with roots from eigenvectors,
which is how it was before. Matrices are random with spectra that decay as those of language models do. Times are the
least of --rounds, in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import scipy.linalg
import torch
from torch import Tensor

from bolaco.factorize.solver import InputMetric, OutputMetric, low_rank
from bolaco.statistics.symmetric import lower_root
from common import print_table

Pairs = tuple[Tensor, Tensor]  # ascending eigenvalues [k] and eigenvectors [n, k]


def covariance(size: int, seed: int) -> Tensor:
    """A positive definite matrix ``[n, n]``, float64, whose eigenvalues fall over six decades, a few of them large."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -3, size, dtype=torch.float64)
    scale[:4] *= 10
    mixed = torch.randn(size, size, generator=draw, dtype=torch.float64) / size**0.5
    half = torch.randn(2 * size, size, generator=draw, dtype=torch.float64) * scale
    half = half @ mixed
    return half.T @ half / len(half)


def times(makers: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Least seconds of each, and what it made."""
    seconds: dict[str, float] = {}
    made: dict[str, Any] = {}
    for _ in range(rounds):
        for name, make in makers.items():
            start = time.perf_counter()
            made[name] = make()
            seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    return seconds, made


def symmetric_roots(matrix: Tensor) -> Pairs:
    """The symmetric root of a positive definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=1e-10 * float(values.mean())).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def driver(matrix: Tensor, name: str, count: int | None = None) -> Pairs:
    """By SciPy's LAPACK; the ``count`` largest, or all."""
    size = len(matrix)
    subset = None if count is None else [size - count, size - 1]
    values, vectors = scipy.linalg.eigh(matrix.numpy(), driver=name, subset_by_index=subset)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def single(matrix: Tensor) -> Pairs:
    values, vectors = torch.linalg.eigh(matrix.float())
    return values.double(), vectors.double()


def refined(matrix: Tensor) -> Pairs:
    """One step of refinement in float64 of what float32 gives."""
    _, vectors = single(matrix)
    defect = torch.eye(len(matrix), dtype=torch.float64) - vectors.T @ vectors
    turned = vectors.T @ matrix @ vectors
    values = turned.diagonal() / (1 - defect.diagonal())
    gaps = values[None, :] - values[:, None]
    # Values that float32 cannot tell apart are left mixed: only their span is made orthonormal.
    least = 2 * ((turned - values.diag()).norm() + values.abs().max() * defect.norm())
    change = torch.where(gaps.abs() > least, (turned + defect * values[None, :]) / gaps, defect / 2)
    change.diagonal().copy_(defect.diagonal() / 2)
    return values, vectors + vectors @ change


def randomized(matrix: Tensor, count: int, passes: int = 2, more: int = 32) -> Pairs:
    """The largest ``count``, from a random subspace that the matrix is applied to."""
    width = min(len(matrix), count + more)
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(len(matrix), width, generator=draw, dtype=torch.float64)
    for _ in range(passes):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, turned = torch.linalg.eigh(basis.T @ matrix @ basis)
    return values[-count:], basis @ turned[:, -count:]


def excess(matrix: Tensor, exact: Tensor, pairs: Pairs, rank: int) -> tuple[float, float, float]:
    """Squared error lost over the least, and a bound of it, as shares of the least; and how far from orthonormal.

    Off-diagonal blocks of the turned matrix have the residual's norm, so no sum of ``rank`` eigenvalues is further
    than ``sqrt(2 rank)`` times that from the sum of Ritz values (Hoffman and Wielandt), if these are the leading ones.
    """
    found = pairs[1][:, -rank:]
    off = float((found.T @ found - torch.eye(rank, dtype=torch.float64)).abs().max())
    leading = torch.linalg.qr(found).Q  # what is lost to a basis that is not orthonormal is no gain
    image = matrix @ leading
    inner = leading.T @ image
    least = float(exact[:-rank].sum())
    lost = float(matrix.trace() - inner.trace())
    bound = (2 * rank) ** 0.5 * float((image - leading @ inner).norm()) / least
    return lost / least - 1, bound, off


def solvers(size: int, rounds: int) -> list[list[object]]:
    """A row for each solver and rank."""
    matrix = covariance(size, 1)
    matrix = (matrix + matrix.T) / 2
    ranks = [size // 8, size // 4, size // 2]
    whole: dict[str, Callable[[], Pairs]] = {
        "syevd": lambda: tuple(torch.linalg.eigh(matrix)),
        "syevd, SciPy's": lambda: driver(matrix, "evd"),
        "syevr, SciPy's": lambda: driver(matrix, "evr"),
        "syevd float32": lambda: single(matrix),
        "syevd float32, refined": lambda: refined(matrix),
    }
    part: dict[str, Callable[[], Pairs]] = {}
    for rank in ranks:
        part[f"syevr, rank {rank}"] = lambda r=rank: driver(matrix, "evr", r)
        part[f"randomized, rank {rank}"] = lambda r=rank: randomized(matrix, r)
    seconds, made = times(whole | part, rounds)
    exact = made["syevd"][0]
    rows: list[list[object]] = []
    for name, pairs in made.items():
        for rank in ranks:
            if name in part and not name.endswith(f" {rank}"):
                continue
            over, bound, off = excess(matrix, exact, pairs, rank)
            rows.append(
                [
                    f"{name.split(',')[0] if name in part else name}",
                    f"{rank} of {size}",
                    f"{seconds[name]:.2f}",
                    f"{seconds[name] / seconds['syevd']:.2f}",
                    f"{over:.1e}",
                    f"{bound:.1e}",
                    f"{off:.0e}",
                ]
            )
    return rows


def by_eigenvectors(weight: Tensor, inputs: Tensor, outputs: Tensor, rank: int) -> Tensor:
    """The approximation ``[out, in]`` with every root from eigenvectors."""
    w = weight.double()
    if w.shape[0] > w.shape[1]:
        values, vectors = torch.linalg.eigh(inputs)
        tall = w @ (vectors * values.clamp(min=1e-10 * float(values.mean())).sqrt())
        _, right = torch.linalg.eigh(tall.T @ (outputs @ tall))
        basis = torch.linalg.qr(tall @ right.flip(1)[:, :rank]).Q
        lower = torch.linalg.cholesky(basis.T @ (outputs @ basis))
        basis = torch.linalg.solve_triangular(lower, basis.T, upper=False).T
    else:
        root, inverse = symmetric_roots(outputs)
        sided = root @ w
        _, vectors = torch.linalg.eigh(sided @ inputs @ sided.T)
        basis = inverse @ vectors.flip(1)[:, :rank]
    return basis @ (basis.T @ (outputs @ w))


def matrices(width: int, hidden: int, rounds: int) -> list[list[object]]:
    """A row for each shape of a decoder block."""
    rows: list[list[object]] = []
    for out, inside in ((width, width), (hidden, width), (width, hidden)):
        weight = torch.randn(out, inside, generator=torch.Generator().manual_seed(2)) / inside**0.5
        inputs, outputs = covariance(inside, 3), covariance(out, 4)
        outputs = 0.9 * outputs + 0.1 * float(outputs.diagonal().mean()) * torch.eye(out, dtype=torch.float64)
        rank = min(out, inside) // 2

        def made(w: Tensor = weight, c: Tensor = inputs, g: Tensor = outputs, r: int = rank) -> Tensor:
            return low_rank(w.double(), InputMetric(c), r, output=OutputMetric(g)).product(r)

        def before(w: Tensor = weight, c: Tensor = inputs, g: Tensor = outputs, r: int = rank) -> Tensor:
            return by_eigenvectors(w, c, g, r)

        seconds, found = times({"before": before, "now": made}, rounds)
        apart = float((found["before"] - found["now"]).norm() / found["before"].norm())
        ratio = seconds["now"] / seconds["before"]
        rows.append(
            [f"{out} x {inside}", f"{seconds['before']:.2f}", f"{seconds['now']:.2f}", f"{ratio:.2f}", f"{apart:.0e}"]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1024,2048,4096", help="of eigenproblems, with commas between")
    parser.add_argument("--width", type=int, default=4096, help="of a decoder block")
    parser.add_argument("--hidden", type=int, default=11008, help="between its two halves of the feed-forward network")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n", flush=True)
    rows: list[list[object]] = []
    for size in sizes:
        matrix = covariance(size, 0) + 1e-6 * torch.eye(size, dtype=torch.float64)
        found, _ = times(
            {"eigen": lambda m=matrix: symmetric_roots(m), "lower": lambda m=matrix: lower_root(m, 1e-12)}, args.rounds
        )
        ratio = found["lower"] / found["eigen"]
        rows.append([size, f"{found['eigen']:.2f}", f"{found['lower']:.2f}", f"{ratio:.2f}"])
    print_table(["root of a metric", "eigenvectors, s", "Cholesky, s", "ratio"], rows)
    print(flush=True)
    rows = [row for size in sizes for row in solvers(size, args.rounds)]
    print_table(["solver", "rank", "s", "to syevd", "excess", "bound", "orthonormal to"], rows)
    print(flush=True)
    rows = matrices(args.width, args.hidden, args.rounds)
    print_table(["matrix, two metrics", "eigenvectors, s", "now, s", "ratio", "apart"], rows)


if __name__ == "__main__":
    main()
