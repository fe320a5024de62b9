"""The command line, from words to printed lines."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

from bolaco.factorize import METHODS
from bolaco.models.load import load_model
from bolaco.progress import Reporter
from bolaco.recipe.presets import PRESETS, SYSTEMS
from bolaco.recipe.recipe import load_recipe
from tests.command import PROGRESS, bolaco, compress, furnish, info, ok, snapshot
from tests.models import save_tiny, tiny_llama

COMMANDS = (
    "compress",
    "compare",
    "run",
    "eval",
    "tune",
    "generate-text",
    "distill",
    "bench",
    "inspect",
    "export",
    "delta",
    "methods",
)
METHOD_NAMES = sorted({*METHODS.names(), *SYSTEMS})
GOLDEN = Path(__file__).parent / "golden"
LINEARS = 15_360  # of the tiny Llama: 2 x (32x32 + 2 x 16x32 + 32x32 + 3 x 32x48)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A furnished folder with three results: ``small`` (5x1), ``split`` (5x4) and ``hand`` (the hand allocation)."""
    folder = furnish(tmp_path_factory.mktemp("shared"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        said = ok(*compress("small", "--trials", "4"))
        (folder / "small.txt").write_text(said.out, encoding="utf-8")
        (folder / "small.log").write_text(said.err, encoding="utf-8")
        ok(*compress("split", "--trials", "4", "--search", "5x4"))
        ok(*compress("hand", "--search", "hand"))
    return folder


@pytest.fixture
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, as the current one."""
    monkeypatch.chdir(furnish(tmp_path, shared / "model"))
    return tmp_path


def budget_kept(record: dict) -> bool:
    return record["parameters_linears"] <= 0.8 * LINEARS == 12_288 and record["parameters_linears_dense"] == LINEARS


def as_number(rank: int | None) -> float:
    return float("inf") if rank is None else rank


def masked(text: str) -> str:
    """Numbers (and ranks that are "dense") as N, and columns without their widths."""
    text = re.sub(r"[+-]?\d[\d,]*(\.\d+)?", "N", text)
    text = re.sub(r"(?<=│ )dense ", "N ", text)
    text = re.sub(r"([━─])+", r"\1", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines()) + "\n"


# --- help ---------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    script = """
import sys, time
from bolaco.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert not stop.code
heavy = {"torch", "transformers", "numpy", "optuna", "datasets", "pydantic", "lm_eval"} & set(sys.modules)
print("HEAVY", sorted(heavy), "CPU", time.process_time())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "examples:" in run.stdout
    assert run.stdout.count("bolaco compress ") >= 4
    assert re.search(r"^An interrupted run continues", run.stdout, re.MULTILINE)
    heavy, seconds = re.search(r"HEAVY (.*) CPU (.*)", run.stdout).groups()
    assert heavy == "[]"
    assert float(seconds) < 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = bolaco(command, "--help")
    assert done.code == 0
    assert done.out.startswith(f"usage: bolaco {command}")


def test_help_lists_every_command() -> None:
    listed = re.findall(r"^    ([\w-]+)(?: |$)", bolaco("--help").out, re.MULTILINE)
    assert listed == [*COMMANDS, "completion"]


def test_version() -> None:
    assert re.fullmatch(r"bolaco \d+\.\d+\.\d+\n", bolaco("--version").out)


@pytest.mark.parametrize("words", [(), ("compres",), ("compress",), ("export", "delta", "x", "-o", "y")])
def test_wrong_usage_is_exit_2(words: tuple[str, ...]) -> None:
    assert bolaco(*words).code == 2


def test_methods() -> None:
    kinds: dict[str, dict[str, list[str]]] = {}
    for line in ok("methods").out.splitlines():
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) == 1 and line[:1].isalpha():
            rows = kinds[line.strip()] = {}
        elif len(cells) == 6 and cells[1]:
            rows[cells[1]] = cells[2:5]
    factorizations = {"svd", "asvd", "fwsvd", "svd-llm", "afm", "kfac", "joint", "lpaf"}
    assert {kind: set(rows) for kind, rows in kinds.items()} == {
        "factorization": factorizations,
        "allocation": {"bolaco", "welore"},
        "transform": {"chop"},
        "ways to find ranks": {"spectral", "5x1", "5x4", "uniform", "welore", "hand"},
        "forms of a factored matrix": {"two-factor", "pivoted", "shared"},
        "what is trained": {"diagonal", "factors", "lora", "continued", "mixed-rank", "sketch", "tt-lora"},
        "what a fine-tune adds, in few bits": {"default", "delta-come", "lowrank", "bitdelta", "ultradelta"},
    }
    assert kinds["allocation"]["welore"][0] == kinds["ways to find ranks"]["welore"][0] == "arXiv 2407.11239"
    assert kinds["transform"]["chop"][0] == "arXiv 2305.14864"
    assert kinds["factorization"]["lpaf"][0] == "arXiv 2306.14152"
    assert kinds["forms of a factored matrix"]["pivoted"][0] == "arXiv 2501.19090"
    assert {cells[-1] for rows in kinds.values() for cells in rows.values()} == {"bolaco"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kfac", ["method kfac (arXiv 2505.17974): ", "method.shrinkage", "0.1", "mean eigenvalue"]),
        ("svd", ["method svd (Eckart-Young 1936): plain truncated SVD"]),
        ("chop", ["method chop (arXiv 2305.14864)", "method.pattern", "preset chop, beside the defaults:"]),
        ("lpaf", ["method lpaf", "method.keep_sparse", "method.steps", "64", "preset lpaf"]),
        ("spectral", ["search spectral: closed form"]),
        ("5x4", ["search 5x4 (arXiv 2405.10616)", "search.trials", "50", "search.kl_weight"]),
        ("welore", ["search welore", "search.min_ratio", "preset welore, beside the defaults:", "name: svd"]),
        ("uniform", ["search uniform: one ratio for all matrices", "search.min_keep"]),
        ("pivoted", ["storage pivoted (arXiv 2501.19090)"]),
        ("bolaco", ["method bolaco (arXiv 2405.10616)"]),
        ("paper", ["preset paper, beside the defaults:", "sequences: 1024"]),
        ("sketch", ["mode sketch (arXiv 2410.06364)", "options.bits"]),
    ],
)
def test_methods_shows_one_with_its_options(name: str, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = ok("methods", name).out
    assert [part for part in said if part not in out] == []


def test_methods_of_no_such_name() -> None:
    done = bolaco("methods", "kfacc")
    assert (done.code, done.out) == (1, "")
    assert done.err == "bolaco: error: nothing is called 'kfacc'; did you mean 'kfac'?\n"


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_every_method_makes_a_recipe_that_reads_back(name: str, tmp_path: Path) -> None:
    """As written by --print-recipe, where systems have become their parts."""
    text = ok("compress", "m", "--keep", "0.7", "--method", name, "--print-recipe").out
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").to_yaml() == text
    values = yaml.safe_load(text)
    parts = {
        "bolaco": ("afm", "two-factor", "5x1"),
        "welore": ("svd", "two-factor", "welore"),
        "joint": ("svd", "shared", "uniform"),
        "lpaf": ("lpaf", "two-factor", "uniform"),
        "chop": ("chop", None, None),
    }.get(name, (name, "two-factor", "uniform"))
    assert (values["method"]["name"], values.get("storage"), values.get("search", {}).get("name")) == parts
    assert values.get("refinement", {"fit": False, "steps": 0}).items() >= {"fit": False, "steps": 0}.items()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "chop", "--storage", "pivoted"), "storage pivoted contradicts method chop: it removes blocks"),
        (("--method", "chop", "--search", "5x1"), "search contradicts method chop: it removes blocks"),
        (("--preset", "chop", "--search", "5x1"), "search contradicts method chop: it removes blocks"),
        (("--method", "chop", "--set", "refinement.steps=3"), "refinement contradicts method chop"),
        (("--method", "joint", "--search", "5x4"), "search.name 5x4 is not possible with shared storage"),
        (("--method", "joint", "--storage", "two-factor"), "storage two-factor contradicts method joint"),
        (("--method", "welore", "--search", "spectral"), "search.name spectral contradicts method welore"),
        (("--method", "bolaco", "--search", "welore"), "search.name welore contradicts method bolaco"),
        (("--method", "lpaf", "--search", "5x1"), "search.name 5x1 contradicts method lpaf"),
        (("--method", "welore", "--preset", "aa-svd"), "welore is a recipe of its own and so is the preset aa-svd"),
        (("--method", "welore", "--preset", "default"), "welore is a recipe of its own and so is the preset default"),
        (("--method", "mpifa", "--preset", "default"), "mpifa is a recipe of its own and so is the preset default"),
        (("--method", "svd", "--preset", "chop"), "method svd contradicts the preset chop, which factors nothing"),
        (("--method", "wellore"), "method.name: unknown method 'wellore'; did you mean 'welore'?"),
        (("--method", "kfacc"), "method.name: unknown method 'kfacc'; did you mean 'kfac'?"),
        (("--search", "spectrall"), "search.name: unknown search 'spectrall'; did you mean 'spectral'?"),
        (("--search", "none"), "search.name: unknown search 'none'; known are "),
        (("--storage", "pivotted"), "storage: unknown storage 'pivotted'; did you mean 'pivoted'?"),
        (("--storage", "dense"), "storage: unknown storage 'dense'; known are "),
        (("--trials", "3"), "search.trials: search 'spectral' has no such option"),
        (("--set", "search.ranks_multiple=3"), "search.ranks_multiple: search 'spectral' has no such option"),
        (("--search", "5x1", "--set", "search.slak=0"), "search '5x1' has no such option; did you mean 'slack'?"),
        (("--set", "method.shrinkige=0"), "method 'kfac' has no such option; did you mean 'shrinkage'?"),
        (("--set", "factorization.method=svd"), "factorization.method: is called method.name now"),
    ],
)
def test_contradictions_are_refused_in_one_line(words: tuple[str, ...], said: str) -> None:
    done = bolaco("compress", "nowhere", "--keep", "0.7", *words, "-o", "x")
    assert done.code == 1
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_system_goes_with_its_own_presets_and_options() -> None:
    assert recipe("--method", "bolaco", "--preset", "paper")["calibration"]["sequences"] == 1024
    assert recipe("--method", "bolaco", "--search", "5x4")["search"]["name"] == "5x4"
    assert recipe("--method", "welore", "--storage", "pivoted")["storage"] == "pivoted"
    joint = recipe("--preset", "joint", "--method", "afm")
    assert (joint["method"], joint["storage"]) == ({"name": "afm"}, "shared")
    assert recipe("--method", "lpaf", "--set", "method.steps=4")["method"]["steps"] == 4
    assert recipe("--method", "chop", "--set", "method.pattern=input")["method"] == {"name": "chop", "pattern": "input"}


