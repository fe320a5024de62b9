"""What ``--dry-run`` says a run will take, beside what it takes.

    python benchmarks/forecast.py --data DATA
    python benchmarks/forecast.py --data DATA --sequences 16 --length 256 --set refinement.steps=4

The default recipe at --keep on C4, forecast and then run in the same process. Memory is the largest resident memory of
the process, disk is what the work folder holds in the end.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bolaco import api
from bolaco.recipe.recipe import make_recipe, recipe_values
from bolaco.runs.dry_run import forecast_of, preview
from bolaco.settings import merge
from bolaco.work.memory import PeakMemory
from common import arguments, print_table


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--sequences", type=int, default=128, help="of calibration text")
    parser.add_argument("--length", type=int, default=1024, help="of each")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the recipe")
    args = parser.parse_args()
    options = {"calibration.sequences": args.sequences} | dict(pair.split("=", 1) for pair in args.set)
    words = recipe_values(
        keep=args.keep, calibration=str(args.data / "c4_sample.jsonl"), seq_len=args.length, options=options
    )
    recipe = make_recipe(merge({"model": args.model}, words))
    expected = forecast_of(preview(recipe))
    assert expected is not None
    print(expected.line, flush=True)
    peak = PeakMemory()
    with tempfile.TemporaryDirectory() as folder:
        out, work = Path(folder) / "out", Path(folder) / "work"
        taken = dict(api.run(recipe, out, work=work, keep_work=True).info.seconds)
        disk = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    rows: list[list[object]] = []
    for stage in dict.fromkeys((*expected.seconds, *taken)):
        rows.append(row(stage, expected.seconds.get(stage, 0.0), taken.get(stage, 0.0), 1, "s"))
    rows.append(row("all", expected.total, sum(taken.values()), 1, "s"))
    rows.append(row("memory", expected.memory, peak.bytes(), 2**20, "MiB"))
    rows.append(row("work folder", expected.disk, disk, 2**20, "MiB"))
    print_table(["", "forecast", "taken", "forecast / taken"], rows)


def row(name: str, forecast: float, taken: float, unit: int, label: str) -> list[object]:
    """Both numbers in a unit, and their ratio."""
    ratio = f"{forecast / taken:.2f}" if taken else ""
    return [name, f"{forecast / unit:,.1f} {label}", f"{taken / unit:,.1f} {label}", ratio]


if __name__ == "__main__":
    main()
