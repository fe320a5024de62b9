"""The command line. Each command parses its words, builds a recipe and makes one call; heavy imports are inside."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bolaco.errors import BolacoError, MissingPackageError, RecipeError, no_memory, no_space
from bolaco.parser import command_parser
from bolaco.progress import plain_console
from bolaco.recipe.words import COMPARED, WORDS

if TYPE_CHECKING:
    from bolaco.progress import Reporter
    from bolaco.recipe.recipe import Recipe


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    from bolaco.settings import parsed_yaml

    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--set {pair}: expected FIELD=VALUE")
        try:
            options[name] = parsed_yaml(value)
        except ValueError as error:
            raise RecipeError(f"--set {name}: the value is no plain YAML: {error}") from None
    return options


def _reporter(args: argparse.Namespace) -> Reporter:
    """Where progress goes: to the standard error, as loud as was asked."""
    from bolaco.progress import Reporter

    return Reporter(quiet=args.quiet, verbose=args.verbose)


def _print_json(value: Any) -> None:
    from bolaco.settings import json_text

    print(json_text(value), end="")  # noqa: T201 - it is the output


def _recipes(args: argparse.Namespace) -> dict[str, Recipe]:
    """What is to be run: one recipe without a name, or one for each keep ratio by the name of its folder."""
    from bolaco.recipe.recipe import load_recipe, make_recipe, recipe_values
    from bolaco.settings import merge

    if args.command == "run":
        return {"": load_recipe(args.recipe)}
    words = {word: getattr(args, word) for word in WORDS} | {"keep": args.keep and args.keep[0]}
    words["optimize"] = args.optimize
    recipe = make_recipe(merge({"model": args.model}, recipe_values(**words, options=_settings(args.set))), args.preset)
    if args.keep is None or len(args.keep) == 1:
        return {"": recipe}
    from bolaco.runs.several import at_ratios

    for option in ("print_recipe", "push_to_hub"):
        if getattr(args, option):
            raise RecipeError(f"--{option.replace('_', '-')} is about one result; give one --keep")
    return dict(at_ratios(recipe, args.keep))


def _compress(args: argparse.Namespace, console: Console) -> None:
    recipes = _recipes(args)
    if args.command == "compress" and args.print_recipe:
        print(recipes[""].to_yaml(), end="")  # noqa: T201 - the recipe is the output
        return
    if args.dry_run:
        _dry_run(args, console, recipes)
        return
    if not args.out:
        raise RecipeError("-o OUT is missing: the folder to write")
    if args.push_to_hub is not None:
        from bolaco.checkpoint.hub import check_hub

        check_hub(args.push_to_hub)
    if "" not in recipes:
        _compress_several(args, console, recipes)
        return
    from bolaco.api import run
    from bolaco.report.document import result_document
    from bolaco.report.tables import seconds_line, size_notes, summary_table, tuning_table

    reporter = _reporter(args)
    result = run(recipes[""], args.out, work=args.work, keep_work=args.keep_work, reporter=reporter)
    if args.json:
        _print_json(result_document(result.path, result.info))
    else:
        console.print(summary_table(result.info))
        for line in size_notes(result.info):
            console.print(line)
        console.print(seconds_line(result.info))
        if result.info.tuning is not None:
            console.print(tuning_table(result.info.tuning))
            console.print(seconds_line(result.info.tuning))
        console.print(f"written to {result.path}")
    if args.push_to_hub is not None:
        from bolaco.checkpoint.hub import push

        reporter.say(f"uploading to {args.push_to_hub}")
        address = push(result.path, args.push_to_hub)
        reporter.say(f"uploaded to {address}")


def _dry_run(args: argparse.Namespace, console: Console, recipes: Mapping[str, Recipe]) -> None:
    from bolaco.runs.dry_run import described, values

    places = [None if place is None else Path(place).expanduser() for place in (args.out, args.work)]
    if args.json:
        found = {name: values(recipe, *places) for name, recipe in recipes.items()}
        _print_json(found.get("", found))
        return
    for name, recipe in recipes.items():
        if name:
            console.print(f"{name}:")
        for part in described(recipe, *places):
            console.print(part)


def _compress_several(args: argparse.Namespace, console: Console, recipes: Mapping[str, Recipe]) -> None:
    from bolaco.report.document import result_document
    from bolaco.report.tables import size_notes, sizes_table
    from bolaco.runs.several import compress_several

    work = None if args.work is None else Path(args.work).expanduser()
    found = compress_several(recipes, Path(args.out).expanduser(), _reporter(args), work, args.keep_work)
    infos = {name: result.info for name, result in found.results.items()}
    if args.json:
        results = {name: result_document(result.path, result.info) for name, result in found.results.items()}
        _print_json({"path": str(found.path), "results": results})
        return
    console.print(sizes_table(infos))
    for line in dict.fromkeys(line for info in infos.values() for line in size_notes(info)):
        console.print(line)
    console.print(f"written to {', '.join(str(result.path) for result in found.results.values())}")


def _compare(args: argparse.Namespace, console: Console) -> None:
    try:
        keep = [] if args.keep is None else [float(word) for word in args.keep.split(",")]
    except ValueError:
        raise RecipeError(f"--keep {args.keep}: expected numbers with commas between, such as 0.9,0.8") from None
    methods = [word.strip() for word in args.methods.split(",") if word.strip()]
    if args.tasks is None and (args.task_limit is not None or args.task_keep is not None):
        raise RecipeError("--task-limit and --task-keep are about --tasks, which is missing")
    from bolaco.api import compare
    from bolaco.report.comparison import asked_words, rich_table

    result = compare(
        args.model,
        methods,
        keep,
        args.out,
        keep_model=args.keep_model or (),
        target_size=[word.strip() for word in (args.target_size or "").split(",") if word.strip()],
        evaluation=args.evaluation or (),
        tasks=args.tasks or (),
        task_limit=args.task_limit,
        task_keep=args.task_keep,
        keep_models=args.keep_models,
        quantized=() if args.quantized == "none" else [word.strip() for word in args.quantized.split(",")],
        work=args.work,
        keep_work=args.keep_work,
        reporter=_reporter(args),
        options=_settings(args.set),
        **{word: getattr(args, word) for word in COMPARED},
    )
    console.print(rich_table(result.record))
    for row in result.failed:
        console.print(f"{row.method} at {asked_words(result.record.size, row.keep)} failed: {row.error}")
    console.print(f"written to {result.path}")
    if len(result.failed) == len(result.record.rows):
        raise BolacoError(f"{result.path}: no row has a result")


def _eval(args: argparse.Namespace, console: Console) -> None:
    _check_json_file(args)
    if args.data is None and args.tasks is None:
        raise RecipeError("eval needs --data SRC for perplexity, --tasks NAMES for accuracy, or both")
    if args.limit is not None and args.data is None:
        raise RecipeError("--limit counts the windows of --data, which is missing; examples of tasks: --task-limit")
    if args.task_limit is not None and args.tasks is None:
        raise RecipeError("--task-limit counts the examples of --tasks, which is missing; windows of --data: --limit")
    for option, count in (("--batch", args.batch), ("--task-limit", args.task_limit)):
        if count is not None and count < 1:
            raise RecipeError(f"{option} {count}: must be at least 1")
    from bolaco.api import evaluate, evaluate_tasks, read_tasks
    from bolaco.evaluation.perplexity import evaluation_windows
    from bolaco.models.load import load_config, load_model, load_tokenizer
    from bolaco.report.tables import tasks_table

    # In order of cost: what is wrong shows before the weights are read, and before the hours a perplexity can take.
    config, tokenizer = load_config(args.model), load_tokenizer(args.model)
    text = (args.seq_len, args.limit, args.bos, args.text_column)
    windows = None if args.data is None else evaluation_windows(args.data, tokenizer, config, *text)
    tasks = None if args.tasks is None else read_tasks(args.tasks)
    model = load_model(args.model, args.dtype, args.device)
    common: dict[str, Any] = {"tokenizer": tokenizer, "reporter": _reporter(args)} | (
        {} if args.batch is None else {"batch": args.batch}
    )
    record: dict[str, Any] = {"model": args.model}
    silent = args.json == "-"
    if windows is not None:
        result = evaluate(model, windows, **common)
        if not silent:
            console.print(
                f"perplexity {result.perplexity:.4f} on {result.windows} x {result.seq_len} tokens of {args.data} "
                f"({result.tokens:,} predicted, {result.seconds:.1f} s)"
            )
        record |= {"data": args.data} | asdict(result)
    if tasks is not None:
        scores = evaluate_tasks(model, tasks, limit=args.task_limit, **common)
        if not silent:
            console.print(tasks_table(scores))
        record["tasks"] = {score.task: score.record for score in scores}
    _write_json(args, record)


def _check_json_file(args: argparse.Namespace) -> None:
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise RecipeError(f"--json {args.json}: there is no such folder")


def _write_json(args: argparse.Namespace, value: Any) -> None:
    """The result where ``--json`` says, if it says something."""
    from bolaco.settings import json_text

    if args.json == "-":
        _print_json(value)
    elif args.json:
        Path(args.json).write_text(json_text(value), encoding="utf-8")


def _bench(args: argparse.Namespace, console: Console) -> None:
    _check_json_file(args)
    batches = [int(word) if word.strip().isdigit() else 0 for word in args.batch.split(",")]
    if min(batches) < 1:
        raise RecipeError(f"--batch {args.batch}: expected numbers from 1 up with commas between, such as 1,8")
    for option, count in (("--prompt", args.prompt), ("--new-tokens", args.new_tokens)):
        if count < 1:
            raise RecipeError(f"{option} {count}: must be at least 1")
    if args.deltas:
        if args.runtime != "eager":
            raise RecipeError(f"--runtime {args.runtime}: deltas beside one base run in eager only")
        _bench_deltas(args, console)
        return
    from bolaco.evaluation.engines import runtime_named
    from bolaco.evaluation.speed import measure_apart
    from bolaco.report.tables import speed_table

    runtimes = [runtime_named(word.strip()).name for word in args.runtime.split(",")]
    found = []
    with _reporter(args).stage("measure", len(args.models) * len(runtimes)) as tick:
        for runtime in runtimes:
            for model in args.models:
                settings = {"batches": batches, "prompt": args.prompt, "new": args.new_tokens, "runtime": runtime}
                found.append(measure_apart(model, **settings, dtype=args.dtype, device=args.device))
                tick(1)
    if args.json != "-":
        console.print(speed_table(found))
    _write_json(args, found)


def _bench_deltas(args: argparse.Namespace, console: Console) -> None:
    counts = [int(word) if word.strip().isdigit() else 0 for word in args.counts.split(",")]
    if min(counts) < 1:
        raise RecipeError(f"--counts {args.counts}: expected numbers from 1 up with commas between, such as 1,4,16")
    from bolaco.delta.bench import delta_table, measure_deltas

    found = []
    words = {"prompt": args.prompt, "new": args.new_tokens, "dtype": args.dtype, "device": args.device}
    with _reporter(args).stage("measure", len(counts)) as tick:
        for row in measure_deltas(args.models, counts, unpacked=args.unpacked, **words):
            found.append(row)
            tick(1)
    if args.json != "-":
        console.print(delta_table(found))
        console.print("in brackets: memory over one whole model's; tokens/s of whole models")
    _write_json(args, found)


# Options of `tune` that are fields of its settings.
_TUNE_WORDS = (
    *("evaluation", "text_column", "seq_len", "max_steps", "epochs", "minutes", "batch", "learning_rate", "distill"),
    *("teacher", "seed", "dtype", "device"),
)


def _tune(args: argparse.Namespace, console: Console) -> None:
    from bolaco.api import tune
    from bolaco.report.tables import seconds_line, tuning_table

    words: dict[str, Any] = {word: getattr(args, word) for word in _TUNE_WORDS}
    words["types"] = None if args.types is None else tuple(args.types.split(","))
    folders: dict[str, Any] = {"out": args.out, "work": args.work, "keep_work": args.keep_work}
    given = _settings(args.set)
    result = tune(args.model, args.mode, args.data, **folders, reporter=_reporter(args), options=given, **words)
    if result is None:
        return
    record = result.info.tuning
    assert record is not None  # it was tuned
    console.print(tuning_table(record))
    if record.out_of_time:
        console.print(f"stopped at the budget of {record.settings['training']['minutes']:g} minutes")
    console.print(seconds_line(record))
    if record.note:
        console.print(record.note)
    console.print(f"written to {result.path}")


# Options of `generate-text` that are fields of how a model writes.
_WRITING = ("length", "greedy", "temperature", "top_p", "batch", "seed")


def _generate_text(args: argparse.Namespace, console: Console) -> None:
    from bolaco.api import generate_text

    words = {word: value for word in _WRITING if (value := getattr(args, word)) is not None}
    places: dict[str, Any] = {"work": args.work, "keep_work": args.keep_work, "reporter": _reporter(args)}
    places |= {"like": args.like, "dtype": args.dtype, "device": args.device}
    found = generate_text(args.model, args.sequences, args.out, **places, **words)
    if found.losses is not None:
        before, after = found.losses
        console.print(
            f"held-out texts of {args.like}: {after:.3f} nats a token behind the prompt, {before:.3f} at first"
        )
    console.print(f"{found.texts:,} texts of {found.tokens:,} tokens written to {found.path}")


def _distill(args: argparse.Namespace, console: Console) -> None:
    if args.stage == "predict":
        _predict(args, console)
        return
    if args.data is not None or args.items:
        raise RecipeError("--data and --items are of `distill predict`; labelled texts to report on: --eval")
    if args.task is None:
        raise RecipeError("--task FILE is missing: the labelled texts")
    from bolaco.api import distill
    from bolaco.distill.tables import distilled_table

    result = distill(
        args.model,
        args.task,
        args.out,
        until=args.stage or "student",
        student=args.student,
        labels=None if args.labels is None else tuple(args.labels.split(",")),
        evaluation=args.evaluation,
        seed=args.seed,
        dtype=args.dtype,
        device=args.device,
        options=_settings(args.set),
        work=args.work,
        keep_work=args.keep_work,
        reporter=_reporter(args),
    )
    if result.info is not None:
        console.print(distilled_table(result.info))
    console.print(f"written to {result.path}")


def _predict(args: argparse.Namespace, console: Console) -> None:
    given = [name for name in ("task", "student", "labels", "evaluation", "work") if getattr(args, name) is not None]
    if given or args.set:
        raise RecipeError(f"distill predict takes --data, --items and --device, not --{(given or ['set'])[0]}")
    if args.data is None:
        raise RecipeError("--data FILE is missing: the texts to answer")
    from bolaco.distill.predict import Predictor, predict_file

    predictor = Predictor(args.model, device=args.device or "auto")
    found = predict_file(predictor, args.data, Path(args.out).expanduser(), args.items)
    right = "" if found.accuracy is None else f", {found.accuracy:.4f} of the labelled ones right"
    console.print(f"{found.texts:,} texts answered{right}; written to {args.out}")


# Options of `delta` that are fields of its settings.
_DELTA_WORDS = (*("ratio", "method", "calibration", "text_column", "evaluation", "seq_len", "seed", "dtype", "device"),)


def _delta(args: argparse.Namespace, console: Console) -> None:
    what, place = args.models
    if what in ("apply", "export"):
        _use_delta(args, console)
        return
    if args.peft:
        raise RecipeError("--peft is about a delta that is there: bolaco delta export DELTA --peft -o ADAPTER")
    from bolaco.api import delta
    from bolaco.delta.page import document, lines_of
    from bolaco.report.tables import seconds_line

    words: dict[str, Any] = {word: getattr(args, word) for word in _DELTA_WORDS}
    folders: dict[str, Any] = {"out": args.out, "work": args.work, "keep_work": args.keep_work}
    result = delta(what, place, **folders, reporter=_reporter(args), options=_settings(args.set), **words)
    if args.json:
        _print_json(document(result.path, result.info))
        return
    for line in (*lines_of(result.info), seconds_line(result.info)):
        console.print(line)
    console.print(f"written to {result.path}")


def _use_delta(args: argparse.Namespace, console: Console) -> None:
    """``bolaco delta apply`` and ``bolaco delta export``."""
    what, place = args.models
    given = [f"--{word.replace('_', '-')}" for word in _DELTA_WORDS if getattr(args, word) is not None]
    if given or args.set:
        raise RecipeError(f"delta {what}: takes -o alone, not {(given or ['--set'])[0]}")
    out = Path(args.out).expanduser()
    if what == "apply":
        from bolaco.delta.apply import apply_delta

        apply_delta(place, out)
        console.print(f"written to {out}")
        return
    if not args.peft:
        raise RecipeError("delta export: --peft is the one format there is; `bolaco delta apply` writes a whole model")
    from bolaco.delta.export import export_peft

    for line in export_peft(place, out):
        console.print(line)
    console.print(f"written to {out}")


def _inspect_delta(args: argparse.Namespace, console: Console) -> None:
    from bolaco.delta.page import delta_page, document, lines_of
    from bolaco.delta.record import read_record
    from bolaco.report.tables import seconds_line
    from bolaco.work.output import refuse_existing

    folder = Path(args.folder)
    info = read_record(folder)
    if args.json:
        _print_json(document(folder, info))
        return
    for line in (*lines_of(info), seconds_line(info)):
        console.print(line)
    if args.html:
        refuse_existing(Path(args.html))
        Path(args.html).write_text(delta_page(info, folder.resolve().name), encoding="utf-8")
        console.print(f"report written to {args.html}")


def _inspect(args: argparse.Namespace, console: Console) -> None:
    from bolaco.checkpoint.info import CompressedInfo, read_any_info, read_curves
    from bolaco.models.adapters import is_delta
    from bolaco.report.tables import (
        allocation_line,
        blocks_line,
        experts_table,
        kept_line,
        ranks_table,
        seconds_line,
        size_notes,
        summary_table,
        trials_table,
        tuning_table,
    )
    from bolaco.work.output import refuse_existing

    if is_delta(args.folder):
        _inspect_delta(args, console)
        return
    info = read_any_info(args.folder)
    if args.json:
        from bolaco.report.document import result_document

        if args.html:
            raise RecipeError("--json prints one document, and --html writes another; leave out one of the two")
        _print_json(result_document(Path(args.folder), info))
        return
    record = info.tuning
    while record is not None:
        console.print(tuning_table(record))
        console.print(seconds_line(record))
        record = record.earlier
    if not isinstance(info, CompressedInfo):
        return
    console.print(summary_table(info))
    for line in size_notes(info):
        console.print(line)
    if info.ranks:
        console.print(ranks_table(info.ranks))
        if info.allocation:
            console.print(allocation_line(info))
    else:
        console.print(blocks_line(info.layers, info.layers_dense))
    if info.tokens_per_expert:
        console.print(experts_table(info.tokens_per_expert))
    if info.kept:
        console.print(kept_line(info))
    if info.walk:
        console.print(f"statistics from whole forward passes: {info.walk}")
    if info.trials:
        console.print(trials_table(info.trials))
        best = [min(t.objective for t in info.trials[: i + 1]) for i in range(len(info.trials))]
        console.print("best objective so far: " + " ".join(f"{value:.5g}" for value in best))
    console.print(seconds_line(info))
    if args.html:
        from bolaco.report.html import result_page

        refuse_existing(Path(args.html))
        page = result_page(info, read_curves(args.folder), Path(args.folder).resolve().name)
        Path(args.html).write_text(page, encoding="utf-8")
        console.print(f"report written to {args.html}")


def _export_dense(args: argparse.Namespace) -> str:
    from bolaco.checkpoint.export import export_dense

    counts = export_dense(args.folder, Path(args.out), args.drop_bias)
    before, after = counts["parameters"], counts["parameters_dense"]
    return (
        f"a stock checkpoint with {after:,} parameters; the compressed one has {before:,}. "
        "Multiplying the factors gives the saved size and speed back."
    )


def _export_two_factor(args: argparse.Namespace) -> str:
    from bolaco.checkpoint.runtimes import export_two_factor

    count = export_two_factor(args.folder, Path(args.out))
    return f"{count} pivoted matrices have two plain factors now, which multiply to the same"


def _export_onnx(args: argparse.Namespace) -> str:
    from bolaco.checkpoint.runtimes import export_onnx

    export_onnx(args.folder, Path(args.out))
    return "an ONNX file with an explicit cache, in float32, and its weights beside it"


def _export_openvino(args: argparse.Namespace) -> str:
    from bolaco.checkpoint.runtimes import export_openvino

    export_openvino(args.folder, Path(args.out))
    return "a model of OpenVINO with an explicit cache, in float32"


_EXPORTS = {
    "--dense": _export_dense,
    "--two-factor": _export_two_factor,
    "--onnx": _export_onnx,
    "--openvino": _export_openvino,
}


def _export(args: argparse.Namespace, console: Console) -> None:
    if args.drop_bias and args.form != "--dense":
        raise RecipeError("--drop-bias is about --dense; other exports keep all biases")
    written = _EXPORTS[args.form](args)
    console.print(f"written to {args.out}: {written}")


def _methods(args: argparse.Namespace, console: Console) -> None:
    from bolaco.listing import one_of_it, tables

    for part in tables() if args.name is None else one_of_it(args.name):
        console.print(part)


def _completion(args: argparse.Namespace, console: Console) -> None:
    try:
        import shtab
    except ImportError:
        raise MissingPackageError("completion needs shtab; pip install 'bolaco[completion]'") from None
    print(shtab.complete(command_parser(), args.shell))  # noqa: T201 - it is the output


class _Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM): it does so as after Ctrl-C, which libraries know."""