# --- the recipe ---------------------------------------------------------------------------------------------------


def recipe(*words: str) -> dict:
    return yaml.safe_load(ok("compress", "m", "--keep", "0.7", *words, "--print-recipe").out)


def test_words_reach_the_recipe() -> None:
    words = {
        "--search": ("search.name", "5x4"),
        "--trials": ("search.trials", 7),
        "--method": ("method.name", "svd"),
        "--storage": ("storage", "two-factor"),
        "--calibration": ("calibration.source", "a.txt"),
        "--text-column": ("calibration.text_column", "body"),
        "--validation": ("validation.source", "b.txt"),
        "--eval": ("evaluation.source", "c.txt"),
        "--seq-len": ("calibration.seq_len", 64),
        "--warm-start": ("search.warm_start", "there"),
        "--seed": ("seed", 3),
        "--dtype": ("dtype", "bfloat16"),
        "--device": ("device", "cpu"),
    }
    given = recipe(*(part for word, (_, value) in words.items() for part in (word, str(value))))
    default = recipe()
    assert given["model"] == "m"
    assert given["keep"] == 0.7
    for name, value in words.values():
        section, _, field = name.rpartition(".")
        assert (given[section] if section else given)[field] == value
        assert (default[section] if section else default).get(field) != value


def test_preset_paper() -> None:
    paper = recipe("--preset", "paper")
    assert {k: paper["calibration"][k] for k in ("source", "sequences", "seq_len", "groups")} == {
        "source": "allenai/c4",
        "sequences": 1024,
        "seq_len": 4096,
        "groups": 32,
    }
    assert {k: paper["validation"][k] for k in ("sequences", "allocations", "seq_len")} == {
        "sequences": 100,
        "allocations": 20,
        "seq_len": 4096,
    }
    assert {k: paper["search"][k] for k in ("trials", "slack", "surrogate", "fill", "kl_weight")} == {
        "trials": 50,
        "slack": 0.1,
        "surrogate": "paper",
        "fill": False,
        "kl_weight": 0.001,
    }
    assert paper["evaluation"]["windows"] is None
    assert recipe("--preset", "paper", "--seq-len", "64")["calibration"]["seq_len"] == 64


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("search.fill=false", False),
        ("search.slack=0.05", 0.05),
        ("search.kl_weight=1e-3", 0.001),
        ("search.min_keep=0.3", 0.3),
        ("search.dense_types=[v, o]", ["v", "o"]),
        ("search.dense_types=[]", []),
        ("evaluation.windows=null", None),
        ("validation.batch=2", 2),
        ("calibration.source=c4.jsonl[:1000]", "c4.jsonl[:1000]"),
        ("calibration.source='a=b'", "a=b"),
    ],
)
def test_set_has_types(pair: str, value: object) -> None:
    section, field = pair.partition("=")[0].split(".")
    found = recipe("--preset", "bolaco-5x1", "--set", pair)[section][field]
    assert found == value
    assert type(found) is type(value)


