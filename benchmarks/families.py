"""Every causal-LM type of transformers, end to end: docs/families.md.

    python benchmarks/families.py                     all types; with --write into docs/families.md
    python benchmarks/families.py --types llama,falcon --out FOLDER     some types; prints the table

Each type's default configuration is shrunk to a tiny random model (benchmarks/tiny.py). Of each one: a plain SVD and
the default method at keep 0.7, and keep 1.0; the folders are loaded in fresh processes, with bolaco and (with
trust_remote_code) where it cannot be imported. What is checked is in `CHECKS`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

KEEP = 0.7
METHODS = ("svd", "kfac")
CHECKS = {
    "same": "keep 1.0 gives the original's logits",
    "budget": "keep 0.7 is kept",
    "logits": "a fresh process computes the same logits, bit for bit",
    "remote": "so does one without bolaco, by trust_remote_code",
    "generation": "greedy tokens with a cache are those without",
}
# What is known of types that do not work, where the error does not say it. Those of benchmarks/tiny.py come on top.
FACTS = {
    "emu3": "transformers cannot load a checkpoint of its text half",
    "mllama": "transformers cannot load a checkpoint of its text half",
    "prophetnet": "logits of a position depend on the length of the sequence",
    "reformer": "refuses to differentiate outside training mode",
    "rwkv": "divides its own weights while it runs (rescale_every)",
}
SHARDS = 2
_PAGE = """# Types of models

Printed by `python benchmarks/families.py --write`. Every causal-LM type of transformers, each as a tiny random model of
its default configuration with every kind of layer in it. "Works" means, for a plain SVD and for the default method:

{checks}

Generation is compared where transformers' own model gives the same tokens with a cache and without. "Share" is that of
the decoder blocks' parameters which can be factored; the rest is dense by nature (routers, convolutions, state spaces)
or not called on text alone (cross-attention, vision). "Hooks" means that blocks cannot be run one by one: statistics
come from whole forward passes, and blocks are not refined.

{head}

