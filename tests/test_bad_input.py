"""Every wrong input gets one line that names it, and costs nobody anything: no file is lost, none is left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bolaco import blockstore, pipeline
from bolaco.models import inspect_structure
from tests.command import PROGRESS, Done, bolaco, compress, furnish, info, ok, snapshot, what_counts
from tests.models import english, save_tiny, tiny_llama

PYTHON_LOCK = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A furnished folder with a result ``out`` of three trials and its work folder ``out.work``."""
    folder = furnish(tmp_path_factory.mktemp("shared"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ok(*compress("out", "--keep-work"))
    return folder


@pytest.fixture
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A furnished folder of the test's own, as the current one."""
    monkeypatch.chdir(furnish(tmp_path, shared / "model"))
    return tmp_path


@pytest.fixture
def begun(place: Path, shared: Path) -> Path:
    """The same with a finished work folder ``out.work``, whose ``out`` was not written yet."""
    shutil.copytree(shared / "out.work", "out.work")
    return place / "out.work"


def one_line(done: Done, *parts: str) -> None:
    """Status 1 and one line of error with these parts, after nothing but progress."""
    *before, last = done.err.splitlines()
    assert done.code == 1
    assert last.startswith("bolaco: error: ")
    assert [line for line in before if not PROGRESS.match(line)] == []
    assert done.out == ""
    for part in parts:
        assert part in last
    assert len(last) < 500


def refused(words: list[str], *parts: str) -> None:
    """Running ``words`` gives one line of error, and every file and folder is as before."""
    before = contents()
    one_line(bolaco(*words), *parts)
    assert contents() == before


def contents() -> dict[str, str | None]:
    """Of the current folder, but for the seconds a work folder counts."""
    return {name: value for name, value in snapshot().items() if name != "out.work/seconds.json"}


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["0", "-1", "1.5", "nan"])
def test_keep_out_of_range(place: Path, keep: str) -> None:
    refused(compress("out", "--keep", keep), "keep: Input should be", f"(got {float(keep)})")


def test_keep_that_is_no_number(place: Path) -> None:
    done = bolaco(*compress("out", "--keep", "much"))
    assert done.code == 2
    assert done.err.splitlines()[-1] == "bolaco compress: error: argument --keep: invalid float value: 'much'"


def test_keep_that_no_allocation_meets(place: Path) -> None:
    refused(compress("out", "--keep", "0.1"), "keep 0.1 allows 1,536 parameters", "raise --keep")


def test_unknown_preset(place: Path) -> None:
    done = bolaco(*compress("out", "--preset", "papr"))
    assert done.code == 2
    assert "invalid choice: 'papr'" in done.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--method", "afmm"], ["unknown method 'afmm'", "did you mean 'afm'?"]),
        (["--method", "zzz"], ["unknown method 'zzz'", "known are afm, "]),
        (["--trials", "0"], ["search.trials", "(got 0)"]),
        (["--seq-len", "1"], ["calibration.seq_len", "(got 1)"]),
        (["--seq-len", "129"], ["calibration", "129 tokens", "128 positions"]),
        (["--set", "evaluation.seq_len=129"], ["evaluation", "129 tokens", "128 positions"]),
        (["--set", "foo=1"], ["foo: Extra inputs are not permitted"]),
        (["--set", "search.foo=1"], ["search.foo: Extra inputs are not permitted"]),
        (["--set", "search.trials=many"], ["search.trials", "(got 'many')"]),
        (["--set", "search=5x4"], ["search: Input should be"]),
        (["--set", "search.dense_types=[w]"], ["search.dense_types", "unknown type 'w'"]),
        (["--set", "search.trials=[1"], ["--set search.trials=[1", "no YAML"]),
        (["--set", "nothing"], ["--set nothing: expected FIELD=VALUE"]),
        (["--set", "validation.sequences=7"], ["validation: candidates (6) must be at least sequences (7)"]),
        (["--device", "toaster"], ["device 'toaster' cannot be used here"]),
        (["--device", "meta"], ["device 'meta' cannot be used here"]),
        (["--warm-start", "nowhere"], ["nowhere: no bolaco.json in it"]),
        (["--warm-start", "model"], ["model: no bolaco.json in it"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_options(place: Path, words: list[str], parts: list[str]) -> None:
    refused(compress("out", *words), *parts)


def test_no_out(place: Path) -> None:
    refused(compress("out")[:-2], "-o OUT is missing")


def test_warm_start_of_another_architecture(place: Path, shared: Path) -> None:
    save_tiny(Path("deeper"), tiny_llama(num_hidden_layers=3))
    refused(compress("out", "--warm-start", shared / "out", model="deeper"), "no rank for model.layers.2.")


def test_a_corrected_command_is_not_held_to_the_wrong_one(place: Path) -> None:
    """What failed before any stage was finished leaves nothing that the next command would have to agree with."""
    refused(compress("out", "--search", "none", calibration="textt.txt"), "textt.txt: no such file")
    ok(*compress("out", "--search", "none"))


def test_killed_while_loading_is_not_held_to_it_either(place: Path) -> None:
    Path("out.work").mkdir()
    Path("out.work/recipe.json").write_text('{"version": 1, "keep": 0.3}')
    Path("out.work/model.json").write_text('"of another model"')
    Path("out.work/recipe.partial").write_text('{"ke')
    ok(*compress("out", "--search", "none"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["recipe.yaml: not a readable recipe"]),
        ("{", ["recipe.yaml: not a readable recipe"]),
        ("- model", ["a recipe is a YAML mapping", "found list"]),
        ("model: model\nkeep: 0.8\nserach: {}", ["recipe.yaml: serach: Extra inputs"]),
        ("keep: 0.8", ["recipe.yaml: model: Field required"]),
        ("model: model\nkeep: 0.8\nversion: 2", ["recipe.yaml: version"]),
        ("model: model\nkeep: 0.8\npreset: papr", ["unknown preset 'papr'"]),
    ],
)
def test_recipe_files(place: Path, text: str | None, parts: list[str]) -> None:
    if text is not None:
        Path("recipe.yaml").write_text(text)
    refused(["run", "recipe.yaml", "-o", "out"], *parts)


# --- texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("gone.txt", None, ["no such file"]),
        ("./gone", None, ["no such file"]),
        (
            "short.txt",
            b"a river sees the house.",
            ["too short for calibration", "8 x 32 tokens are needed, 6 are left"],
        ),
        ("empty.txt", b"", ["too short for calibration", "0 are left"]),
        ("binary.txt", bytes(range(256)) * 20, ["cannot be read", "utf-8"]),
        ("body.jsonl", b'{"body": "a river"}\n', ["rows have no 'text' string (they have body)"]),
        ("number.jsonl", b'{"text": 1}\n', ["rows have no 'text' string"]),
        ("broken.jsonl", b'{"text": "a riv\n{', ["cannot be read"]),
        ("broken.parquet", b"PAR1", ["cannot be read"]),
        ("notes.docx", b"PK", ["notes.docx: unknown kind of file"]),
        ("text.txt[7:]", None, ["text.txt[7:]: too short for calibration"]),
        ("bare", None, ["the folder holds no .txt"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_texts(place: Path, name: str, content: bytes | None, parts: list[str]) -> None:
    Path("bare").mkdir()
    if content is not None:
        Path(name).write_bytes(content)
    refused(compress("out", calibration=name), str(Path(name)), *parts)


def test_each_purpose_of_a_short_text_is_named(place: Path) -> None:
    Path("some.txt").write_text(english(300))
    refused(compress("out", "--validation", "some.txt", validation_candidates=20), "some.txt", "short for validation")
    refused(compress("out", "--eval", "some.txt", evaluation_windows=20), "some.txt", "short for evaluation")


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["./gone", "/gone/model", "a/b/gone", "gone.gguf"])
def test_no_such_model(place: Path, model: str) -> None:
    refused(compress("out", model=model), f"{model}: no such f")


def test_a_folder_without_a_model(place: Path) -> None:
    Path("bare").mkdir()
    refused(compress("out", model="bare"), "bare: the folder holds no config.json and 0 .gguf files")


def test_a_file_that_is_no_gguf(place: Path) -> None:
    Path("bad.gguf").write_text("not a model")
    refused(compress("out", model="bad.gguf"), "bad.gguf: cannot read its configuration", "GGUF")


@pytest.fixture
def copy(place: Path, shared: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(shared / "model", "copy"))


def test_no_tokenizer(copy: Path) -> None:
    for file in copy.glob("*token*"):
        file.unlink()
    refused(compress("out", model="copy"), "copy: no usable tokenizer beside the model", "save one into its folder")


def test_damaged_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    refused(compress("out", model="copy"), "copy: no usable tokenizer beside the model")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:20],
        lambda _: "",
        lambda _: "{}",
        lambda _: "[1]",
        lambda text: text.replace('"llama"', '"llamma"'),
        lambda text: text.replace('"hidden_size": 32', '"hidden_size": "wide"'),
    ],
    ids=["half", "empty", "no keys", "list", "unknown type", "wrong value"],
)
def test_damaged_config(copy: Path, change: Callable[[str], str]) -> None:
    config = copy / "config.json"
    before = config.read_text()
    config.write_text(change(before))
    assert config.read_text() != before
    refused(compress("out", model="copy"), "copy: cannot read its configuration: ")