def test_run_of_the_printed_recipe_gives_the_same(place: Path, shared: Path) -> None:
    words = compress("again", "--trials", "4")
    printed = ok(*words, "--print-recipe").out
    assert not Path("again").exists()
    Path("recipe.yaml").write_text(printed, encoding="utf-8")
    ok("run", "recipe.yaml", "-o", "again")
    assert info("again")["recipe"] == info(shared / "small")["recipe"] == yaml.safe_load(printed)
    assert info("again")["ranks"] == info(shared / "small")["ranks"]


# --- compress -----------------------------------------------------------------------------------------------------


def test_search_5x1(shared: Path) -> None:
    record = info(shared / "small")
    assert budget_kept(record)
    assert record["dimensions"] == ["qk", "o", "gate", "up", "down"]
    assert len(record["trials"]) == 4
    by_type = {name.replace("layers.1", "layers.0"): rank for name, rank in record["ranks"].items()}
    assert len(by_type) == 7
    assert all(record["ranks"][name] == by_type[name.replace("layers.1", "layers.0")] for name in record["ranks"])
    best = min(record["trials"], key=lambda trial: trial["objective"])
    assert [by_type[f"model.layers.0.self_attn.{t}_proj"] for t in "qk"] == best["ranks"]["qk"]


def test_search_5x4(shared: Path) -> None:
    record = info(shared / "split")
    assert budget_kept(record)
    # Two layers are two of the four runs of layers.
    assert record["dimensions"] == [f"{name}/{part}" for part in (1, 3) for name in ("qk", "o", "gate", "up", "down")]
    assert len(record["trials"]) == 4