{table}
"""


def tokenizer() -> PreTrainedTokenizerFast:
    from tiny import VOCABULARY

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {str(i): i for i in range(4, VOCABULARY)}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def text(folder: Path) -> Path:
    """A text with some structure: each word depends on the one before."""
    from tiny import VOCABULARY

    file = folder / "text.txt"
    if not file.exists():
        generator = torch.Generator().manual_seed(0)
        steps = torch.randint(1, 6, (6000,), generator=generator).cumsum(0) % (VOCABULARY - 8) + 4
        file.write_text(" ".join(map(str, steps.tolist())), encoding="utf-8")
    return file


def _cached(model: Any, tokens: torch.Tensor) -> bool:
    """Whether greedy generation with a cache gives the tokens of one without."""
    from tiny import generates

    try:
        return bool(generates(model, tokens)[0])
    except Exception:  # noqa: BLE001 - some families cannot generate in transformers itself
        return False


def examine(model_type: str, folder: Path) -> dict[str, Any]:
    """Compresses one type and writes its folders; returns what is known before fresh processes look at them."""
    import bolaco
    from bolaco.models.experts import unfused
    from bolaco.models.find import inspect_structure
    from bolaco.models.observe import observed
    from tiny import experts, tiny_model, token_batch

    start = time.perf_counter()
    model = tiny_model(model_type)
    working = unfused(model)
    structure = observed(working, inspect_structure(working))
    row: dict[str, Any] = {
        "share": sum(site.size for site in structure.sites) / structure.size,
        "walk": structure.walk.hooks,
        "experts": "" if experts(model) == "-" else experts(model),
        "checks": {},
    }
    tokens = token_batch()
    with torch.no_grad():
        original = model(input_ids=tokens, use_cache=False).logits
    cached = _cached(model, tokens)
    options = {
        "calibration.seq_len": 32,
        "calibration.sequences": 8,
        "calibration.gradient_sequences": 4,
        "evaluation.windows": 2,
        "validation.sequences": 4,
    }
    checks = row["checks"]
    for method, keep in (("svd", 1.0), *((method, KEEP) for method in METHODS)):
        out = folder / model_type / f"{method}-{keep}"
        more = {"refinement.steps": 2, "refinement.sequences": 4} if method == "kfac" else {"refinement.steps": 0}
        result = bolaco.compress(
            model,
            keep,
            out,
            tokenizer=tokenizer(),
            preset="default",
            method=method,
            calibration=str(text(folder)),
            options=options | more,
        )
        loaded = bolaco.load(str(out))
        with torch.no_grad():
            logits = loaded(input_ids=tokens, use_cache=False).logits
        if keep == 1.0:
            error = float((logits - original).abs().max() / original.abs().max())
            checks["same"] = error < 1e-5
            continue
        save_file({"tokens": tokens, "logits": logits.contiguous()}, out / "expected.safetensors")
        checks["budget"] = checks.get("budget", True) and result.info.keep_linears <= KEEP
        row[f"perplexity {method}"] = result.info.perplexity.compressed
        if cached:
            checks["generation"] = checks.get("generation", True) and _cached(loaded, tokens)
    row["seconds"] = time.perf_counter() - start
    return row


def work(types: Sequence[str], folder: Path) -> None:
    """Examines some types; a file of results for each."""
    for name in types:
        try:
            row = examine(name, folder)
        except Exception as error:  # noqa: BLE001 - the table says what went wrong
            row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            (folder / f"{name}.trace").write_text(traceback.format_exc(), encoding="utf-8")
        (folder / f"{name}.json").write_text(json.dumps(row), encoding="utf-8")
        print(name, row.get("error") or {k: v for k, v in row["checks"].items() if not v} or "ok", flush=True)


def look(types: Sequence[str], folder: Path, remote: bool) -> None:
    """In a fresh process: loads what was written and compares logits."""
    if remote:
        sys.modules["bolaco"] = None  # type: ignore[assignment]
    else:
        import bolaco  # noqa: F401
    from transformers import AutoModelForCausalLM

    found: dict[str, Any] = {}
    for name in types:
        for out in sorted((folder / name).glob(f"*-{KEEP}")):
            try:
                model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=remote).eval()
                expected = load_file(out / "expected.safetensors")
                with torch.no_grad():
                    logits = model(input_ids=expected["tokens"], use_cache=False).logits
                found[name] = found.get(name, True) and bool(torch.equal(logits, expected["logits"]))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is printed
                found[name] = False
                print(name, out.name, "remote" if remote else "local", type(error).__name__, str(error)[:300])
    (folder / f"look-{'remote' if remote else 'local'}-{types[0]}.json").write_text(json.dumps(found))


def run(types: Sequence[str], folder: Path) -> dict[str, dict[str, Any]]:
    """All checks of these types."""
    shards = [shard for shard in (types[i::SHARDS] for i in range(SHARDS)) if shard]

    def each(*words: str) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--out", str(folder), *words, "--types"]
        for process in [subprocess.Popen([*command, ",".join(shard)]) for shard in shards]:
            process.wait()

    each("--worker", "examine")
    each("--worker", "local")
    each("--worker", "remote")
    rows = {name: json.loads((folder / f"{name}.json").read_text()) for name in types}
    for key, kind in (("logits", "local"), ("remote", "remote")):
        for file in folder.glob(f"look-{kind}-*.json"):
            for name, good in json.loads(file.read_text()).items():
                if "checks" in rows[name]:
                    rows[name]["checks"][key] = good
    return rows


def works(row: dict[str, Any]) -> bool:
    return "checks" in row and all(row["checks"].values()) and {"logits", "remote"} <= row["checks"].keys()


def table(rows: dict[str, dict[str, Any]]) -> str:
    from tiny import NOT_DECODERS

    lines = ["| type | share of the decoder compressed | walk | experts | works |", "|---|---:|---|---|---|"]
    for name, row in sorted(rows.items()):
        if "error" in row:
            lines.append(f"| {name} | | | | {(NOT_DECODERS | FACTS).get(name, row['error'])} |")
            continue
        failed = [CHECKS[key] for key, good in row["checks"].items() if not good]
        why = "yes" if works(row) else "no: not " + "; not ".join(failed)
        walk = f"hooks: {row['walk']}" if row["walk"] else "blocks"
        lines.append(f"| {name} | {row['share']:.3f} | {walk} | {row['experts'] or ''} | {why} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="model types, with commas between (all)")
    parser.add_argument("--out", type=Path, help="folder of the results, which is kept")
    parser.add_argument("--write", action="store_true", help="write docs/families.md")
    parser.add_argument("--worker", choices=("examine", "local", "remote"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from tiny import types as all_types

    types = args.types.split(",") if args.types else all_types()
    if args.worker == "examine":
        return work(types, args.out)
    if args.worker:
        return look(types, args.out, args.worker == "remote")
    folder = args.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = run(types, folder)
    good = [name for name in rows if works(rows[name])]
    mixed = [name for name in rows if rows[name].get("experts")]
    head = f"{len(good)} of {len(rows)} types work; of {len(mixed)} with experts {len(set(good) & set(mixed))}."
    print(table(rows), head, f"{time.perf_counter() - start:.0f} s", sep="\n\n")
    if args.write:
        page = _PAGE.format(head=head, table=table(rows), checks="\n".join(f"- {what}" for what in CHECKS.values()))
        (HERE.parent / "docs" / "families.md").write_text(page, encoding="utf-8")
    if args.out is None:
        shutil.rmtree(folder)
    return None


if __name__ == "__main__":
    main()