@pytest.mark.parametrize("change", [lambda data: data[:5000], lambda data: b"garbage " * 100, lambda _: b""])
def test_damaged_weights(copy: Path, change: Callable[[bytes], bytes]) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    refused(compress("out", model="copy"), "copy: ")


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refused(compress("out", model="copy"), "copy: cannot be loaded", "model.safetensors")


@pytest.mark.parametrize("change", ["missing", "of another shape"])
def test_a_tensor_is(copy: Path, change: str) -> None:
    """transformers would fill it with random numbers."""
    name = "model.layers.1.mlp.up_proj.weight"
    state = load_file(copy / "model.safetensors")
    weight = state.pop(name)
    if change == "of another shape":
        state[name] = weight[:-1].clone()
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    refused(compress("out", model="copy"), "copy: ", name)


def changed(change: Callable[[PreTrainedModel], None]) -> str:
    """Saves the tiny model with changed weights; its name."""
    model = tiny_llama()
    with torch.no_grad():
        change(model)
    save_tiny(Path("changed"), model)
    return "changed"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(place: Path, value: float) -> None:
    model = changed(lambda m: m.model.layers[1].mlp.up_proj.weight[3, 4].fill_(value))
    refused(compress("out", model=model), "model.layers.1.mlp.up_proj.weight: the weights hold NaN or infinity")


