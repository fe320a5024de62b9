"""What more processes are worth: seconds of the stages with one and with two, each on one thread, and what comes out.

    python benchmarks/ranks.py
    python benchmarks/ranks.py --ranks 1 2 4 --layers 8 --tokens 8192

A random model (1024 wide, 2816 inside) is compressed by the default recipe, by processes that torchrun starts. Seconds
are those of the first process, in which it waits for the others too. A machine with other work on it, or with fewer
cores than processes, gives other ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bolaco import api
from bolaco.factorize import run as factorize_run
from bolaco.models.load import load_model
from bolaco.parallel.launch import launched_as
from bolaco.refine.run import Refiner
from bolaco.runs import factors as factor_stages
from common import print_table
from scale import make_checkpoint

STAGES = ("loss gradients", "statistics of inputs", "factors", "refinement", "all")


def timed(where: Any, name: str, stage: str, seconds: dict[str, float]) -> None:
    """From now on the seconds of a function count for a stage."""
    function: Callable[..., Any] = getattr(where, name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start

    setattr(where, name, measured)


def run_one(folder: Path, out: Path, args: argparse.Namespace) -> None:
    """One run, of which this process is a part; its figures go into its folder."""
    seconds: dict[str, float] = {}
    timed(factor_stages, "estimate_gradients", "loss gradients", seconds)
    timed(factorize_run, "collect", "statistics of inputs", seconds)
    timed(factorize_run, "_of_block", "factors", seconds)
    timed(Refiner, "run", "refinement", seconds)
    start = time.perf_counter()
    api.compress(
        str(folder),
        out=out,
        keep=0.8,
        calibration=str(folder / "text.txt"),
        options={
            "calibration.sequences": args.tokens // args.length,
            "calibration.seq_len": args.length,
            "calibration.batch": 4,
            "calibration.gradient_sequences": args.tokens // args.length,
            "evaluation.windows": 2,
            "refinement.steps": args.steps,
        },
    )
    seconds["all"] = time.perf_counter() - start
    if launched_as() == 0:
        (out / "figures.json").write_text(json.dumps(seconds))


def measured(folder: Path, ranks: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the stages with so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    command += ["--one", str(folder), "--tokens", str(args.tokens), "--length", str(args.length)]
    command += ["--steps", str(args.steps), "--out", str(folder / f"out-{ranks}")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        raise SystemExit(f"{ranks} processes: the run failed\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads((folder / f"out-{ranks}" / "figures.json").read_text())
    return found


def difference(one: Path, other: Path) -> float:
    """The largest difference between the logits of two results, by the largest logit."""
    found = []
    for folder in (one, other):
        model = load_model(str(folder), "float32", "cpu")
        with torch.no_grad():
            found.append(model(torch.arange(64).view(2, 32)).logits)
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text")
    parser.add_argument("--length", type=int, default=256, help="of a sequence")
    parser.add_argument("--steps", type=int, default=4, help="of refinement, for each block")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(1)
        run_one(args.one, args.out, args)
        return
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    try:
        make_checkpoint(folder, "small", args.layers)
        found = {ranks: measured(folder, ranks, args) for ranks in args.ranks}
        first, *others = args.ranks
        rows: list[list[object]] = []
        for stage in STAGES:
            cells: list[object] = [stage, f"{found[first][stage]:.1f}"]
            for ranks in others:
                cells += [f"{found[ranks][stage]:.1f}", f"{found[ranks][stage] / found[first][stage]:.2f}"]
            rows.append(cells)
        head = [f"processes: {first}, s", *(h for ranks in others for h in (f"{ranks}, s", f"to {first}"))]
        print_table(["stage", *head], rows)
        for ranks in others:
            apart = difference(folder / f"out-{first}", folder / f"out-{ranks}")
            print(f"{ranks} processes: logits differ by {apart:.0e} of the largest at most")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
