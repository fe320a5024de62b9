"""Draws what frontier.py has measured: the gap to the dense model over the keep ratio.

python benchmarks/picture.py CACHE/frontier-....json docs/frontier.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

from common import gap

# Shown at every keep ratio that has been measured, in this order.
LINES = {
    "base: feature PCA, uniform": ("feature PCA, one ratio for all", "#95a5a6"),
    "SVD-LLM": ("SVD-LLM", "#7f8c8d"),
    "AA-SVD": ("AA-SVD", "#d68910"),
    "MPIFA": ("MPIFA", "#8e44ad"),
    "Bolaco, 5x1 search": ("Bolaco 5x1", "#16a085"),
    "K-FAC SVD, closed-form ranks": ("K-FAC SVD", "#2471a3"),
    "all (the default)": ("bolaco, default", "#c0392b"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("picture")
    args = parser.parse_args()
    measured = {name: entry["value"] for name, entry in json.loads(args.results.read_text()).items()}
    dense = measured.pop("dense")
    # The same bytes for the same data: no date, no random ids.
    plt.rcParams["svg.hashsalt"] = "bolaco"
    figure, panels = plt.subplots(1, 2, figsize=(9.4, 3.2), layout="constrained", sharex=True, sharey=True)
    for axes, (text, title) in zip(panels, (("wikitext", "WikiText-2"), ("c4", "C4, held out")), strict=True):
        for label, (name, color) in LINES.items():
            found = [
                (v["keep"], gap(v[text], dense[text])) for k, v in measured.items() if k.partition(" ")[2] == label
            ]
            if found:
                axes.plot(*zip(*sorted(found), strict=True), "o-", color=color, label=name, markersize=4)
        axes.set(title=title, xlabel="share of the decoder linears kept", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("log-perplexity gap to dense (nats)")
    panels[1].invert_xaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(args.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