def test_search_hand_takes_the_hand_allocation(shared: Path) -> None:
    record = info(shared / "hand")
    assert budget_kept(record)
    assert record["trials"] == []
    first = info(shared / "small")["trials"][0]
    assert [record["ranks"][f"model.layers.1.self_attn.{t}_proj"] for t in "qk"] == first["ranks"]["qk"]
    assert record["ranks"]["model.layers.0.self_attn.v_proj"] is None


@pytest.mark.parametrize("method", ["svd", "svd-llm"])
def test_method(place: Path, method: str) -> None:
    ok(*compress("out", "--search", "hand", "--method", method))
    assert info("out")["method"] == method


def test_keep_1_is_the_original(place: Path) -> None:
    ok(*compress("out", "--search", "hand", "--keep", "1"))
    assert set(info("out")["ranks"].values()) == {None}
    ppl = info("out")["perplexity"]
    assert ppl["compressed"] == pytest.approx(ppl["dense"], rel=1e-6)


def test_warm_start_of_the_closed_form_lowers_no_rank_within_the_budget(place: Path, shared: Path) -> None:
    start, cold = info(shared / "split")["ranks"], ["--search", "spectral"]
    ok(*compress("cold", *cold))
    ok(*compress("out", *cold, "--warm-start", shared / "split"))
    assert budget_kept(info("out"))
    assert [name for name, rank in info("out")["ranks"].items() if as_number(rank) < as_number(start[name])] == []
    assert [name for name, rank in info("cold")["ranks"].items() if as_number(rank) < as_number(start[name])] != []
    assert info("out")["trials"] == []


