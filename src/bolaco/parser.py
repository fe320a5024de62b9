"""The words of the command line: commands, their options and their help. Nothing heavy is imported."""

from __future__ import annotations

import argparse

from bolaco.recipe.presets import OPTIMIZED, PRESETS
from bolaco.recipe.words import COMPARED, DTYPES, SIZES, WORDS
from bolaco.version import __version__

_EXAMPLES = """
examples:
  bolaco compress smollm2-135m --keep 0.8 --calibration pydoc -o small
  bolaco compress smollm2-135m --target-size 200MB --calibration pydoc -o small
  bolaco compress ./my-finetune --keep 0.9,0.8,0.7 --calibration text/ -o sizes
  bolaco compress Qwen/Qwen3-0.6B --keep 0.8 --calibration c4.jsonl --search 5x4 --trials 50 -o small
  bolaco compress ./my-finetune --keep 0.8 --calibration text/ --search 5x1 --warm-start ./base --trials 20 -o small
  bolaco compress meta-llama/Llama-2-7b-hf --keep 0.8 --preset paper -o small
  bolaco compress meta-llama/Llama-2-7b-hf --keep 0.8 --method svd-llm --calibration c4.jsonl -o small
  bolaco eval small --data wikitext.txt --seq-len 1024 --json result.json
  bolaco eval small --tasks piqa,arc_easy,my-questions.jsonl --task-limit 500
  bolaco tune small --mode factors --data c4.jsonl[1000:] --distill 1 --max-steps 500 -o tuned
  bolaco compress smollm2-135m --method lpaf --keep 0.5 --calibration c4.jsonl --tune mixed-rank -o pruned-and-tuned
  bolaco compare smollm2-135m --methods default,kfac-svd,svd-llm --keep 0.9,0.8 --calibration c4.jsonl \
    --eval wikitext.txt -o compared
  bolaco generate-text smollm2-135m --sequences 200 -o own.jsonl
  bolaco distill smollm2-135m --task labelled.jsonl -o tiny
  bolaco distill predict tiny --data texts.jsonl -o answers.jsonl
  bolaco bench meta-llama/Llama-2-7b-hf small
  bolaco inspect small
  bolaco export small --dense -o stock
  bolaco export small --onnx -o onnx
  bolaco delta ./base ./my-finetune --ratio 1/16 --calibration c4.jsonl -o delta
  bolaco delta apply delta -o merged

MODEL is a hub id, a local folder, a .gguf file or the alias smollm2-135m.
SRC is a .txt, .jsonl or .parquet file, a folder of them, a hub data set (id, id:config or id:config:split), or pydoc
(the text of Python's own documentation); SRC[:1000] takes the first thousand documents, SRC[1000:] the others. A .txt
file is one document; of the others each row is one. --calibration self is what the model writes itself.
An interrupted run continues when the same command is given again.
"""


# Those that completion is made for.
SHELLS = ("bash", "zsh", "fish")
DISTILL_STAGES = ("prompt", "reinforce", "store", "student", "predict")


