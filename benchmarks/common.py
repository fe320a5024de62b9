"""What the benchmarks have in common: the data, a prepared model with its factors, and tables."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from bolaco import api
from bolaco.allocate.search.elastic import ElasticModel
from bolaco.data.settings import Calibration
from bolaco.data.sources import TokenStream
from bolaco.evaluation.objective import Head, score
from bolaco.factorize import METHODS, ChosenMethod
from bolaco.factorize.run import FactorJob, factorize
from bolaco.factorize.store import FactorStore
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model
from bolaco.models.structure import Structure
from bolaco.models.subject import Subject
from bolaco.progress import Reporter
from bolaco.statistics.stored import StatisticStore, estimate_gradients
from bolaco.storage.budget import Budget, Ranks
from bolaco.storage.storage import STORAGES
from bolaco.work.memory import PeakMemory

os.environ.setdefault("TQDM_DISABLE", "1")


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with c4_sample.jsonl and wikitext2_raw_test.txt"
    )
    parser.add_argument("--cache", type=Path, default=Path("benchmark-cache.work"), help="factors are kept here")
    return parser


@dataclass
class Texts:
    """Token blocks of the protocol: C4 documents 1-1000 calibrate, the others choose ranks and are held out."""

    calibration: Tensor
    validation: Tensor
    heldout: Tensor
    wikitext: Tensor


def protocol_texts(
    data: Path, tokenizer: object, calibration: int, seq_len: int, validation: int, validation_len: int, windows: int
) -> Texts:
    c4 = str(data / "c4_sample.jsonl")
    rest = TokenStream(f"{c4}[1000:]", tokenizer)
    chosen = rest.take(validation, validation_len, "validation")
    return Texts(
        TokenStream(f"{c4}[:1000]", tokenizer).take(calibration, seq_len, "calibration"),
        chosen,
        rest.take(None, 1024, "held-out C4"),
        TokenStream(str(data / "wikitext2_raw_test.txt"), tokenizer).take(windows, 1024, "evaluation"),
    )


class TuningTexts:
    """Sources of the protocol of tuning: on C4 documents 1001-1300, held out are the last 180 of 1480 and WikiText-2.

    Models were calibrated on documents 1-1000, so no document serves two purposes.
    """

    FIRST, LAST, HELD_OUT = 1000, 1300, 180

    def __init__(self, data: Path) -> None:
        c4 = data / "c4_sample.jsonl"
        with c4.open(encoding="utf-8") as file:
            documents = sum(1 for line in file if line.strip())
        if documents - self.HELD_OUT < self.LAST:
            raise SystemExit(f"{c4}: {documents} documents; {self.LAST + self.HELD_OUT} are needed")
        self.tuning = f"{c4}[{self.FIRST}:{self.LAST}]"
        self.held_out = f"{c4}[{documents - self.HELD_OUT}:]"
        self.wikitext = str(data / "wikitext2_raw_test.txt")

    def perplexities(
        self, model: str | PreTrainedModel, window: int, windows: int, tokenizer: object = None
    ) -> dict[str, float]:
        """Of a folder or model: on so many windows of WikiText-2, and on half as many of held-out C4."""
        words = {"seq_len": window, "reporter": Reporter(), "tokenizer": tokenizer}
        return {
            "wikitext": api.evaluate(model, self.wikitext, limit=windows, **words).perplexity,
            "c4": api.evaluate(model, self.held_out, limit=windows // 2, **words).perplexity,
        }


@dataclass
class Prepared:
    """A model, the factors of a method, and what that method needed of statistics on disk."""

    subject: Subject
    store: FactorStore
    statistics: list[StatisticStore]

    @property
    def model(self) -> PreTrainedModel:
        return self.subject.model

    @property
    def structure(self) -> Structure:
        return self.subject.structure

    def perplexity(self, ranks: Ranks, blocks: Tensor) -> float:
        """Perplexity of an allocation, through the elastic model."""
        with ElasticModel(self.subject, self.store) as elastic:
            elastic.set_ranks(ranks)
            return score(self.model, Head(self.model), blocks).perplexity


@contextmanager
def with_blocks(model: PreTrainedModel, structure: Structure, blocks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The model has these decoder blocks while this lasts, and its own again afterwards."""
    stack = model.base_model.get_submodule(structure.stack)
    own = list(stack)
    try:
        for layer, block in enumerate(blocks):
            stack[layer] = block
        yield
    finally:
        for layer, block in enumerate(own):
            stack[layer] = block


def prepare(
    args: argparse.Namespace,
    blocks: Tensor,
    method: str = "afm",
    groups: int = 32,
    gradients: int = 0,
    storage: str = "two-factor",
) -> Prepared:
    """Loads the model and computes (or finds) the factors for these calibration blocks."""
    model = load_model(args.model)
    structure = inspect_structure(model)
    subject = Subject(model, structure)
    store = FactorStore(args.cache / f"factors-{_key(blocks, args.model, method, groups, storage, gradients)}")
    method_chosen, settings, reporter = chosen(method), Calibration(groups=groups), Reporter()
    statistics = []
    for kind in method_chosen.method.gradients:
        folder = args.cache / f"{kind.name}-{_key(blocks[:gradients], args.model)}"
        statistics.append(StatisticStore(folder, kind))
        estimate_gradients(statistics[-1], kind, model, structure, blocks[:gradients], settings, reporter)
    form = STORAGES.get(storage)
    top = {site.name: form.max_rank(site, 8) for site in structure.sites}
    factorize(blocks, [FactorJob(method_chosen, subject, store, top, statistics)], settings, reporter)
    return Prepared(subject, store, statistics)


def chosen(method: str) -> ChosenMethod:
    """The method of this name with its default options."""
    found = METHODS.get(method)
    return ChosenMethod(found, found.options())


def _key(blocks: Tensor, *words: object) -> str:
    return hashlib.sha256(blocks.numpy().tobytes() + "/".join(map(str, words)).encode()).hexdigest()[:12]


def print_table(header: list[str], rows: list[list[object]]) -> None:
    """A Markdown table on standard output."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) + " |")


def gap(perplexity: float, dense: float) -> float:
    return math.log(perplexity / dense)


class Ledger:
    """Results by name in a JSON file, so that a benchmark that was stopped goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.values = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, compute: object) -> object:
        if name not in self.values:
            start = time.perf_counter()
            value = compute()  # type: ignore[operator]
            found = {"value": value, "seconds": time.perf_counter() - start}
            # Two processes may share the work of a benchmark.
            with FileLock(self.path.with_suffix(".lock")):
                known = json.loads(self.path.read_text()) if self.path.exists() else {}
                self.values = known | {name: found}
                self.path.write_text(json.dumps(self.values))
        return self.values[name]["value"]


def median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


__all__ = [
    "Budget",
    "Ledger",
    "PeakMemory",
    "Prepared",
    "Texts",
    "TuningTexts",
    "arguments",
    "chosen",
    "gap",
    "median",
    "prepare",
    "print_table",
    "protocol_texts",
    "with_blocks",
]