@pytest.mark.parametrize("search", ["hand", "uniform", "welore"])
def test_warm_start_of_what_looks_at_no_earlier_ranks_is_refused(search: str, place: Path, shared: Path) -> None:
    done = bolaco(*compress("out", "--search", search, "--warm-start", shared / "split"))
    assert (done.code, done.out) == (1, "")
    assert done.err == f"bolaco: error: search.warm_start is not possible with search {search}; leave it out\n"


def test_warm_start_with_search_tries_them_first(place: Path, shared: Path) -> None:
    known = info(shared / "small")
    best = min(known["trials"], key=lambda trial: trial["objective"])
    hand = known["trials"][0]
    assert best["ranks"] != hand["ranks"]
    ok(*compress("out", "--trials", "2", "--seed", "5", "--warm-start", shared / "small"))
    first, second = info("out")["trials"]
    assert first["ranks"] == best["ranks"]
    assert second["ranks"] == hand["ranks"]


def share(ranks: dict[str, int | None], types: tuple[str, ...]) -> float:
    """Share of the parameters of matrices of these types that pivoted storage of these ranks keeps."""
    shapes = {"q": (32, 32), "k": (16, 32), "o": (32, 32), "gate": (48, 32), "up": (48, 32), "down": (32, 48)}
    kept = size = 0
    for kind in types:
        rows, columns = shapes[kind]
        for rank in (rank for name, rank in ranks.items() if name.endswith(f".{kind}_proj")):
            kept += rows * columns if rank is None else rank * (rows + columns - rank)
            size += rows * columns
    return kept / size


def test_a_finetune_takes_over_the_ranks_of_its_base_model(place: Path) -> None:
    """With the default recipe as they are, as they meet the budget; with a search as the first trial."""
    quick = ("--set", "refinement.steps=0", "--preset", "default")
    ok(*compress("base", *quick, "--search", "spectral"))
    tuned = load_model("model")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_tiny(place / "finetune", tuned)
    ok(*compress("own", *quick, "--search", "spectral", model="finetune"))
    assert info("own")["ranks"] != info("base")["ranks"]
    ok(*compress("out", *quick, "--search", "spectral", "--warm-start", "base", model="finetune"))
    assert info("out")["ranks"] == info("base")["ranks"]
    assert info("out")["trials"] == []
    ok(*compress("searched", *quick, "--search", "5x1", "--trials", "2", "--warm-start", "base", model="finetune"))
    start, hand = info("searched")["trials"]
    for kind, keep in start["keep"].items():
        types = ("q", "k") if kind == "qk" else (kind,)
        assert keep == pytest.approx(share(info("base")["ranks"], types), abs=0.1)  # a step of the rank is 0.1
    assert start["keep"] != hand["keep"]


def test_warm_start_above_the_budget_is_lowered(place: Path, shared: Path) -> None:
    start = info(shared / "small")["ranks"]
    ok(*compress("out", "--search", "spectral", "--warm-start", shared / "small", "--keep", "0.6"))
    assert info("out")["parameters_linears"] <= 0.6 * LINEARS
    assert [name for name, rank in info("out")["ranks"].items() if as_number(rank) > as_number(start[name])] == []
    ok(*compress("searched", "--warm-start", shared / "small", "--keep", "0.6"))
    assert info("searched")["parameters_linears"] <= 0.6 * LINEARS