def test_a_finite_weight_whose_sum_overflows_is_no_error(place: Path) -> None:
    model = changed(lambda m: m.model.embed_tokens.weight[90:95].fill_(3e38))  # words the text does not have
    ok(*compress("out", "--search", "none", model=model))


def test_activations_that_overflow(place: Path) -> None:
    model = changed(lambda m: m.model.layers[0].mlp.down_proj.weight.fill_(1e38))
    refused(compress("out", model=model), "block 0: its output holds NaN or infinity")


def test_activations_that_overflow_inside_a_block(place: Path) -> None:
    model = changed(lambda m: m.model.layers[0].self_attn.q_proj.weight.fill_(1e38))
    refused(compress("out", model=model), "block 0")


def test_activations_that_overflow_later_on(place: Path) -> None:
    """The first block's factors stay, to continue from; nothing else does."""
    model = changed(lambda m: m.model.layers[1].mlp.down_proj.weight.fill_(1e38))
    before = snapshot()
    one_line(bolaco(*compress("out", model=model)), "block 1: its output holds NaN or infinity")
    after = snapshot()
    assert {name for name in after if not name.startswith("out.work")} == set(before)
    assert "out.work/factors/block-00000.safetensors" in after


def test_compressed_already(place: Path, shared: Path) -> None:
    refused(compress("out", model=str(shared / "out")), "compressed already (lowrank_llama)", "export --dense")
    refused(compress("out", "--dry-run", model=str(shared / "out")), "compressed already (lowrank_llama)")


