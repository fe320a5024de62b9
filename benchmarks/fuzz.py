"""What damaged, foreign and hostile files and words do to the command line: a mutation of one input at a time.

    python benchmarks/fuzz.py                              every class as often as COUNTS says: 3,617 in all
    python benchmarks/fuzz.py --count 300 --seed 7         about so many in all, others than those of seed 0
    python benchmarks/fuzz.py --only lowrank               one class
    python benchmarks/fuzz.py --only lowrank --number 17   one mutation of it again, with all that it said

Models, results, a comparison, a recipe and texts are made first, tiny ones. A mutation depends on the seed, its class
and its number only. It is read by the command that reads such a file, in a forked process with a limit of time and of
memory. The result is fine, one line of error, or a fault: a traceback, a hang, memory. The status is 1 if there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import torch
import yaml
from transformers.utils.logging import disable_progress_bar

from bolaco import api
from bolaco.cli import main as bolaco
from bolaco.errors import BolacoError, printable
from bolaco.models.load import load_config, load_tokenizer
from bolaco.report.comparison import comma_separated, markdown, rich_table
from bolaco.report.html import comparison_page
from bolaco.report.record import read_record
from fuzz_inputs import Inputs, make_inputs
from fuzz_mutations import STRANGE, YAMLS, as_json, changed_json, damaged, laughs, mutated, places, replace

COUNTS = {
    "bolaco.json": 900,
    "set": 680,
    "recipe": 300,
    "results.json": 300,
    "curves.json": 250,
    "lowrank": 200,
    "config.json": 200,
    "model config": 150,
    "weights": 110,
    "adapter": 40,
    "delta": 120,
    "questions": 107,
    "index": 100,
    "tokenizer": 100,
    "instructions": 60,
}
OUTCOMES = ("fine", "one line", "traceback", "hang", "memory")
FAULTS = OUTCOMES[2:]
GIB = 2**30
MEMORY = GIB  # more than the process had is a fault; three times as much is refused by the system
SECONDS = 20.0


# --- classes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A mutation: what was done, and the command, or the call, that reads it."""

    said: str
    command: Sequence[str] | Callable[[], object]


def _copy(folder: Path, place: Path) -> Path:
    """The folder again, of the same files: those that are changed are replaced first."""
    return Path(shutil.copytree(folder, place / folder.name, copy_function=os.link))


def _load_commands(folder: Path, inputs: Inputs, place: Path) -> list[Sequence[str]]:
    """Commands that load a model."""
    return [
        ["eval", str(folder), "--data", inputs.text, "--seq-len", "16", "--limit", "2"],
        ["export", str(folder), "--dense", "-o", str(place / "stock")],
        ["bench", str(folder), "--batch", "1", "--prompt", "8", "--new-tokens", "1"],
    ]