@contextmanager
def _asked_to_end() -> Iterator[None]:
    """Raises :class:`_Terminated` where SIGTERM comes; a second one ends the process at once."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# What is kept in a work folder, so that the same command goes on.
_RESUMED = ("compress", "compare", "run", "tune", "generate-text", "distill", "delta")
_COMMANDS = {
    "compress": _compress,
    "compare": _compare,
    "run": _compress,
    "eval": _eval,
    "tune": _tune,
    "generate-text": _generate_text,
    "distill": _distill,
    "bench": _bench,
    "inspect": _inspect,
    "export": _export,
    "delta": _delta,
    "methods": _methods,
    "completion": _completion,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 or 143 when interrupted."""
    args = command_parser().parse_args(argv)
    # Libraries draw their own bars on import; a run shows one set only.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = plain_console(soft_wrap=True)
    errors = plain_console(soft_wrap=True, stderr=True)
    try:
        with _asked_to_end():
            _COMMANDS[args.command](args, console)
    except BolacoError as error:
        errors.print(f"bolaco: error: {' '.join(str(error).splitlines())}")
        return 1
    except KeyboardInterrupt as stop:
        goes_on = "; the same command continues where this one was" if args.command in _RESUMED else ""
        errors.print(f"bolaco: stopped{goes_on}")
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    except Exception as error:
        if no_space(error):
            errors.print("bolaco: error: no space left on the disk; free some and give the same command again")
            return 1
        if no_memory(error):
            errors.print(
                "bolaco: error: not enough memory; the same command continues where this one was, and takes less with "
                "--set calibration.batch=1, --set calibration.cache=disk or a shorter --seq-len"
            )
            return 1
        if isinstance(error, OSError) and error.filename is not None:
            errors.print(f"bolaco: error: {error.filename}: {error.strerror}")
            return 1
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