def test_mixture_of_experts(place: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 96}
    save_tiny(Path("moe"), AutoModelForCausalLM.from_config(CONFIG_MAPPING["mixtral"](**sizes)))
    refused(compress("out", model="moe"), "model.layers.0.mlp.experts", "mixtures of experts are not supported")
    refused(compress("out", "--dry-run", model="moe"), "mixtures of experts are not supported")


# --- output and work folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full folder", "empty folder", "file"])
def test_existing_output(place: Path, kind: str) -> None:
    if kind == "file":
        Path("out").write_text("mine")
    else:
        Path("out").mkdir()
    if kind == "full folder":
        Path("out/notes.txt").write_text("mine")
    refused(compress("out"), "out: exists already and is not overwritten")
    refused(["export", "model", "--dense", "-o", "out"], "")


def test_output_that_appears_meanwhile(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = pipeline._Run.measure

    def slow(*args: Any) -> Any:
        Path("out").mkdir()
        Path("out/notes.txt").write_text("mine")
        return measure(*args)

    monkeypatch.setattr(pipeline._Run, "measure", slow)
    one_line(bolaco(*compress("out", "--search", "none")), "out: exists already and is not overwritten")
    assert snapshot("out").keys() == {"out/notes.txt"}
    assert list(Path().glob(".*")) == []


@pytest.mark.parametrize(
    ("out", "work"), [("same", "same"), ("work/out", "work"), ("out", "out/work"), ("out", "./out")]
)
def test_output_and_work_folder_inside_each_other(place: Path, out: str, work: str) -> None:
    refused(compress(out, "--work", work), "must not be one inside the other")


@pytest.mark.parametrize("out", ["text.txt/out", "text.txt/deep/out"])
def test_a_file_where_a_folder_should_be(place: Path, out: str) -> None:
    refused(compress(out), "is not a folder")


def test_a_file_as_work_folder(place: Path) -> None:
    refused(compress("out", "--work", "text.txt"), "text.txt: exists and is not a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(place: Path) -> None:
    Path("closed").mkdir(mode=0o500)
    refused(compress("closed/out"), "closed", "Permission denied")


def test_unrelated_work_folder(place: Path) -> None:
    Path("papers").mkdir()
    Path("papers/thesis.tex").write_text("mine")
    refused(compress("out", "--work", "papers"), "papers: not a work folder of bolaco")
    Path("papers/recipe.json").write_text('{"dough": "500 g"}')
    refused(compress("out", "--work", "papers"), "papers: not a work folder of bolaco")
    Path("papers/thesis.tex").unlink()
    refused(compress("out", "--work", "papers"), "papers: not a work folder of bolaco")
    Path("papers/recipe.json").write_text("[]")
    refused(compress("out", "--work", "papers"), "papers/recipe.json: damaged")


def test_work_folder_of_another_recipe(begun: Path) -> None:
    words = compress("out", "--seed", "4", search_min_keep=0.3)
    refused(words, "out.work: started with another recipe", "search.min_keep (0.2 there, 0.3 here)")
    refused(words, "seed (0 there, 4 here)")


def test_work_folder_of_other_weights(begun: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.01
    Path("model").unlink()
    save_tiny(Path("model"), model)
    refused(compress("out"), "out.work: the model's weights have changed")


def test_work_folder_of_another_text(begun: Path) -> None:
    Path("text.txt").write_text(english(1200, seed=7))
    refused(compress("out"), "out.work: the text or its tokens have changed")


def test_work_folder_in_use(begun: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", PYTHON_LOCK, "out.work.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        refused(compress("out"), "out.work: another run is using this work folder")
    finally:
        holder.communicate("")
    ok(*compress("out"))


JSON_DAMAGE = [
    (name, text)
    for name in ("recipe", "seconds", "model", "texts", "dense", "selection")
    for text in ("", '{"half": ', "17")
]


@pytest.mark.parametrize(
    ("file", "text"),
    [(f"{name}.json", text) for name, text in JSON_DAMAGE]
    + [("selection.json", "[0, 1, 99]"), ("selection.json", '["a"]'), ("selection.json", "[]"), ("dense.json", "{}")],
)
def test_damaged_work_folder(begun: Path, file: str, text: str) -> None:
    assert (begun / file).exists()
    (begun / file).write_text(text)
    refused(compress("out"), f"out.work/{file}: damaged", "delete the folder out.work")


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"", lambda data: b"x" * len(data)])
def test_damaged_factors(begun: Path, shared: Path, damage: Callable[[bytes], bytes]) -> None:
    file = begun / "factors" / "block-00001.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    one_line(bolaco(*compress("out")), f"out.work/factors/{file.name}: missing or damaged", "delete")
    file.unlink()  # as the message says
    ok(*compress("out"))
    assert what_counts("out") == what_counts(shared / "out")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"garbage\n" + data,
        lambda data: data + b"garbage\n",
        lambda data: b'{"op_code": 3}\n' + data,
        lambda data: data + b'{"op_code": 99, "worker_id": "x"}\n',
        lambda data: b"\xff\xfe\x00\n" * 3,
        lambda data: b"[]\n" + data,
        lambda data: data.replace(b"levels", b"lovels"),
        lambda data: data.replace(b'"objective":', b'"objective":"', 1),
    ],
    ids=["first line", "last line", "no fields", "unknown operation", "binary", "list", "renamed", "half a string"],
)
def test_damaged_journal(begun: Path, shared: Path, damage: Callable[[bytes], bytes]) -> None:
    file = begun / "trials.journal"
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    one_line(bolaco(*compress("out")), "out.work/trials.journal: the trial journal is damaged")
    file.unlink()  # as the message says
    ok(*compress("out"))
    assert what_counts("out") == what_counts(shared / "out")


