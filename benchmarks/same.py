"""Whether two commits give the same results, bit for bit: ranks, tensors and perplexities of small runs.

    python benchmarks/same.py BEFORE AFTER               two git revisions, in worktrees that are removed afterwards
    python benchmarks/same.py run SRC OUT [--cases A,B]  every case with the source folder SRC, into OUT/<case>
    python benchmarks/same.py diff OUT1 OUT2             compares what two such runs wrote

All cases but `smollm2` and `demo` are on tiny random models built here; these two need `make .venv/.model` and take
minutes.
The status is 1 if anything differs or a run failed. Everything is computed on the CPU in one thread: with more of them
sums are rounded in another order.
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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
VOCABULARY, POSITIONS = 1024, 128
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "phi3": _SIZES | {"original_max_position_embeddings": POSITIONS},
    "gpt2": {"n_embd": 64, "n_inner": 128, "n_layer": 4, "n_head": 4, "n_positions": POSITIONS},
}


@dataclass(frozen=True)
class Case:
    """A command, without its output folder, and the cases whose results it reads."""

    words: tuple[str, ...]
    needs: tuple[str, ...] = ()


def _sets(values: Mapping[str, object]) -> list[str]:
    return [word for field, value in values.items() for word in ("--set", f"{field}={value}")]


_TEXT = {
    "calibration.sequences": 16,
    "calibration.gradient_sequences": 8,
    "refinement.sequences": 8,
    "search.rank_multiple": 4,
    "evaluation.windows": 8,
}
_SEARCH = {"search.initial": 2, "validation.candidates": 8, "validation.sequences": 4, "validation.allocations": 2}


def _compress(*words: str, model: str = "llama", keep: float = 0.7, fields: Mapping[str, object] | None = None) -> Case:
    """``fields`` are laid over those of all cases; one that is None is left out."""
    given = {name: value for name, value in (_TEXT | dict(fields or {})).items() if value is not None}
    head = ("compress", f"models/{model}", "--keep", str(keep), "--calibration", "pydoc", "--seq-len", "64")
    return Case((*head, *words, *_sets(given)))


def _search(*words: str, needs: tuple[str, ...] = ()) -> Case:
    return Case(_compress(*words, "--trials", "6", fields=_SEARCH).words, needs)


def _tune(mode: str, model: str, **options: object) -> Case:
    fields = {"evaluation.windows": 4, "training.warmup": 0} | {f"options.{k}": v for k, v in options.items()}
    text = ("--data", "pydoc", "--seq-len", "64", "--batch", "4", "--max-steps", "5")
    return Case(("tune", model, "--mode", mode, *text, *_sets(fields)), (model,))


_THREE_STEPS = {"refinement.steps": 3}
# A transform factors nothing: it has neither ranks nor a refinement.
_NO_FACTORS = dict.fromkeys(("search.rank_multiple", "refinement.sequences"))
CASES: dict[str, Case] = {
    "default": _compress(fields=_THREE_STEPS),
    # With this seed the best allocation is not the hand allocation, which a search tries first in any case.
    "search": _search("--preset", "bolaco-5x1", "--seed", "3"),
    "search-5x4": _search("--preset", "bolaco-5x4"),
    "warm-start": _search("--preset", "bolaco-5x1", "--warm-start", "search", needs=("search",)),
    "hand": _compress("--search", "hand", fields={"refinement.steps": 0}),
    "uniform": _compress(
        *("--search", "uniform", "--method", "afm", "--storage", "two-factor"), fields={"refinement.steps": 0}
    ),
    "lpaf": _compress("--preset", "lpaf", fields={"method.steps": 8, "method.keep_sparse": "true"}),
    "chop": _compress("--preset", "chop", keep=0.5, fields=_NO_FACTORS | {"method.pattern": "max-gap"}),
    "welore": _compress("--preset", "welore"),
    "joint": _compress("--preset", "joint"),
    "joint-afm": _compress("--preset", "joint", "--method", "afm"),
    "aa-svd": _compress("--preset", "aa-svd", fields=_THREE_STEPS),
    "mpifa": _compress("--preset", "mpifa"),
    "asvd": _compress("--preset", "asvd"),
    "fwsvd": _compress("--preset", "fwsvd"),
    "gpt2": _compress(model="gpt2", fields=_THREE_STEPS),
    "phi3": _compress(model="phi3", fields=_THREE_STEPS),
    "compare": Case(
        (
            *("compare", "models/llama", "--methods", "default,kfac-svd,svd-llm", "--keep", "0.8,0.6"),
            *("--calibration", "pydoc", "--seq-len", "64", "--keep-models"),
            # Steps of one method only: given for all, they would refine the others too.
            *_sets(_TEXT | {"default:refinement.steps": 3}),
        )
    ),
    "tune-factors": _tune("factors", "default"),
    "tune-diagonal": _tune("diagonal", "default"),
    "tune-lora": _tune("lora", "default"),
    "tune-tt-lora": _tune("tt-lora", "default"),
    "tune-continued": _tune("continued", "default"),
    "tune-sketch": _tune("sketch", "default", sequences=16),
    "tune-mixed": _tune("mixed-rank", "lpaf"),
    # As in the Makefile, with fewer steps.
    # The demo's model on little text: minutes instead of a quarter of an hour.
    "smollm2": Case(
        (
            *("compress", "smollm2-135m", "--keep", "0.8", "--calibration", "pydoc", "--seq-len", "128"),
            *_sets(
                {
                    "calibration.sequences": 4,
                    "calibration.gradient_sequences": 2,
                    "refinement.steps": 1,
                    "refinement.sequences": 2,
                    "evaluation.windows": 2,
                }
            ),
        )
    ),
    "demo": Case(
        (
            *("compress", "smollm2-135m", "--keep", "0.8", "--calibration", "pydoc", "--seq-len", "512"),
            *_sets(
                {
                    "calibration.sequences": 32,
                    "calibration.gradient_sequences": 16,
                    "refinement.steps": 2,
                    "refinement.sequences": 16,
                    "evaluation.windows": 12,
                }
            ),
        )
    ),
}

# What the command line called these before `recipe` was a package.
_BEFORE = {
    "lpaf": {"method.": "pruning."},
    "chop": {"method.": "chop."},
    "hand": {"hand": "none"},
}


def words_for(src: Path, name: str) -> list[str]:
    """A case's command in the words that this source understands."""
    words = list(CASES[name].words)
    if (src / "bolaco" / "recipe.py").is_file():
        for new, old in _BEFORE.get(name, {}).items():
            words = [old + word.removeprefix(new) if word.startswith(new) else word for word in words]
    return words