def command_parser() -> argparse.ArgumentParser:
    """The parser of ``bolaco``; each command is in ``args.command``."""
    parser = argparse.ArgumentParser(
        prog="bolaco",
        description="Low-rank compression of large language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bolaco {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    compress = commands.add_parser("compress", help="compress a model")
    compress.add_argument("model", metavar="MODEL")
    # Exactly one of these.
    sizes = compress.add_mutually_exclusive_group(required=True)
    sizes.add_argument(
        "--keep",
        type=_ratios,
        metavar="RATIO,..",
        help=f"{WORDS['keep'].help}; several, with commas between, are a folder each in OUT",
    )
    _words(sizes, *(name for name in SIZES if name != "keep"))
    _words(compress, *(name for name in WORDS if name not in SIZES))
    compress.add_argument(
        "--preset",
        type=_preset,
        choices=tuple(PRESETS),
        help="a whole recipe: ours (default), or a published one; paper: all settings of arXiv 2405.10616",
    )
    compress.add_argument(
        "--optimize",
        choices=tuple(OPTIMIZED),
        help="what matters at the same bytes: size (least loss, the default), or speed (two factors, which lose more)",
    )
    _settings(compress, "any field of the recipe, such as refinement.steps=5")
    compress.add_argument("--print-recipe", action="store_true", help="print the recipe as YAML and stop")
    _folders(compress, required=False)
    _dry_run(compress)
    _result(compress)

    compare = commands.add_parser("compare", help="several methods at several sizes, side by side")
    compare.add_argument("model", metavar="MODEL")
    compare.add_argument(
        "--methods",
        required=True,
        metavar="NAMES",
        help="presets, or methods (in two factors, one ratio for all matrices), with commas between",
    )
    ratios = compare.add_mutually_exclusive_group(required=True)
    ratios.add_argument("--keep", metavar="RATIOS", help="keep ratios, with commas between")
    ratios.add_argument("--keep-model", type=_ratios, metavar="RATIOS", help="the same, as shares of all parameters")
    ratios.add_argument("--target-size", metavar="BYTES,..", help="the same, as bytes of all weights, such as 300MB")
    _words(compare, *COMPARED)
    compare.add_argument(
        "--eval", metavar="SRC,..", dest="evaluation", help="texts of the table, with commas between; headline first"
    )
    compare.add_argument("--tasks", metavar="NAMES", help="accuracy on tasks too, as for `bolaco eval`")
    compare.add_argument("--task-limit", type=int, metavar="N", help="the first so many examples of each task only")
    compare.add_argument("--task-keep", type=float, metavar="RATIO", help="keep ratio tasks are run at (the first)")
    _settings(compare, "any field of all recipes, or of one method: aa-svd:refinement.steps=20")
    compare.add_argument(
        "--quantized",
        default="int8,int6,int4,int3",
        metavar="NAMES",
        help="rows of the original in few bits, rounded to nearest (int8,int6,int4,int3); none leaves them out",
    )
    compare.add_argument("--keep-models", action="store_true", help="keep the checkpoints, in OUT/models")
    _folders(compare)

    run = commands.add_parser("run", help="compress as a recipe file says")
    run.add_argument("recipe", metavar="RECIPE.yaml")
    _folders(run, required=False)
    _dry_run(run)
    _result(run)

    evaluate = commands.add_parser("eval", help="perplexity of a model, and its accuracy on tasks")
    evaluate.add_argument("model", metavar="MODEL")
    evaluate.add_argument("--data", metavar="SRC", help="text to measure perplexity on")
    evaluate.add_argument("--text-column", metavar="NAME", help=WORDS["text_column"].help)
    evaluate.add_argument(
        "--tasks",
        metavar="NAMES",
        help="tasks of lm-evaluation-harness, .jsonl files of questions or continuations and folders of them",
    )
    evaluate.add_argument("--seq-len", type=int, default=1024, help="length of the windows of --data (1024)")
    evaluate.add_argument("--limit", type=int, metavar="WINDOWS", help="the first so many windows of --data only")
    evaluate.add_argument("--task-limit", type=int, metavar="N", help="the first so many examples of each task only")
    evaluate.add_argument("--batch", type=int, metavar="N", help="sequences at once (4 windows, 8 answers)")
    _json_file(evaluate)
    _placement(evaluate)
    evaluate.add_argument(
        "--bos", choices=("auto", "text", "window"), default="auto", help="where BOS tokens go in --data (auto)"
    )

    tune = commands.add_parser("tune", help="train a compressed model, or a part of it")
    tune.add_argument("model", metavar="MODEL", help="a compressed folder, or any model")
    tune.add_argument("--mode", required=True, help="what is trained, one of `bolaco methods`")
    tune.add_argument("--data", metavar="SRC", help="text, or a .jsonl file of instructions and responses")
    tune.add_argument("--text-column", metavar="NAME", help=WORDS["text_column"].help)
    tune.add_argument(
        "--eval", metavar="SRC", dest="evaluation", help="what is measured before and after (the beginning of --data)"
    )
    tune.add_argument("--max-steps", type=int, metavar="N", help="optimiser steps (as many as the epochs have)")
    tune.add_argument("--epochs", type=float, metavar="N", help="passes over the data (the mode's)")
    tune.add_argument("--minutes", type=float, metavar="M", help="stop training after so many")
    tune.add_argument("--batch", type=int, metavar="N", help="sequences of a forward pass (4)")
    tune.add_argument("--seq-len", type=int, help="tokens of a sequence (1024)")
    tune.add_argument("--learning-rate", type=float, metavar="X", help="default: the mode's")
    tune.add_argument("--distill", type=float, metavar="W", help="weight of KL(teacher || model) in the loss (0)")
    tune.add_argument("--teacher", metavar="MODEL", help="the original that bolaco.json names")
    tune.add_argument("--types", metavar="NAMES", help="matrix types that are tuned, such as q,k,v (all)")
    tune.add_argument("--seed", type=int)
    tune.add_argument("--dtype", choices=("float32", "auto"), help="of frozen weights in memory; auto: as stored")
    tune.add_argument("--device")
    _settings(tune, "any other, such as training.warmup=0.1, options.NAME of the mode, trainer.NAME of transformers")
    _folders(tune, "checkpoints")

    generate = commands.add_parser("generate-text", help="text written by the model itself, to calibrate on")
    generate.add_argument("model", metavar="MODEL")
    generate.add_argument("--sequences", type=int, required=True, metavar="N", help="texts to write")
    generate.add_argument("-o", "--out", required=True, metavar="FILE", help="JSON Lines to write; must not exist")
    generate.add_argument(
        "--like", metavar="SRC", help="write such texts, behind a soft prompt that is trained on them"
    )
    generate.add_argument("--length", type=int, metavar="N", help="tokens of a text at most (1024)")
    generate.add_argument("--greedy", type=int, metavar="N", help="of these, the likeliest ones after the first (4)")
    generate.add_argument("--temperature", type=float, metavar="X", help="of the sampling (1)")
    generate.add_argument("--top-p", type=float, metavar="P", help="probability that is sampled from (0.95)")
    generate.add_argument("--batch", type=int, metavar="N", help="texts that are written at once (16)")
    generate.add_argument("--seed", type=int)
    _placement(generate)
    _work(generate, "texts that are finished")

    distill = commands.add_parser("distill", help="a tiny classifier, with a store of what a large model knows")
    distill.add_argument(
        "stage",
        metavar="STAGE",
        nargs="?",
        choices=DISTILL_STAGES,
        help="stop after it (prompt, reinforce, store, student), or predict: answer the texts of --data; default: all",
    )
    distill.add_argument("model", metavar="TEACHER", help="the large model; of predict, a folder written before")
    distill.add_argument("--task", metavar="FILE", help='labelled texts, {"text": .., "label": ..} in each line')
    distill.add_argument("--student", metavar="SPEC", help="MODEL_TYPE:FIELD=VALUE,.. or a config.json (2-layer BERT)")
    distill.add_argument("--labels", metavar="A,B,..", help="labels of the task (those that occur)")
    distill.add_argument(
        "--eval", metavar="FILE", dest="evaluation", help="labelled texts to report on (a part of --task)"
    )
    distill.add_argument("--data", metavar="FILE", help="of predict: texts to answer, a line each as in --task")
    distill.add_argument(
        "--items", type=int, default=0, metavar="N", help="of predict: nearest store texts to show (0)"
    )
    distill.add_argument("--seed", type=int)
    distill.add_argument("--dtype", choices=DTYPES, help="of the teacher in memory; auto: as stored")
    distill.add_argument("--device", help=WORDS["device"].help)
    _settings(distill, "any other field, such as reinforce.algorithm=ppo or store.samples=5000")
    distill.add_argument("-o", "--out", required=True, help="folder to write, of predict a file; must not exist")
    _work(distill, "finished stages")

    bench = commands.add_parser("bench", help="speed and memory of models, side by side")
    bench.add_argument("models", metavar="MODEL", nargs="+", help="the first one is what the others are compared with")
    bench.add_argument(
        "--runtime",
        default="eager",
        metavar="NAME,..",
        help="each model in each of eager, fused, compile, onnxruntime, openvino (eager)",
    )
    bench.add_argument("--batch", default="1,8", metavar="N,..", help="batch sizes (1,8)")
    bench.add_argument("--prompt", type=int, default=256, help="tokens of a prompt (256)")
    bench.add_argument("--new-tokens", type=int, default=16, help="tokens decoded after it (16)")
    bench.add_argument(
        "--deltas", action="store_true", help="MODEL are deltas of one base: several beside it in memory"
    )
    bench.add_argument("--counts", default="1,4,16", metavar="N,..", help="numbers of --deltas, taken in turn (1,4,16)")
    bench.add_argument("--unpacked", type=int, metavar="N", help="--deltas that are kept unpacked (all)")
    _json_file(bench)
    _placement(bench)

    inspect = commands.add_parser("inspect", help="ranks, budget and search history of a result")
    inspect.add_argument("folder", metavar="OUT")
    inspect.add_argument("--html", metavar="FILE", help="write the report there too; must not exist")
    _json(inspect)

    export = commands.add_parser("export", help="write a result for other tools and runtimes")
    export.add_argument("folder", metavar="OUT")
    forms = export.add_mutually_exclusive_group(required=True)
    for form, what in {
        "--dense": "the stock architecture, at its full size: the factors are multiplied back",
        "--two-factor": "two plain factors for each pivoted matrix, the same product",
        "--onnx": "an ONNX file with an explicit cache, in float32",
        "--openvino": "the same for OpenVINO",
    }.items():
        forms.add_argument(form, dest="form", action="store_const", const=form, help=what)
    export.add_argument(
        "--drop-bias",
        action="store_true",
        help="with --dense: leave out biases the stock architecture has no place for",
    )
    export.add_argument("-o", "--out", required=True)

    delta = commands.add_parser(
        "delta",
        help="what a fine-tune adds to its base, in few bits",
        usage="bolaco delta BASE TUNED -o DELTA [--ratio 1/16] [--method NAME] [--calibration SRC] [options]\n"
        "       bolaco delta apply DELTA -o MERGED\n"
        "       bolaco delta export DELTA --peft -o ADAPTER",
    )
    delta.add_argument("models", metavar="BASE TUNED", nargs=2, help="two models; or apply or export, and a delta")
    delta.add_argument("--ratio", help="bits as a share of 16 for each number of the matrices (1/16)")
    delta.add_argument("--method", help="how, one of `bolaco methods` (default)")
    delta.add_argument("--calibration", metavar="SRC", help="general text that statistics are estimated on")
    delta.add_argument("--text-column", metavar="NAME", help=WORDS["text_column"].help)
    delta.add_argument("--eval", metavar="SRC", dest="evaluation", help="text of the perplexities (that after it)")
    delta.add_argument("--seq-len", type=int, help="tokens of a sequence (512)")
    delta.add_argument("--seed", type=int)
    delta.add_argument("--dtype", choices=DTYPES, help="of the models in memory (auto: as stored)")
    delta.add_argument("--device", help=WORDS["device"].help)
    delta.add_argument("--peft", action="store_true", help="export: a LoRA adapter for PEFT, vLLM and llama.cpp")
    _settings(delta, "any other, such as calibration.sequences=128, options.NAME of the method")
    _folders(delta)
    _json(delta)

    methods = commands.add_parser("methods", help="list what is registered, or the options of one of it")
    methods.add_argument("name", metavar="NAME", nargs="?", help="of a method, storage, search, preset or mode")

    completion = commands.add_parser("completion", help="print what completes these words in a shell")
    completion.add_argument("shell", choices=SHELLS)
    for command in (compress, compare, run, evaluate, tune, generate, distill, bench, delta):
        _loudness(command)
    return parser


def _ratios(text: str) -> list[float]:
    """Numbers with commas between."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas between, such as 0.9,0.8, not {text!r}"
        ) from None


def _preset(name: str) -> str:
    """The name of a preset; argparse itself would list all there are and not say what was probably meant."""
    if name not in PRESETS:
        from bolaco.settings import meant

        raise argparse.ArgumentTypeError(f"unknown preset {name!r}{meant(name, PRESETS)}")
    return name


def _words(parser: argparse._ActionsContainer, *names: str) -> None:
    """Options for words of the recipe; those that are not given are None, and left to the preset."""
    for name in names:
        word = WORDS[name]
        option = "--" + (word.option or name).replace("_", "-")
        kind = {"choices": word.choices} if word.choices else {"type": word.type, "metavar": word.metavar}
        parser.add_argument(option, dest=name, help=word.help or None, **kind)


def _placement(parser: argparse.ArgumentParser) -> None:
    """Number format and device."""
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model in memory; auto: as stored")
    parser.add_argument("--device", default="auto", help=WORDS["device"].help)


def _settings(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=what)


def _folders(parser: argparse.ArgumentParser, what: str = "intermediate results", required: bool = True) -> None:
    parser.add_argument("-o", "--out", required=required, help="folder to write; must not exist")
    _work(parser, what)


def _work(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--work", metavar="DIR", help=f"folder of {what} (OUT.work)")
    parser.add_argument("--keep-work", action="store_true", help="do not remove it on success")


def _dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, without loading weights")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")


def _json_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the result as JSON to FILE too; without FILE print it, and nothing else",
    )


def _result(parser: argparse.ArgumentParser) -> None:
    """What is done with a result."""
    _json(parser)
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload OUT to the hub, to a private model repository")


def _loudness(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    group.add_argument("-v", "--verbose", action="store_true", help="show what else only log.txt in --work says")
