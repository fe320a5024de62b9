"""A student of one percent of the teacher, and what a store of its knowledge adds (RetriKT).

    python benchmarks/retrikt.py --data DATA
    python benchmarks/retrikt.py --data DATA --full

The task is to tell what kind of text some words are from: a question of the web, an exam in science, advice, a story,
an encyclopedia or a page of the web (BoolQ, ARC, PIQA, WinoGrande, WikiText-2, C4; at most 30 words of each, 100 texts
of each kind to report on, none of which is learned from). Chance is 1/6.

At 64 and at 256 labelled texts: the prompted teacher; a student alone; with distillation on the labelled texts; with
distillation on texts that the teacher has generated, without a store, which is the fair control; with the store; and
with a store whose labels are shuffled, which must hurt. Every student has the same steps. The small size has one draw
of labelled texts and one teacher's store for all seeds; --full has a draw and a store for each. Standard errors are
over seeds. Stages and results are remembered in --cache.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from bolaco.distill.measure import accuracy_of, answers_of
from bolaco.distill.run import Stages, task_texts
from bolaco.distill.settings import Distillation, Studying, make_settings
from bolaco.distill.store import Store, judged
from bolaco.distill.study import Studied, study
from bolaco.distill.teacher import Teacher
from bolaco.models.load import load_model, load_tokenizer
from bolaco.progress import Reporter
from bolaco.runs.session import begin
from bolaco.work.folder import WorkFolder
from common import Ledger, arguments, print_table

WORDS, LEAST = 30, 6
SMALL = {
    "prompt.steps": 60,
    "prompt.generate_steps": 60,
    "prompt.batch": 8,
    "reinforce.steps": 8,
    "reinforce.batch": 24,
    "reinforce.every": 4,
    "reinforce.evaluation": 24,
    "store.samples": 480,
    "student.steps": 300,
}
FULL = {"store.samples": 3000, "student.steps": 600}
ALONE = {"distill": 0.0, "generated": False, "similarity": 0.0}
ARMS = {
    "student alone": ALONE,
    "+ distillation on labelled texts": ALONE | {"distill": 1.0},
    "+ distillation on generated texts, no store": {"similarity": 0.0},
    "+ store": {},
}
SHUFFLED = "+ store with shuffled labels"


def rows_of(file: Path) -> Iterator[dict[str, object]]:
    with file.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def plain(text: str) -> str:
    """Without the marks of data sets, and no longer than WORDS."""
    text = re.sub(r" @(.)@ ", r"\1", text)
    text = re.sub(r" ([.,;:?!)'%])", r"\1", re.sub(r"([($]) ", r"\1", text)).replace(' "', '"')
    return " ".join(text.split()[:WORDS])


def asked(query: str) -> str:
    """The question of a query, without what stands before and after it."""
    found = query.rsplit("Question: ", 1)[-1].split("\nAnswer")[0].strip()
    return found


def kinds(data: Path) -> dict[str, list[str]]:
    """Texts of each kind, in the order of their files."""
    tasks = data / "tasks"
    pages = (data / "wikitext2_raw_validation.txt").read_text(encoding="utf-8").splitlines()
    found = {
        "question": [asked(row["query"]) for row in rows_of(tasks / "boolq.jsonl")],
        "science": [asked(row["query"]) for row in rows_of(tasks / "arc_easy.jsonl")],
        "advice": [row["choices"][row["gold"]] for row in rows_of(tasks / "piqa.jsonl")],
        "story": [
            f"{row['context_options'][row['gold']]} {row['continuation']}"
            for row in rows_of(tasks / "winogrande.jsonl")
        ],
        "encyclopedia": [line for line in pages if line.strip() and not line.lstrip().startswith("=")],
        "web": [str(row["text"]) for row in rows_of(data / "c4_sample.jsonl")],
    }
    return {kind: [text for text in map(plain, texts) if len(text.split()) >= LEAST] for kind, texts in found.items()}


def write_task(file: Path, texts: dict[str, list[str]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "label": kind} for kind, some in texts.items() for text in some]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


class Bench:
    """The texts, and the stages of a teacher by number of labelled texts and seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.texts = args, kinds(args.data)
        self.sizes = (FULL if args.full else SMALL) | dict(pair.split("=", 1) for pair in args.set)
        # Numbers on the command line are numbers.
        self.sizes = {name: json.loads(v) if isinstance(v, str) else v for name, v in self.sizes.items()}
        self._teacher: Teacher | None = None

    def settings(self, labels: int, seed: int) -> Distillation:
        """Of a teacher with so many labelled texts; test texts come first in each file, others are drawn."""
        draw, folder = random.Random(seed), self.args.cache / f"task-{labels}-{seed}-{self.args.test}"
        kinds = len(self.texts)
        known = {
            kind: draw.sample(texts[self.args.test :], labels // kinds + (number < labels % kinds))
            for number, (kind, texts) in enumerate(self.texts.items())
        }
        test = {kind: texts[: self.args.test] for kind, texts in self.texts.items()}
        words = {
            "teacher": self.args.model,
            "task": write_task(folder / "task.jsonl", known),
            "evaluation": write_task(folder / "test.jsonl", test),
            "seed": seed,
        }
        return make_settings(words, self.sizes)

    def stages(self, settings: Distillation, folder: WorkFolder) -> Stages:
        if self._teacher is None:
            self._teacher = Teacher(load_model(self.args.model), load_tokenizer(self.args.model))
        return Stages(settings, task_texts(settings), self._teacher, begin(folder, settings, Reporter()))

    def teacher(self, stages: Stages) -> dict[str, object]:
        """How the teacher's stages went."""
        test, settings = stages.texts.reported, stages.settings
        found = judged(stages.teacher, stages.prompts[0], test.texts, settings, test.name)
        reinforced, kept = stages.reinforced[1], stages.store[1]
        return {
            "accuracy": accuracy_of(found.probabilities, test),
            "before": {key: getattr(reinforced.before, key) for key in ("reward", "certainty", "kl", "distinct")},
            "after": {key: getattr(reinforced.after, key) for key in ("reward", "certainty", "kl", "distinct")},
            "kept": sum(kept.kept.values()),
            "drawn": sum(kept.drawn.values()),
            "seconds": dict(stages.session.clock.seconds),
        }

    def student(self, stages: Stages, arm: str, seed: int) -> dict[str, object]:
        """The accuracy of a student."""
        settings, test = stages.settings, stages.texts.reported
        values = Studying.model_validate(settings.student.model_dump() | ARMS[arm])
        start = time.perf_counter()
        key = {"teacher": stages.identity, "settings": settings, "student": values, "seed": seed}
        place = stages.session.folder.artefact("student", **key).path / "student.safetensors"
        studied = study(stages.store[0], values, settings.store.held_out, seed, place)
        _, answer = answers_of(studied, test.texts, test.name)
        found = {
            "accuracy": accuracy_of(answer, test),
            "parameters": studied.student.parameters,
            "share": studied.retrieval.share,
            "neighbours": studied.retrieval.neighbours,
            "seconds": time.perf_counter() - start,
        }
        if values.similarity:
            found[SHUFFLED] = accuracy_of(answers_of(shuffled(studied, seed), test.texts, test.name)[1], test)
        return found


def shuffled(studied: Studied, seed: int) -> Studied:
    """The same student, whose store has the labels of its items in another order."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(studied.store), generator=draw).tolist()
    store: Store = studied.store
    items = tuple(
        item.model_copy(update={"label": store.items[n].label, "origin": store.items[n].origin})
        for item, n in zip(store.items, order, strict=True)
    )
    return replace(studied, store=replace(store, items=items, probabilities=store.probabilities[order]))


def mean_and_error(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} +- {error:.3f}"


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, nargs="+", default=[64, 256], help="labelled texts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test", type=int, default=100, help="texts of each kind to report on")
    parser.add_argument("--full", action="store_true", help="the whole size, and a teacher's store for each seed")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the distillation")
    args = parser.parse_args()
    bench = Bench(args)
    key = "-".join(f"{name}={value}" for name, value in sorted(bench.sizes.items()))
    size = f"{'full' if args.full else 'small'}-{args.test}-{random.Random(key).getrandbits(32):08x}"
    ledger = Ledger(args.cache / f"retrikt-{size}.json")
    rows: list[list[object]] = []
    for labels in args.labels:
        found: dict[str, list[float]] = {}
        for seed in range(args.seeds):
            drawn = seed if args.full else 0
            settings = bench.settings(labels, drawn)
            with WorkFolder(args.cache / f"retrikt-{labels}-{drawn}-{args.test}.work", settings) as folder:
                made: list[Stages] = []

                def stages(settings: Distillation = settings, folder: WorkFolder = folder, made: list = made) -> Stages:
                    made[:] = made or [bench.stages(settings, folder)]
                    return made[0]

                teacher = ledger.get(f"{labels} {drawn} teacher", lambda: bench.teacher(stages()))
                print(labels, drawn, teacher, flush=True)
                found.setdefault("teacher, prompted", []).append(teacher["accuracy"])
                for arm in ARMS:
                    result = ledger.get(f"{labels} {seed} {arm}", lambda a=arm, s=seed: bench.student(stages(), a, s))
                    print(labels, seed, arm, result, flush=True)
                    found.setdefault(arm, []).append(result["accuracy"])
                    if SHUFFLED in result:
                        found.setdefault(SHUFFLED, []).append(result[SHUFFLED])
        rows += [[labels, name, mean_and_error(values)] for name, values in found.items()]
    print_table(["labelled texts", "", "accuracy"], rows)


if __name__ == "__main__":
    main()