def write_models(folder: Path) -> None:
    """The tiny models, with a tokenizer of the most frequent words of pydoc's text; the same every time."""
    cut, lower = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    counts: Counter[str] = Counter()
    for text in topics.values():
        counts.update(word for word, _ in cut.pre_tokenize_str(lower.normalize_str(text)))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - len(SPECIAL)]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *frequent])}, unk_token=SPECIAL[0]))
    words.normalizer, words.pre_tokenizer = lower, cut
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=POSITIONS, **names)
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    for seed, (kind, sizes) in enumerate(MODELS.items()):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(sizes | ids)), dtype=torch.float32)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                noise = torch.randn(parameter.shape, generator=draw)
                if parameter.ndim == 1:  # biases and norms count too: away from zero and one
                    parameter.add_(0.3 * noise)
                else:
                    parameter.copy_(noise / sizes.get("hidden_size", sizes.get("n_embd")) ** 0.5)
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)


def chosen(cases: str | None) -> list[str]:
    names = list(CASES) if cases is None else cases.split(",")
    for name in names:
        if name not in CASES:
            raise SystemExit(f"no case {name!r}; there is {', '.join(CASES)}")
    return names


def run(src: Path, out: Path, names: Sequence[str]) -> list[str]:
    """Runs cases, and those they need that are not there; returns the names of those that failed."""
    src, out = src.resolve(), out.resolve()
    # The GPU, if there is one, and the hub would only add ways to differ.
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = str(src)
    out.mkdir(parents=True, exist_ok=True)
    where = [sys.executable, "-c", "import bolaco; print(bolaco.__file__)"]
    found = subprocess.run(where, env=env, cwd=out, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).resolve().is_relative_to(src):
        raise SystemExit(f"{src}: bolaco would be imported from {found}")
    logs = out / "logs"
    logs.mkdir(exist_ok=True)
    if not (out / "models").is_dir():
        write_models(out / "models")
    wanted = dict.fromkeys(
        need for name in names for need in (*CASES[name].needs, name) if need in names or not (out / need).is_dir()
    )
    failed = []
    for name in wanted:
        for folder in (out / name, out / f"{name}.work"):
            shutil.rmtree(folder, ignore_errors=True)
        # Names in commands are relative: they are written into results, which must not depend on where OUT is.
        command = [sys.executable, "-m", "bolaco.cli", *words_for(src, name), "-o", name]
        start = time.perf_counter()
        with (logs / f"{name}.txt").open("w", encoding="utf-8") as log:
            status = subprocess.run(command, env=env, cwd=out, stdout=log, stderr=subprocess.STDOUT).returncode
        failed += [name] if status else []
        said = (logs / f"{name}.txt").read_text(encoding="utf-8").splitlines() if status else []
        note = f", FAILED with status {status}: {said[-1] if said else 'it said nothing'}" if status else ""
        print(f"{name}: {time.perf_counter() - start:.1f} s{note}", flush=True)
    return failed


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors beneath a folder by name; how a model's are spread over its files does not matter."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        where = file.parent if file.name.startswith("model") else file
        prefix = "" if where == folder else f"{where.relative_to(folder).as_posix()}:"
        found.update({prefix + name: tensor for name, tensor in load_file(file).items()})
    return found