def test_warm_start_below_the_budget_is_raised(place: Path, shared: Path) -> None:
    """The result is what its title says, not what it was started from."""
    start = info(shared / "small")["ranks"]
    ok(*compress("out", "--search", "spectral", "--warm-start", shared / "small", "--keep", "0.9"))
    assert [name for name, rank in info("out")["ranks"].items() if as_number(rank) < as_number(start[name])] == []
    ok(*compress("searched", "--trials", "2", "--warm-start", shared / "small", "--keep", "0.9"))
    for name in ("out", "searched"):
        assert 0.85 < info(name)["keep_linears"] <= info(name)["keep"] == 0.9


def test_warm_start_of_another_architecture_is_refused_at_once(place: Path, shared: Path) -> None:
    save_tiny(place / "wide", tiny_llama(hidden_size=48))
    for search in ("spectral", "5x1"):
        for more in ((), ("--dry-run",)):
            done = bolaco(*compress("out", "--search", search, "--warm-start", shared / "small", *more, model="wide"))
            assert (done.code, done.out) == (1, "")
            assert "32 x 32 in that result and 48 x 48 in this model; it is of another architecture" in done.err
    assert not Path("out.work").exists()


def test_output_in_a_folder_that_does_not_exist_yet(place: Path) -> None:
    before = set(snapshot())
    ok(*compress("new/deep/out", "--search", "hand"))
    assert info("new/deep/out")
    made = {path for path in set(snapshot()) - before if not path.startswith("new/deep/out/")}
    assert made == {"new", "new/deep", "new/deep/out"}


def test_names_are_printed_as_they_are(place: Path) -> None:
    """No markup, no emoji codes: these would vanish, change or fail in rich's own language."""
    name = "a[red]b:smile:"
    Path("model").rename(name)
    done = ok(*compress("out[bold]", "--search", "hand", model=f"./{name}"))
    assert f"loading ./{name}" in done.err
    assert f"./{name}, keep 0.8" in done.out
    assert "written to out[bold]" in done.out
    assert f"./{name}, keep 0.8" in ok("inspect", "out[bold]").out


