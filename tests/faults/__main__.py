"""Prints what faults did: a row for each kind and story, and every one that was wrong."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable

from tests.faults.happen import FAULT, IDENTICAL, KINDS, ONE_LINE, SKIPPED, happened, known
from tests.faults.stories import STORIES

# Of each kind, over all stories.
COUNTS = {"kill": 140, "damage": 56, "full disk": 28, "two at once": 14}


WAYS = (IDENTICAL, ONE_LINE, SKIPPED, FAULT)


def _row(story: str, kind: str, cells: Iterable[object]) -> str:
    return f"{story:14}{kind:14}" + "".join(f"{cell!s:>11}" for cell in cells)


def main() -> int:
    """Runs them, a story after the other; 1 if one was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", choices=list(KINDS), help="one kind")
    parser.add_argument("--story", choices=list(STORIES), help="one story")
    parser.add_argument("--count", type=int, help="of each kind, over all stories")
    parser.add_argument("--number", type=int, help="one of them, and what it did")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kinds = [args.only] if args.only else list(KINDS)
    stories = [args.story] if args.story else list(STORIES)
    wrong, start = [], time.monotonic()
    total: Counter[str] = Counter()
    print(_row("story", "kind", WAYS))
    for story in stories:
        whole = known(STORIES[story])
        for kind in kinds:
            count = -(-(args.count or COUNTS[kind]) // len(stories))
            found: Counter[str] = Counter()
            for number in range(count) if args.number is None else [args.number]:
                ended = happened(kind, story, number, args.seed, whole)
                found[ended.how] += 1
                if ended.how == FAULT:
                    words = f"--only '{kind}' --story '{story}' --number {number} --seed {args.seed}"
                    wrong.append(f"{words}\n{ended.said}")
                if args.number is not None:
                    print("; ".join(ended.what), ended.said, sep="\n")
            total += found
            print(_row(story, kind, [found[way] for way in WAYS]), flush=True)
    print(f"{sum(total.values())} faults in {time.monotonic() - start:.0f} s: {dict(total)}")
    for text in wrong:
        print(f"\nWRONG {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
