"""Draws the search of a result: objective of every trial, and the best so far.

    python benchmarks/picture.py OUT docs/search.svg

OUT is a folder that `bolaco compress` wrote.
"""

from __future__ import annotations

import argparse
from itertools import accumulate

import matplotlib.pyplot as plt

from bolaco.checkpoint.info import read_info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("picture")
    args = parser.parse_args()
    info = read_info(args.out)
    values = [trial["objective"] for trial in info["trials"]]
    # The same bytes for the same data: no date, no random ids.
    plt.rcParams["svg.hashsalt"] = "bolaco"
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    axes.plot(values, "o", color="#8aa4c8", label="trial")
    axes.step(range(len(values)), list(accumulate(values, min)), where="post", color="#c0392b", label="best so far")
    axes.plot(0, values[0], "s", color="#2c3e50", label="hand allocation")
    axes.set(xlabel="trial", ylabel="objective (log scale)", yscale="log")
    axes.set_title(f"{info['model']}, keep {info['keep']}, {info['recipe']['search']['space']} search", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(args.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