# --- what is printed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compress", "inspect"])
def test_golden(shared: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(shared)
    text = Path("small.txt").read_text(encoding="utf-8") if name == "compress" else ok("inspect", "small").out
    assert masked(text) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_log_has_one_line_per_stage(shared: Path) -> None:
    lines = (shared / "small.log").read_text(encoding="utf-8").splitlines()
    assert [re.sub(r" in \d+:\d\d$", "", line) for line in lines] == [
        "loading model",
        "recipe bolaco-5x1: method afm, two-factor storage, search 5x1, no refinement",
        "calibrate and factorize: 16/16",
        "evaluate the original: 4/4",
        "select validation text: 12/12",
        "reference: 3/3",
        "search: 4/4",
        "evaluate the result: 4/4",
    ]


def test_plain_lines_without_a_terminal(place: Path) -> None:
    """In a process of its own: libraries' bars, warnings and colours would show here."""
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    run = subprocess.run(
        [sys.executable, "-m", "bolaco.cli", *compress("out")],
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert "\x1b" not in run.stdout + run.stderr
    assert "\r" not in run.stdout + run.stderr
    assert [line for line in run.stderr.splitlines() if not PROGRESS.match(line)] == []
    assert run.stdout.splitlines()[-1] == "written to out"


def test_bar_with_the_remaining_time_in_a_terminal() -> None:
    screen = io.StringIO()
    reporter = Reporter(Console(file=screen, force_terminal=True, width=120))
    with reporter.stage("long work", 4) as tick:
        for _ in range(2):
            time.sleep(0.15)
            tick(1, "best 3.5")
        time.sleep(0.25)
        half = screen.getvalue()
        tick(2)
    frame = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", half).replace("\r", "\n").splitlines()[-1]
    assert re.search(r"long work .* 2/4 0:00:00 left 0:00:0\d best 3\.5", frame), frame
    assert "4/4" in screen.getvalue()


def test_lines_elsewhere() -> None:
    log = io.StringIO()
    reporter = Reporter(Console(file=log, width=40))
    with reporter.stage("long work", 3) as tick:
        for _ in range(3):
            tick()
        assert log.getvalue() == ""
    assert log.getvalue() == "long work: 3/3 in 0:00\n"


def test_lines_of_a_long_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    log, clock = io.StringIO(), iter([0.0, 4.0, 30.0, 60.0, 120.0])
    monkeypatch.setattr("bolaco.progress.time.monotonic", lambda: next(clock))
    with Reporter(Console(file=log, width=40)).stage("long work", 4) as tick:
        tick(1, "not yet")
        tick(1, "best 2.5 of a note that makes a long line")
        tick(2)
    assert log.getvalue().splitlines() == [
        "long work: 2/4, 0:30 gone, about 0:30 left  best 2.5 of a note that makes a long line",
        "long work: 4/4 in 2:00",
    ]


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(quiet=True)
    reporter.say("hush")
    with reporter.stage("long work", 1) as tick:
        tick()
    assert capfd.readouterr() == ("", "")


# --- dry run ------------------------------------------------------------------------------------------------------


def test_dry_run_needs_no_weights(place: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bare").mkdir()
    for file in (shared / "model").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, "bare")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    before = snapshot()
    done = ok(*compress("out", "--dry-run", model="bare"))
    assert snapshot() == before
    assert "budget 12,288 of 15,360 parameters in 14 decoder linears" in done.out
    ranks = info(shared / "hand")["ranks"]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.out.splitlines() if line.startswith("│")]
    expected = {name.split(".")[-1].removesuffix("_proj"): rank for name, rank in ranks.items()}
    assert {row[0]: row[3] for row in rows} == {t: "dense" if r is None else str(r) for t, r in expected.items()}
    assert f"hand allocation {info(shared / 'hand')['parameters_linears']:,} " in done.out
    assert "search 5x1 on 3 x 32 tokens of text.txt: " in done.out
    assert "trials 3, initial 2, slack 0.02, " in done.out


@pytest.mark.parametrize("search", ["uniform", "spectral"])
def test_dry_run_of_a_search_without_trials(search: str, place: Path) -> None:
    """Uniform ranks are known before the run; of the closed form the size is."""
    words = compress("out", "--keep", "0.7", "--search", search)
    said = ok(*words, "--dry-run").out
    assert "rank of the uniform allocation" in said
    assert ("come from the spectra" in said) == (search == "spectral")
    if search == "uniform":
        ok(*words)
        assert f"uniform allocation {info(place / 'out')['parameters_linears']:,} " in said


def test_dry_run_of_a_recipe_file(place: Path) -> None:
    recipe = "model: model\nkeep: 0.5\nsearch: {name: hand, rank_multiple: 4}\n"
    recipe += "calibration: {source: text.txt, sequences: 4, seq_len: 32}\nevaluation: {windows: 2}\n"
    Path("recipe.yaml").write_text(recipe)
    done = ok("run", "recipe.yaml", "--dry-run")
    assert "budget 7,680 of 15,360" in done.out
    assert "trials" not in done.out


@pytest.fixture
def wider(place: Path) -> Path:
    """A model with matrices of 64 columns, in which low ranks are a small share."""
    return save_tiny(place / "wider", tiny_llama(hidden_size=64, intermediate_size=96))


def test_a_keep_below_the_smallest_of_a_search_is_met_by_the_closed_form(wider: Path) -> None:
    words = compress("out", "--preset", "default", "--keep", "0.15", model="wider", search_rank_multiple=2)
    said = ok(*words, "--dry-run").out
    limit, total = re.search(r"budget ([\d,]+) of ([\d,]+) parameters", said).groups()
    assert "rank of the uniform allocation" in said
    assert "come from the spectra" in said
    ok(*words)
    record = info("out")
    assert record["parameters_linears"] <= int(limit.replace(",", "")) <= 0.15 * record["parameters_linears_dense"]
    assert record["parameters_linears_dense"] == int(total.replace(",", ""))


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_keep_that_no_rank_meets_is_said_in_the_closed_form_s_own_words(wider: Path, more: tuple[str, ...]) -> None:
    words = compress("out", "--preset", "default", "--keep", "0.01", model="wider", search_rank_multiple=2)
    done = bolaco(*words, *more)
    last = done.err.splitlines()[-1]
    assert (done.code, done.out) == (1, "")
    assert re.match(
        r"bolaco: error: keep 0\.01 allows [\d,]+ parameters in the decoder linears, but the smallest", last
    )
    assert last.endswith("raise --keep, or let more types be factored (search.dense_types)")
    assert "min_keep" not in last


# --- the other commands -------------------------------------------------------------------------------------------


def test_eval_equals_the_result_s_own_number(place: Path, shared: Path) -> None:
    done = ok("eval", shared / "small", "--data", "other.txt", "--seq-len", "32", "--limit", "4", "--json", "it.json")
    record = json.loads(Path("it.json").read_text())
    measured = info(shared / "small")["perplexity"]
    assert record["perplexity"] == measured["compressed"]
    assert record["tokens"] == measured["tokens"] == 4 * 31
    assert record["windows"] == 4
    assert record["seconds"] > 0
    assert record["data"] == "other.txt"
    assert f"perplexity {measured['compressed']:.4f} on 4 x 32 tokens of other.txt (124 predicted" in done.out


def test_eval_of_the_original(place: Path, shared: Path) -> None:
    ok("eval", "model", "--data", "other.txt", "--seq-len", "32", "--limit", "4", "--json", "it.json")
    dense = info(shared / "small")["perplexity"]["dense"]
    assert json.loads(Path("it.json").read_text())["perplexity"] == dense


def test_eval_without_a_limit_takes_all(place: Path) -> None:
    ok("eval", "model", "--data", "other.txt", "--seq-len", "32", "--json", "it.json")
    tokens = 400 // 32  # at least that many words, punctuation on top
    assert json.loads(Path("it.json").read_text())["windows"] > tokens


def test_inspect(shared: Path) -> None:
    record = info(shared / "small")
    out = ok("inspect", shared / "small").out
    ranks = ["dense" if r is None else str(r) for n, r in record["ranks"].items() if ".layers.0." in n]
    assert re.search(r"│ 0-1 +│ " + " +│ ".join(ranks) + r" +│", out)
    assert f"{record['keep_linears']:.4f}" in out
    history = re.search(r"best objective so far: (.*)", out)[1].split()
    assert len(history) == 4
    assert [float(x) for x in history] == sorted((float(x) for x in history), reverse=True)
    for number, trial in enumerate(record["trials"]):
        assert re.search(rf"│ {number} +│ {trial['objective']:.5g} ", out)


def test_inspect_of_5x4_shows_every_ratio(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 80 columns, nothing cut off."""
    monkeypatch.setenv("COLUMNS", "80")
    out = ok("inspect", shared / "split").out
    assert "…" not in out
    trials = out[out.index("best trials") :]
    for trial in info(shared / "split")["trials"]:
        assert all(f" {ratio:.2f} " in trials for ratio in trial["keep"].values())
    assert len(re.findall(r" [01]\.\d\d(?= )", trials)) == 4 * 10


def test_export_gives_a_stock_model(place: Path, shared: Path) -> None:
    done = ok("export", shared / "hand", "--dense", "--drop-bias", "-o", "stock")
    model = AutoModelForCausalLM.from_pretrained("stock")
    assert type(model) is type(tiny_llama())
    assert f"{model.num_parameters():,} parameters" in done.out
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    rank = info(shared / "hand")["ranks"]["model.layers.0.mlp.up_proj"]
    assert torch.linalg.matrix_rank(weight) == rank


def test_functions_of_the_package_are_not_hidden_by_its_folders() -> None:
    """Importing a subpackage sets an attribute of its name; none may be that of a public function."""
    package = importlib.import_module("bolaco")
    folder = Path(str(package.__file__)).parent
    # Folders of these names can be called (tests/test_notebook.py).
    hidden = {name for name in package.__all__ if (folder / name).exists() or (folder / f"{name}.py").exists()}
    assert hidden == {"delta", "distill", "tune"}


def test_presets_offered_are_those_there_are() -> None:
    offered = re.search(r"--preset \{([^}]*)\}", " ".join(bolaco("compress", "--help").out.split()))[1]
    assert re.sub(r"\s", "", offered).split(",") == list(PRESETS)