def _info(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    folder = _copy(draw.choice([*inputs.results, *inputs.tuned]), place)
    said = changed_json(folder / "bolaco.json", draw)
    model = str(inputs.folder / "models" / "llama")
    commands: list[Any] = [
        ["inspect", str(folder)],
        ["inspect", str(folder), "--html", str(place / "page.html")],
        ["inspect", str(folder), "--html", str(place / "page.html")],
        ["compress", model, "--keep", "0.7", "--preset", "bolaco-5x1", "--warm-start", str(folder), "--dry-run"],
        lambda: _tuning(str(folder), inputs.text),
    ]
    return Trial(said, draw.choice(commands))


def _tuning(model: str, data: str) -> None:
    """What ``bolaco tune`` reads, and no step of training."""
    from bolaco.tune.load import load
    from bolaco.tune.settings import make_settings

    options = {"evaluation.windows": 1, "training.max_steps": 1}
    load(make_settings(model, {"mode": "factors", "data": data, "seq_len": 16, "batch": 1}, options), 1)


def _curves(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    folder = _copy(draw.choice([r for r in inputs.results if (r / "curves.json").is_file()]), place)
    said = changed_json(folder / "curves.json", draw)
    return Trial(said, ["inspect", str(folder), "--html", str(place / "page.html")])


def _lowrank(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    folder = _copy(draw.choice(inputs.results), place)
    said = changed_json(folder / "config.json", draw, ("lowrank",), raw=0)
    return Trial(said, draw.choice(_load_commands(folder, inputs, place)))


def _config(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    folder = _copy(draw.choice(inputs.results), place)
    said = changed_json(folder / "config.json", draw)
    return Trial(said, draw.choice(_load_commands(folder, inputs, place)))


def _model_config(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    folder = _copy(draw.choice(inputs.models), place)
    file = folder / "config.json"
    if draw.random() < 0.1:
        values = json.loads(file.read_text(encoding="utf-8"))
        sizes = [key for key in values if "layer" in key or key.endswith(("_size", "_embd", "_experts"))]
        key = draw.choice(sizes)
        values[key] = draw.choice((10**9, 10**12, 10**6, 0, -1))
        said = replace(file, as_json(values).encode(), f"{key}: {values[key]}")
    else:
        said = changed_json(file, draw)
    dry = ["compress", str(folder), "--keep", "0.7", "--calibration", inputs.text, "--seq-len", "16", "--dry-run"]
    loading = _load_commands(folder, inputs, place)
    return Trial(said, draw.choice([dry, dry, loading[0], loading[2]]))


def _index(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    folder = _copy(draw.choice([*inputs.results, *inputs.models]), place)
    file = folder / "model.safetensors.index.json"
    if draw.random() < 0.5:
        values = json.loads(file.read_text(encoding="utf-8"))
        name = draw.choice(sorted(values["weight_map"]))
        outside = ["../x.safetensors", "/dev/zero", "/dev/urandom", "/etc/passwd", str(inputs.text), "..", ".", ""]
        other = "../" * 9 + "dev/zero"
        linked = folder / "linked.safetensors"
        linked.symlink_to("/dev/zero")
        values["weight_map"][name] = draw.choice([*outside, other, linked.name, "config.json", "gone.safetensors"])
        said = replace(file, as_json(values).encode(), f"{name} in {values['weight_map'][name]!r}")
    else:
        said = changed_json(file, draw)
    loading = _load_commands(folder, inputs, place)
    return Trial(said, draw.choice([loading[0], loading[2]]))


def _weights(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    folder = _copy(draw.choice([*inputs.results, *inputs.models]), place)
    file = draw.choice(sorted(folder.glob("model*.safetensors")))
    data = file.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    if draw.random() < 0.5:
        values, said = mutated(json.loads(data[8:head]), draw)
        header = as_json(values).encode("utf-8", "surrogatepass")
        data = len(header).to_bytes(8, "little") + header + data[head:]
    elif draw.random() < 0.5:
        data, said = draw.choice((2**40, 2**63, 0, 10**9)).to_bytes(8, "little") + data[8:], "length of the header"
    else:
        data, said = damaged(data, draw)
    loading = _load_commands(folder, inputs, place)
    return Trial(replace(file, data, said), draw.choice([loading[0], loading[2]]))


def _adapter(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    folder = _copy(draw.choice([path for path in inputs.tuned if any(path.glob("adapter*"))]), place)
    file = draw.choice(sorted(path for path in folder.rglob("adapter*") if path.suffix in (".json", ".safetensors")))
    data = file.read_bytes()
    said = changed_json(file, draw) if file.suffix == ".json" else replace(file, *damaged(data, draw))
    loading = _load_commands(folder, inputs, place)
    return Trial(said, draw.choice([loading[0], loading[2]]))


def _delta(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    folder = _copy(draw.choice(inputs.deltas), place)
    if draw.random() < 0.7:
        said = changed_json(folder / "bolaco.json", draw)
    else:
        file = folder / "delta.safetensors"
        said = replace(file, *damaged(file.read_bytes(), draw))
    commands = [
        ["eval", str(folder), "--data", inputs.text, "--seq-len", "16", "--limit", "2"],
        ["delta", "apply", str(folder), "-o", str(place / "merged")],
        ["delta", "export", str(folder), "--peft", "-o", str(place / "exported")],
        ["inspect", str(folder), "--html", str(place / "page.html")],
    ]
    return Trial(said, draw.choice(commands))


def _tokenizer_files(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    folder = _copy(draw.choice([inputs.results[0], inputs.models[0]]), place)
    file = folder / draw.choice(("tokenizer.json", "tokenizer_config.json", "generation_config.json"))
    return Trial(changed_json(file, draw), _load_commands(folder, inputs, place)[0])


def _results(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    folder = _copy(inputs.folder / "compared", place)
    said = changed_json(folder / "results.json", draw)

    def read() -> None:
        record = read_record(folder / "results.json")
        for text in (markdown(record), comparison_page(record), comma_separated(record)):
            (place / "written").write_text(text, encoding="utf-8")
        rich_table(record)

    return Trial(said, read)


def _recipe(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    file = place / "recipe.yaml"
    shutil.copy(inputs.folder / "recipe.yaml", file)
    text = file.read_text(encoding="utf-8")
    kind = draw.random()
    if kind < 0.2:
        data, said = damaged(text.encode(), draw)
    elif kind < 0.4:
        lines = text.splitlines()
        spot = draw.randrange(len(lines))
        key, other = lines[spot].partition(":")[0], draw.choice(YAMLS)
        lines[spot] = f"{key}: {other}"
        data, said = "\n".join(lines).encode("utf-8", "surrogatepass"), f"line {spot}: {key}: {other[:40]!r}"
    elif kind < 0.45:
        data, said = (laughs() + text.replace("seed: 0", "seed: *h")).encode(), "lists of lists of lists"
    else:
        values, said = mutated(yaml.safe_load(text), draw)
        # JSON is YAML, nearly.
        data = as_json(values).encode("utf-8", "surrogatepass")
    return Trial(replace(file, data, said), ["run", str(file), "--dry-run"])


def _set(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    fields = [".".join(map(str, p)) for p in places(yaml.safe_load((inputs.folder / "recipe.yaml").read_text()))]
    tuned = ["training.max_steps", "training.warmup", "options.sequences", "trainer.report_to", "trainer.optim", "bos"]
    tuned += ["trainer.adam_beta1", "trainer.lr_scheduler_kwargs", "trainer.dataloader_num_workers", "data.train_on"]
    tunes = draw.random() < 0.3
    field = draw.choice([*tuned, "data.seq_len", "seed", "evaluation.windows"] if tunes else fields)
    if draw.random() < 0.2:
        odd = ("." * 5, "a" + ".a" * 5000, f"{field}.x", f"{field}..x", "", f"{field} ", field.upper(), "seed.\x1b[2J")
        field = draw.choice((*odd, f"default:{field}", "²", "method", "search", "\udcff", field + "=", "__class__"))
    value = draw.choice(YAMLS) if draw.random() < 0.5 else as_json(draw.choice(STRANGE))
    # The system takes no words with a zero, and hands on what is no UTF-8 like this.
    word = f"{field}={value}".replace("\x00", "\udc80")
    model = str(inputs.folder / "models" / "llama")
    if tunes:
        return Trial(word[:120], lambda: _tune_set(model, inputs.text, word, place))
    common = ["--calibration", inputs.text, "--seq-len", "16"]
    preset = ["--preset", draw.choice(("default", "default", "bolaco-5x1", "chop", "lpaf"))]
    return Trial(word[:120], ["compress", model, "--keep", "0.7", *common, *preset, "--dry-run", "--set", word])


def _tune_set(model: str, data: str, word: str, place: Path) -> None:
    """The settings of a tuning run with a word of ``--set``, up to the Trainer's."""
    from bolaco.commands.words import settings_given
    from bolaco.tune.mode import MODES
    from bolaco.tune.resolve import resolve
    from bolaco.tune.settings import make_settings
    from bolaco.tune.trainer import training_arguments

    words = {"mode": "factors", "data": data, "seq_len": 16, "batch": 1}
    settings, _ = resolve(make_settings(model, words, settings_given([word])), MODES.get("factors"))
    training_arguments(settings, 1, place / "checkpoints", torch.device("cpu"))


def _questions(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    name = draw.choice(("questions.jsonl", "texts.jsonl"))
    said, file = _changed_row(inputs.folder / name, place, draw)
    llama = str(inputs.folder / "models" / "llama")
    if name == "questions.jsonl":
        return Trial(said, lambda: api.read_tasks(str(file)))
    return Trial(said, ["eval", llama, "--data", str(file), "--seq-len", "16", "--limit", "2"])


def _instructions(inputs: Inputs, place: Path, draw: random.Random) -> Trial:
    from bolaco.tune.data import prepare_data
    from bolaco.tune.settings import make_settings

    said, file = _changed_row(inputs.folder / "instructions.jsonl", place, draw)
    llama = str(inputs.folder / "models" / "llama")
    settings = make_settings(llama, {"mode": "factors", "data": str(file), "seq_len": 16}, {"evaluation.windows": 1})
    return Trial(said, lambda: prepare_data(settings, load_tokenizer(llama), load_config(llama)))


def _changed_row(source: Path, place: Path, draw: random.Random) -> tuple[str, Path]:
    file = place / source.name
    shutil.copy(source, file)
    rows = source.read_text(encoding="utf-8").splitlines()
    if draw.random() < 0.3:
        data, said = damaged(file.read_bytes(), draw)
    else:
        number = draw.randrange(len(rows))
        row, said = mutated([json.loads(rows[number])], draw)
        rows[number] = " ".join(as_json(row[0] if row else None).splitlines())
        data, said = "\n".join(rows).encode("utf-8", "surrogatepass"), f"line {number + 1}: {said}"
    return replace(file, data, said), file


CLASSES: dict[str, Callable[[Inputs, Path, random.Random], Trial]] = {
    "bolaco.json": _info,
    "set": _set,
    "recipe": _recipe,
    "results.json": _results,
    "curves.json": _curves,
    "lowrank": _lowrank,
    "config.json": _config,
    "model config": _model_config,
    "weights": _weights,
    "adapter": _adapter,
    "delta": _delta,
    "questions": _questions,
    "index": _index,
    "tokenizer": _tokenizer_files,
    "instructions": _instructions,
}


# --- trying them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a mutation came to; ``trial`` is what was done, ``command`` what read it, ``output`` what that said."""

    kind: str
    trial: str
    command: str
    output: str
    seconds: float


def tried(inputs: Inputs, name: str, number: int, seed: int = 0, limit: float = SECONDS) -> Outcome:
    """One mutation, in a process of its own."""
    draw = random.Random(f"{seed}/{name}/{number}")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=inputs.folder) as folder:
        place = Path(folder)
        trial = CLASSES[name](inputs, place, draw)
        before = psutil.Process().memory_info()
        start, said = time.monotonic(), place / "said"
        child = os.fork()
        if child == 0:
            _child(trial.command, said, before.vms + 3 * MEMORY)
        status, largest = _waited(child, limit)
        seconds = time.monotonic() - start
        output = said.read_text(encoding="utf-8", errors="replace")
        kind = _kind(status, output, largest - before.rss > MEMORY)
        words = " ".join(trial.command) if isinstance(trial.command, Sequence) else "a call"
        return Outcome(kind, trial.said, words[:400], output, seconds)


def _child(command: Sequence[str] | Callable[[], object], said: Path, memory: int) -> None:
    """Runs the command with its output in a file, and ends the process."""
    code = 70
    try:
        os.setsid()
        file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - until the end
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (GIB // 4, GIB // 4))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        # A process in this one: what it would start has no limits.
        from bolaco.evaluation import speed

        speed.measure_apart = speed.measure  # type: ignore[assignment]
        code = bolaco(command) if isinstance(command, Sequence) else _called(command)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:  # noqa: BLE001 - that is what is looked for
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _called(call: Callable[[], object]) -> int:
    """As the command line has it."""
    try:
        call()
    except BolacoError as error:
        print(f"bolaco: error: {printable(' '.join(str(error).splitlines()))}", file=sys.stderr)
        return 1
    return 0


def _waited(child: int, limit: float) -> tuple[int | None, int]:
    """The status of a process, None if it did not end in time, and the largest memory it had."""
    handle = os.pidfd_open(child)
    try:
        ended = bool(select.select([handle], [], [], limit)[0])
    finally:
        os.close(handle)
    if not ended:
        os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return (os.waitstatus_to_exitcode(status) if ended else None), usage.ru_maxrss * 1024


def _kind(status: int | None, output: str, much: bool) -> str:
    if status is None:
        return "hang"
    if much or "not enough memory" in output or "MemoryError" in output:
        return "memory"
    if "Traceback (most recent call last)" in output or status not in (0, 1, 2):
        return "traceback"
    errors = [line for line in output.splitlines() if line.startswith("bolaco: error: ")]
    if status == 0:
        return "fine"
    if status == 2:  # argparse says how it is used before
        return "one line" if "error: " in output else "traceback"
    # Whatever was said before, the error is one line and the last one.
    return "one line" if len(errors) == 1 and output.rstrip("\n").splitlines()[-1:] == errors else "traceback"


def shares(count: int | None, only: str | None) -> dict[str, int]:
    """How many mutations of each class there are in ``count``."""
    counts = {name: COUNTS[name] for name in ([only] if only else COUNTS)}
    if count is None:
        return counts
    return {name: max(1, round(count * of / sum(counts.values()))) for name, of in counts.items()}


def table(found: Mapping[str, Counter[str]]) -> Iterator[str]:
    """A table of outcomes by class, in Markdown."""
    yield "| input | mutations | " + " | ".join(OUTCOMES) + " |"
    yield "|---|---:|" + "---:|" * len(OUTCOMES)
    for name, counts in (*found.items(), ("all", sum(found.values(), Counter()))):
        yield f"| {name} | {sum(counts.values()):,} | " + " | ".join(f"{counts[kind]:,}" for kind in OUTCOMES) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, metavar="N", help="mutations in all; a class has its share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(CLASSES), metavar="CLASS", help=f"one of {', '.join(CLASSES)}")
    parser.add_argument("--number", type=int, metavar="N", help="this mutation of the class only; prints what it said")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="a mutation may take (20)")
    args = parser.parse_args()
    if args.number is not None and args.only is None:
        parser.error("--number needs --only: the class it is of")
    torch.set_num_threads(1)
    os.environ |= {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # what is no folder is looked for nowhere
    disable_progress_bar()
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="bolaco-fuzz-") as folder:
        inputs = make_inputs(Path(folder))
        for name, count in shares(args.count, args.only).items():
            found[name] = Counter()
            for number in range(count) if args.number is None else [args.number]:
                outcome = tried(inputs, name, number, args.seed, args.seconds)
                found[name][outcome.kind] += 1
                if outcome.kind in FAULTS or args.number is not None:
                    again = f"--seed {args.seed} --only '{name}' --number {number}"
                    last = (outcome.output.strip().splitlines() or [""])[-1][:200]
                    print(f"{outcome.kind}: {again}: {outcome.trial[:200]!r}: {last}", flush=True)
                if args.number is not None:
                    print(f"{outcome.command}\n{outcome.output}", flush=True)
    print("\n".join(table(found)))
    return int(any(counts[kind] for counts in found.values() for kind in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