def _identical(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: NaN is NaN, and zero has a sign."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ranks and perplexities (of a search also the objective of every trial) by name; of every row of a comparison."""
    if (folder / "results.json").is_file():
        record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        ranks = {f"{row['name']}:{site}": rank for row in record["rows"] for site, rank in row["ranks"].items()}
        perplexities = {row["name"]: row["perplexity"] for row in record["rows"]}
        return ranks, perplexities | {"dense": record["dense"]["perplexity"]}
    info = json.loads((folder / "bolaco.json").read_text(encoding="utf-8"))
    perplexities = {name: info["perplexity"][name] for name in ("dense", "compressed")}
    perplexities |= {f"trial {i}": trial["objective"] for i, trial in enumerate(info["trials"])}
    if info.get("tuning"):
        perplexities |= {f"tuning {name}": info["tuning"]["perplexity"][name] for name in ("before", "after")}
    # A transform has no ranks; what it leaves are blocks.
    return info["ranks"] or {"layers": info["layers"]}, perplexities


def _values(a: Mapping[str, Any], b: Mapping[str, Any], unit: str) -> str:
    different = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    if not different:
        return f"{len(a)} equal" if a else "none"
    first = different[0]
    return f"{len(different)} of {len(a.keys() | b.keys())} {unit} DIFFER: {first} {a.get(first)} -> {b.get(first)}"


def _tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str:
    only = sorted(a.keys() ^ b.keys())
    if only:
        return f"{len(only)} in one only, DIFFER: {only[0]} {'before' if only[0] in a else 'after'}"
    different = [name for name in a if not _identical(a[name], b[name])]
    if not different:
        return f"{len(a)} equal"
    note = f"{len(different)} of {len(a)} tensors DIFFER: {different[0]}"
    left, right = a[different[0]], b[different[0]]
    if left.dtype != right.dtype or left.shape != right.shape:
        return f"{note} {left.dtype} {list(left.shape)} -> {right.dtype} {list(right.shape)}"
    return f"{note} by up to {(left.double() - right.double()).abs().max().item():.3g}"


def diff(before: Path, after: Path, cases: str | None = None) -> bool:
    """Prints what is equal; returns whether everything is."""
    finished = {
        name: [
            any((out / name / file).is_file() for file in ("bolaco.json", "results.json")) for out in (before, after)
        ]
        for name in chosen(cases)
    }
    rows: list[list[str]] = []
    for name, there in finished.items():
        if all(there):
            (ranks, perplexities), (other_ranks, other_perplexities) = results(before / name), results(after / name)
            cells = [
                _values(ranks, other_ranks, "ranks"),
                _tensors(tensors(before / name), tensors(after / name)),
                _values(perplexities, other_perplexities, "perplexities"),
            ]
            rows.append([name, *cells])
        elif any(there) or cases is not None:
            # A case that failed in both is in neither; one that was not asked for is not missed.
            missing = " and ".join(str(out) for out, found in zip((before, after), there, strict=True) if not found)
            rows.append([name, *[f"DIFFER: not in {missing}"] * 3])
    if not rows:
        raise SystemExit(f"{before} and {after}: no results in them")
    print("| case | ranks | tensors | perplexity |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    return not any("DIFFER" in cell for row in rows for cell in row)


def revisions(before: str, after: str, cases: str | None) -> bool:
    """Runs the cases at two revisions of this repository and compares."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    failed = []
    with tempfile.TemporaryDirectory(prefix="bolaco-same-") as folder:
        outs = []
        for side, revision in (("before", before), ("after", after)):
            tree, out = Path(folder) / f"tree-{side}", Path(folder) / side
            subprocess.run([*git, "worktree", "add", "-q", "--detach", str(tree), revision], check=True)
            try:
                print(f"{side}: {revision}", flush=True)
                failed += run(tree / "src", out, chosen(cases))
            finally:
                subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
            outs.append(out)
        return diff(*outs, cases) and not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="WORD", help="BEFORE AFTER, run SRC OUT, or diff OUT1 OUT2")
    parser.add_argument("--cases", metavar="NAMES", help=f"with commas between (all): {', '.join(CASES)}")
    args = parser.parse_args()
    match args.words:
        case ["run", src, out]:
            return int(bool(run(Path(src), Path(out), chosen(args.cases))))
        case ["diff", before, after]:
            return int(not diff(Path(before), Path(after), args.cases))
        case [before, after]:
            return int(not revisions(before, after, args.cases))
    parser.error("expected BEFORE AFTER, run SRC OUT, or diff OUT1 OUT2")


if __name__ == "__main__":
    sys.exit(main())