# --- a full disk --------------------------------------------------------------------------------------------------


def bytes_needed() -> int:
    """Factors of every matrix but v at its highest multiple of 4, and at most 21,664 parameters of a checkpoint."""
    sites = [site for site in inspect_structure(tiny_llama()).sites if site.type != "v"]
    sides = [(site.out_features + site.in_features, site.size) for site in sites]
    return 4 * (sum((size - 1) // both // 4 * 4 * both for both, size in sides) + 21_664)


def test_too_little_space_is_seen_before_the_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = bytes_needed()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    refused(compress("out"), "no space left for the factors and the checkpoint: about 0.1 MiB are needed")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    ok(*compress("out", "--search", "none"))


def test_the_cache_on_disk_counts_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = bytes_needed() + 8 * 32 * 32 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    refused(compress("out", calibration_cache="disk"), "no space left")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    ok(*compress("out", "--search", "none", calibration_cache="disk"))


@pytest.mark.parametrize("kind", ["OSError", "SafetensorError"])
def test_full_disk_while_writing_factors(place: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    calls = []

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) < 2:
            save_file(tensors, path)
            return
        path.write_bytes(b"half")
        if kind == "OSError":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise blockstore.SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(blockstore, "save_file", full)
        one_line(bolaco(*compress("out", "--search", "none")), "no space left on the disk", "give the same command")
    first = Path("out.work/factors/block-00000.safetensors")
    written = first.stat().st_mtime_ns
    assert not Path("out").exists()
    ok(*compress("out", "--search", "none", "--keep-work"))
    assert first.stat().st_mtime_ns == written
    ok(*compress("fresh", "--search", "none"))
    assert what_counts("out") == what_counts("fresh")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small disk, or changes how it is mounted."""
    disk = tmp_path / "disk"

    def mounted(*options: str) -> Path:
        disk.mkdir(exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)]
        try:
            subprocess.run(words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("may not mount a disk here")
        return disk

    yield mounted
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_that_is_full_from_the_start(place: Path, mount: Callable[..., Path]) -> None:
    (mount("size=8k") / "data").write_bytes(bytes(8192))
    refused(compress("disk/out"), "no space left on the disk")


@pytest.mark.parametrize(("size", "stage"), [("32k", "factorize"), ("148k", "write")])
def test_really_full_disk(
    place: Path, mount: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, size: str, stage: str
) -> None:
    disk = mount(f"size={size}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))  # the estimate lets it pass
    words = compress("disk/out", "--search", "none")
    one_line(bolaco(*words), "no space left on the disk")
    assert not (disk / "out").exists()
    assert list(disk.glob(".*")) == []
    finished = {file: file.stat().st_mtime_ns for file in disk.glob("out.work/factors/*.safetensors")}
    assert len(finished) == {"factorize": 0, "write": 2}[stage]
    assert (disk / "out.work").exists() == (stage == "write")
    mount("remount", "size=4m")
    ok(*words, "--keep-work")
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    ok(*compress("fresh", "--search", "none"))
    assert what_counts("disk/out") == what_counts("fresh")


def test_read_only_disk(place: Path, mount: Callable[..., Path]) -> None:
    mount("size=1m", "ro")
    refused(compress("disk/out"), "disk/out.work.lock: Read-only file system")


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


def test_interrupt(place: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = pipeline._Evaluator.scores
    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return scores(*args)

    words = compress("out")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Evaluator, "scores", interrupted)
        done = bolaco(*words)
    assert done.code == 130
    assert done.err.splitlines()[-1] == "bolaco: stopped; the same command continues where this one was"
    assert "Traceback" not in done.err
    assert not Path("out").exists()
    assert not Path("out.work.lock").exists()
    again = ok(*words)
    assert "search: 2 trials are in the ledger already" in again.err
    assert what_counts("out") == what_counts(shared / "out")


# --- the other commands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--seq-len", "0"], "seq_len must be at least 2"),
        (["--seq-len", "1"], "seq_len must be at least 2"),
        (["--seq-len", "129"], "128 positions"),
        (["--seq-len", "32", "--limit", "0"], "limit must be at least 1"),
        (["--seq-len", "32", "--limit", "-1"], "limit must be at least 1"),
        (["--seq-len", "32", "--limit", "900"], "too short for evaluation"),
        (["--seq-len", "32", "--json", "gone/it.json"], "--json gone/it.json: there is no such folder"),
        (["--seq-len", "32", "--data", "gone.txt"], "gone.txt: no such file"),
        (["--seq-len", "32", "--bos", "window", "--device", "toaster"], "device 'toaster'"),
    ],
)
def test_eval(place: Path, words: list[str], part: str) -> None:
    refused(["eval", "model", "--data", "other.txt", *words], part)


def test_eval_of_no_model(place: Path) -> None:
    refused(["eval", "./gone", "--data", "other.txt"], "./gone: no such folder")


@pytest.mark.parametrize("folder", ["gone", "model"])
def test_inspect_of_no_result(place: Path, folder: str) -> None:
    refused(["inspect", folder], f"{folder}: no bolaco.json in it")


@pytest.mark.parametrize("text", ["", "{", json.dumps({"ranks": {}})])
def test_inspect_of_a_damaged_result(place: Path, text: str) -> None:
    Path("result").mkdir()
    Path("result/bolaco.json").write_text(text)
    refused(["inspect", "result"], "result/bolaco.json: damaged")


def test_export_of_no_result(place: Path) -> None:
    refused(["export", "model", "--dense", "-o", "stock"], "model: a llama model, not a compressed one")


def test_export_over_something(place: Path, shared: Path) -> None:
    Path("stock").mkdir()
    words = ["export", str(shared / "out"), "--dense", "--drop-bias", "-o", "stock"]
    refused(words, "stock: exists already")


# --- all of it in a process of its own ----------------------------------------------------------------------------


def test_what_a_shell_sees(place: Path) -> None:
    """No warning, bar or traceback of any library around the one line."""
    changed(lambda m: m.model.layers[0].mlp.down_proj.weight.fill_(1e38))
    words = [sys.executable, "-m", "bolaco.cli", *compress("out", model="changed")]
    run = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 1
    assert re.fullmatch(r"loading changed\nbolaco: error: block 0: [^\n]+\n", run.stderr)
    assert run.stdout == ""
    assert not Path("out.work").exists()


def test_result_is_whole(shared: Path) -> None:
    """The result the damages above are compared with."""
    assert len(info(shared / "out")["trials"]) == 3
