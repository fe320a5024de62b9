"""`bolaco compare`: rows as single runs give them, from statistics that are computed once; failures; resumption."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bolaco import api
from bolaco.comparison import rows
from bolaco.comparison import run as comparing
from bolaco.comparison.plan import Comparison, make_comparison
from bolaco.data.texts import Texts
from bolaco.errors import NonFiniteError, RecipeError
from bolaco.factorize import run
from bolaco.factorize.methods import fwsvd
from bolaco.models.find import inspect_structure
from bolaco.models.load import load_model
from bolaco.progress import Reporter
from bolaco.recipe.presets import PRESETS
from bolaco.recipe.recipe import load_recipe, preset_of
from bolaco.runs import compress, factors, measure
from bolaco.runs.factors import FactorPlan
from bolaco.runs.session import Session, Source, load
from bolaco.statistics import fisher, stored
from bolaco.storage.budget import Budget
from bolaco.storage.storage import STORAGES
from bolaco.work.folder import Clock, WorkFolder
from tests.command import SMALL, bolaco, furnish, info, ok, snapshot
from tests.models import mostly_slow, slow, tiny_llama, tiny_tokenizer, token_blocks
from tests.processes import killed
from tests.test_resume import counted

METHODS = ("default", "bolaco-5x1", "fwsvd", "svd")
KEEP = ("0.8", "0.6")
SETTINGS = SMALL | {
    "calibration.gradient_sequences": 4,
    "search.trials": 2,  # for those that search
    "default:refinement.steps": 2,
    "default:refinement.sequences": 4,
}
GOLDEN = Path(__file__).parent / "golden"
QUESTIONS = [{"query": "Which one?", "choices": ["the river", "a house"], "gold": i % 2} for i in range(4)]


def words(out: str = "out", methods: str = ",".join(METHODS), keep: str = ",".join(KEEP), *more: str) -> list[str]:
    found = ["compare", "model", "--methods", methods, "--keep", keep, "--calibration", "text.txt"]
    found += ["--eval", "other.txt,third.txt", "--seq-len", "32", "-o", out]
    for name, value in settings_for(methods).items():
        found += ["--set", f"{name}={value}"]
    return [*found, *more]


def settings_for(methods: str) -> dict[str, Any]:
    """Of :data:`SETTINGS` those that one of the methods has a field for."""
    searches = "5x1" in methods
    return {
        name: value
        for name, value in SETTINGS.items()
        if ("default" in methods or not name.startswith("default:"))
        and (searches or name not in ("search.trials", "search.initial"))
    }


def prepared(folder: Path, model: Path | None = None) -> Path:
    furnish(folder, model)
    shutil.copy(folder / "other.txt", folder / "third.txt")
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    return folder


def results(out: str | Path) -> dict[str, Any]:
    return json.loads((Path(out) / "results.json").read_text(encoding="utf-8"))


def what_counts(out: str | Path) -> Any:
    """What two runs of one comparison have in common."""
    record = results(out)
    del record["seconds"]
    for row in record["rows"]:
        for name in ("seconds", "peak_bytes"):
            row.pop(name, None)
        for trial in row.get("trials", ()):
            del trial["seconds"]
    return record


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def calls() -> dict[str, int]:
    """How often the shared stages ran in the comparison of the fixture ``shared``."""
    return {}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, calls: dict[str, int]) -> Path:
    """A furnished folder with the comparison ``out``, which keeps its models and has tasks."""
    folder = prepared(tmp_path_factory.mktemp("shared"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "100")
        seen = {
            "blocks": counted(patch, run, "collect"),
            "walks": counted(patch, run, "input_walk"),
            "gradients": counted(patch, stored, "gradient_walk"),
            "first": counted(patch, measure, "perplexity"),
            "others": counted(patch, rows, "perplexity"),
        }
        tasks = ("--tasks", "questions.jsonl", "--task-limit", "3", "--task-keep", "0.6", "--keep-models")
        said = ok(*words("out", ",".join(METHODS), ",".join(KEEP), *tasks))
        calls.update({name: len(found) for name, found in seen.items()})
        (folder / "said.txt").write_text(said.out, encoding="utf-8")
    return folder


@pytest.fixture
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A furnished folder of the test's own, as the current one."""
    monkeypatch.chdir(prepared(tmp_path, shared / "model"))
    return tmp_path


# --- results ------------------------------------------------------------------------------------------------------


def test_rows(shared: Path) -> None:
    record = results(shared / "out")
    assert [(row["method"], row["keep"]) for row in record["rows"]] == [(m, float(k)) for k in KEEP for m in METHODS]
    assert all("error" not in row for row in record["rows"])
    model = load_model(str(shared / "model"))
    sites = inspect_structure(model).sites
    for row in record["rows"]:
        budget = Budget(sites, row["keep"], STORAGES.get(row["storage"]))
        assert row["parameters_linears"] == budget.cost(row["ranks"]) <= budget.limit
        assert row["keep_linears"] == row["parameters_linears"] / 15_360
        assert row["peak_bytes"] > 10**7
        for before, after, gap in zip(record["dense"]["perplexity"], row["perplexity"], row["gap"], strict=True):
            assert gap == pytest.approx(math.log(after / before), abs=1e-9)
        # third.txt is a copy of other.txt, measured on its own.
        assert row["perplexity"][1] == pytest.approx(row["perplexity"][0], rel=1e-6)
        assert (row["tasks"] == {}) == (row["keep"] == 0.8)
    assert [text["source"] for text in record["texts"]] == ["other.txt", "third.txt"]
    assert record["dense"]["tasks"]["questions.jsonl"]["examples"] == 3


@pytest.mark.parametrize("name", ["default-0.6", "bolaco-5x1-0.8", slow("fwsvd-0.8"), slow("svd-0.6")])
def test_a_row_is_what_a_single_run_gives(name: str, shared: Path, place: Path) -> None:
    """Also where the shared factors reach further, and are of more matrices, than the run's own."""
    ok("run", str(shared / f"out/recipes/{name}.yaml"), "-o", "single")
    single, row = info("single"), next(row for row in results(shared / "out")["rows"] if row["name"] == name)
    assert single["ranks"] == row["ranks"]
    assert single["perplexity"]["compressed"] == pytest.approx(row["perplexity"][0], rel=1e-4)
    assert [t["ranks"] for t in single["trials"]] == [t["ranks"] for t in row["trials"]]
    assert info(shared / f"out/models/{name}")["ranks"] == row["ranks"]


def test_a_row_that_computes_its_own_factors(shared: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = comparing._common_plan
    monkeypatch.setattr(comparing, "_common_plan", lambda s, n, r: None if r.method.name == "fwsvd" else plan(s, n, r))
    own = counted(monkeypatch, stored, "gradient_walk")
    passes = counted(monkeypatch, factors, "factorize")
    ok(*words("out", "svd,fwsvd", "0.8"))
    known = {row["name"]: row for row in results(shared / "out")["rows"]}
    for row in results("out")["rows"]:
        assert row["ranks"] == known[row["name"]]["ranks"]
        assert row["perplexity"] == pytest.approx(known[row["name"]]["perplexity"], rel=1e-4)
    assert len(own) == 1  # of fwsvd, in its own run
    assert [[job.method.method.name for job in jobs] for _, jobs, *_ in passes] == [["svd"], ["fwsvd"]]


def test_what_is_shared_is_computed_once(shared: Path, calls: dict[str, int]) -> None:
    assert calls["walks"] == 1  # over the calibration text, for four methods at two sizes
    assert calls["blocks"] == 2  # of the model
    assert calls["gradients"] == 2  # one for each kind of statistic
    assert calls["first"] == 1 + 8  # the original and every row, on the first text
    assert calls["others"] == 1 + 8  # and on the second


def test_files(shared: Path) -> None:
    out, record = shared / "out", results(shared / "out")
    assert {path.name for path in out.iterdir()} == {
        *("table.md", "table.csv", "results.json", "report.html", "frontier.svg", "bytes.svg", "recipes", "models")
    }
    names = {row["name"] for row in record["rows"]}
    assert {path.stem for path in (out / "recipes").iterdir()} == {path.name for path in (out / "models").iterdir()}
    assert {path.name for path in (out / "models").iterdir()} == names
    for row in record["rows"]:
        assert load_recipe(out / f"recipes/{row['name']}.yaml").model_dump(mode="json") == row["recipe"]
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    plain = [f"dense, {row['name']}" for row in record["quantized"]]
    assert [row["method"] for row in table] == ["dense", *plain, *(row["method"] for row in record["rows"])]
    for cells, row in zip(table[1 + len(plain) :], record["rows"], strict=True):
        assert int(cells["parameters"]) == row["parameters"]
        assert float(cells["perplexity other.txt"]) == row["perplexity"][0]
        assert float(cells["gap third.txt"]) == row["gap"][1]
    lines = (out / "table.md").read_text(encoding="utf-8").splitlines()
    widths = {line.count("|") for line in lines if line.startswith("| ") and "questions" not in line}
    assert len([line for line in lines if line.startswith("| ")]) == (3 + len(plain) + 8) + 2 * (3 + 4)
    assert len(widths) == 2  # of the results, and of the tasks
    svg = ET.parse(out / "frontier.svg").getroot()
    assert len([e for e in svg.iter() if e.get("class") == "mark"]) == 8 + len(METHODS)  # and the legend
    assert not (shared / "out.work").exists()


def test_said(shared: Path) -> None:
    said = (shared / "said.txt").read_text(encoding="utf-8")
    assert said.endswith("written to out\n")
    assert all(method in said for method in ("dense", *METHODS))
    assert f"{results(shared / 'out')['rows'][0]['gap'][0]:.3f}" in said


def test_a_loaded_model_is_left_as_it_is(place: Path) -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = settings_for("svd,svd-llm")
    found = api.compare(
        *(model, ["svd", "svd", "svd-llm"], [0.7], "out"),
        tokenizer=tiny_tokenizer(),
        calibration="text.txt",
        evaluation="other.txt",
        seq_len=32,
        options=options,
    )
    assert [row.name for row in found.record.rows] == ["svd-0.7", "svd-llm-0.7"]
    assert found.failed == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {path.name for path in Path().iterdir()} >= {"out"}
    assert not Path("out/models").exists()


# --- names and keys -----------------------------------------------------------------------------------------------


def test_names() -> None:
    recipes = make_comparison("m", ["mpifa", "afm", "lpaf", "bolaco", "chop"], [0.8]).recipes
    assert recipes["mpifa-0.8"].refinement.drift == 0.25
    plain = recipes["afm-0.8"]
    assert (plain.method.name, plain.storage, plain.search.name) == ("afm", "two-factor", "uniform")
    assert not plain.refinement.active
    assert (recipes["bolaco-0.8"].method.name, recipes["bolaco-0.8"].search.name) == ("afm", "5x1")
    assert (recipes["lpaf-0.8"].method.name, recipes["chop-0.8"].method.name) == ("lpaf", "chop")
    assert preset_of("afm") == ("default", plain_values("afm"))
    assert preset_of("mpifa") == ("mpifa", {})
    assert preset_of("bolaco") == ("bolaco-5x1", {})
    other = make_comparison("m", ["afm", "svd"], [0.8], options={"afm:search.name": "spectral"}).recipes
    assert [recipe.search.name for recipe in other.values()] == ["spectral", "uniform"]
    with pytest.raises(RecipeError, match=r"unknown method or preset 'svd-lm'; did you mean 'svd-llm'\?"):
        preset_of("svd-lm")
    with pytest.raises(RecipeError, match=r"known are default, .*kfac"):
        preset_of("zzzzzz")


def plain_values(method: str) -> dict[str, Any]:
    """As the one-shot presets, but with another method."""
    return PRESETS["svd-llm"] | {"method": {"name": method}}


def plans_of(comparison: Comparison, folder: Path) -> dict[str, FactorPlan | None]:
    """What each row needs of factors that others can use, for a tiny model; its texts are as long as its recipe says.

    A text is as many of the same tokens as there are sequences: little, but another one for another number.
    """
    source = Source("tiny", tiny_llama(), None, tiny_tokenizer())
    blocks = token_blocks(8, 16)
    found: dict[str, FactorPlan | None] = {}
    with WorkFolder(folder, comparison) as work:
        session = Session(work, Clock(work.path, comparison), Reporter(quiet=True))
        loaded = load(source, "auto", "cpu")
        texts = {
            name: Texts(blocks[: min(recipe.calibration.sequences, 8)], blocks, blocks, "text")
            for name, recipe in comparison.recipes.items()
        }
        common = rows.Common(comparison, loaded, texts, None, session)
        for name, recipe in comparison.recipes.items():
            found[name] = comparing._common_plan(common, name, recipe)
    return found


def test_what_decides_whether_something_is_shared(tmp_path: Path) -> None:
    options = {"asvd:calibration.sequences": 7, "search.rank_multiple": 4, "kfac:method.shrinkage": 0.3}
    comparison = make_comparison("m", [*PRESETS, "svd", "kfac"], [0.8, 0.5], options=options)
    plans = plans_of(comparison, tmp_path / "work")
    # Those that change the model before, or that factor nothing, have nothing to share.
    assert {name.rpartition("-")[0] for name, plan in plans.items() if plan is None} == {"lpaf", "chop"}
    keys = {name: plan.artefact.key for name, plan in plans.items() if plan is not None}
    passes = {name: plan.pass_key for name, plan in plans.items() if plan is not None}
    for preset in PRESETS:
        assert keys.get(f"{preset}-0.8") == keys.get(f"{preset}-0.5")
    assert keys["mpifa-0.8"] == keys["svd-llm-0.8"]  # storage is no matter of factors
    assert keys["bolaco-5x1-0.8"] == keys["bolaco-5x4-0.8"]  # nor is the search
    assert keys["welore-0.8"] == keys["svd-0.8"]
    assert keys["joint-0.8"] != keys["svd-0.8"]  # of stacks
    assert keys["kfac-svd-0.8"] != keys["svd-llm-0.8"]
    assert keys["kfac-svd-0.8"] == keys["default-0.8"]
    assert keys["kfac-0.8"] != keys["kfac-svd-0.8"]  # of another shrinkage, but of the same gradients
    gradients = {
        name: [place.path for place in plan.statistics.values()] for name, plan in plans.items() if plan is not None
    }
    assert gradients["kfac-0.8"] == gradients["kfac-svd-0.5"] != gradients["fwsvd-0.8"]
    assert passes["kfac-svd-0.8"] == passes["svd-llm-0.8"]
    assert passes["asvd-0.8"] != passes["svd-llm-0.8"]
    assert comparison.recipes["fwsvd-0.8"].calibration.sequences == 128


def test_what_is_said_for_all_reaches_those_that_have_it() -> None:
    options = {
        "search.trials": 3,
        "method.shrinkage": 0.3,
        "method.steps": 5,
        "method.pattern": "both",
        "refinement.damping": 0.5,
        "evaluation.windows": 3,
        "kfac:method.shrinkage": 0.6,
    }
    methods = ["default", "kfac", "bolaco-5x1", "svd", "lpaf", "chop"]
    recipes = make_comparison("m", methods, [0.8], options=options).recipes
    values = {name.removesuffix("-0.8"): recipe.model_dump(mode="json") for name, recipe in recipes.items()}
    assert {name: v["search"].get("trials") for name, v in values.items() if "search" in v} == {
        **dict.fromkeys(methods[:-1]),
        "bolaco-5x1": 3,
    }
    assert values["default"]["method"] == {"name": "kfac", "shrinkage": 0.3}
    assert values["kfac"]["method"] == {"name": "kfac", "shrinkage": 0.6}  # what is said of one is said last
    assert values["bolaco-5x1"]["method"] == {"name": "afm"}
    assert values["lpaf"]["method"]["steps"] == 5
    assert values["chop"]["method"] == {"name": "chop", "pattern": "both"}
    assert [v["evaluation"]["windows"] for v in values.values()] == [3] * len(methods)
    assert all(v["refinement"]["damping"] == 0.5 for name, v in values.items() if name != "chop")
    assert "refinement" not in values["chop"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"search.trials": 3}, "--set search.trials: none of the methods compared has such a field"),
        ({"method.alpha": 1}, "--set method.alpha: none of the methods compared has such a field"),
        ({"svd:method.alpha": 1}, "method.alpha: method 'svd' has no such option"),
        ({"asvd:method.alpha": 1}, "--set asvd:method.alpha: 'asvd' is not one of the methods compared"),
        ({"chop:refinement.steps": 1}, "refinement contradicts method chop"),
        ({"nothing.at_all": 1}, "nothing: there is no such field"),
        ({"calibration.sequence": 1}, "calibration.sequence: there is no such field; did you mean 'sequences'?"),
        ({"factorization.storage": "pivoted"}, "factorization.storage: is called storage now"),
    ],
)
def test_a_field_that_no_row_has_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        make_comparison("m", ["svd", "kfac", "chop"], [0.8], options=options)


# --- errors -------------------------------------------------------------------------------------------------------


def masked(line: str) -> str:
    """Without what tests of other parts say."""
    return re.sub(r"(expected one of|known are) .*", r"\1 ...", line)


BAD = {
    "unknown method": words(methods="svd,kfac-svt"),
    "keep out of range": words(methods="svd", keep="0.8,1.2"),
    "keep is no number": words(methods="svd", keep="0.8;0.7"),
    "no method": words(methods=","),
    "bad eval source": words("out", "svd", "0.8", "--eval", "other.txt,nothing.txt"),
    "option of a stranger": words("out", "svd", "0.8", "--set", "asvd:search.min_keep=0.3"),
    "unknown field": words("out", "svd", "0.8", "--set", "search.minkeep=0.3"),
    "another model": words("out", "svd,afm", "0.8", "--set", "svd:dtype=bfloat16"),
    "task limit without tasks": words("out", "svd", "0.8", "--task-limit", "3"),
    "task keep": words("out", "svd", "0.8", "--tasks", "questions.jsonl", "--task-keep", "0.7"),
    "task file": words("out", "svd", "0.8", "--tasks", "no.jsonl"),
    "different text": words("out", "svd,bolaco-5x1", "0.8", "--eval", "text.txt"),
}


def test_errors_are_one_line_and_leave_nothing(place: Path) -> None:
    before = snapshot()
    lines = []
    for name, given in BAD.items():
        done = bolaco(*given)
        assert done.code == 1, name
        assert done.out == ""
        error = [line for line in done.err.splitlines() if line != "loading model"]
        lines.append(f"{name}: {masked(' '.join(error))}\n")
        assert snapshot() == before, name
    assert "".join(lines) == (GOLDEN / "compare-errors.txt").read_text(encoding="utf-8")


def test_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    said = " ".join(bolaco("compare", "--help").out.split())
    said = said.replace("-o OUT, --out OUT", "-o, --out OUT")  # as Python 3.13 writes it
    expected = (GOLDEN / "compare-help.txt").read_text(encoding="utf-8")
    assert said == " ".join(expected.split())


def test_an_existing_output_is_refused(shared: Path, place: Path) -> None:
    Path("out").mkdir()
    before = snapshot()
    done = bolaco(*words())
    assert done.code == 1
    assert done.err.startswith("bolaco: error: out: exists already")
    assert snapshot() == before


def test_a_method_that_fails_does_not_stop_the_others(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the shared pass over the text, where it must not take the others with it."""

    def broken(*_: Any) -> Any:
        raise NonFiniteError("NaN in\nthe weights")

    monkeypatch.setattr(fwsvd, "METHOD", replace(fwsvd.METHOD, prepare=broken))
    done = ok(*words("out", "fwsvd,svd", "0.8"))
    assert "fwsvd at keep 0.8 failed: NaN in the weights" in done.out
    rows = {row["method"]: row for row in results("out")["rows"]}
    assert rows["fwsvd"]["error"] == "NaN in the weights"
    assert rows["svd"]["gap"][0] is not None
    assert "failed: NaN in the weights" in Path("out/table.md").read_text(encoding="utf-8")
    assert "NaN in the weights" in Path("out/report.html").read_text(encoding="utf-8")
    alone = ok(*words("alone", "svd", "0.8"))
    assert "failed" not in alone.out
    assert results("alone")["rows"][0]["perplexity"] == rows["svd"]["perplexity"]


def test_a_statistic_that_fails_stops_only_who_needs_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise NonFiniteError("a gradient is NaN")

    monkeypatch.setattr(fisher._WeightFisher, "update", broken)
    ok(*words("out", "fwsvd,kfac-svd", "0.8,0.7"))
    errors = {row["name"]: row.get("error") for row in results("out")["rows"]}
    assert "a gradient is NaN" in errors["fwsvd-0.8"]
    assert errors["fwsvd-0.7"] == errors["fwsvd-0.8"]
    assert errors["kfac-svd-0.8"] is errors["kfac-svd-0.7"] is None


def test_a_budget_that_cannot_be_met_is_a_row(place: Path) -> None:
    done = ok(*words("out", "kfac-svd", "0.8,0.01"))
    assert re.search(r"kfac-svd at keep 0.01 failed: keep 0.01 allows 153 parameters", done.out)
    assert ["error" in row for row in results("out")["rows"]] == [False, True]


def test_nothing_but_failures(place: Path) -> None:
    done = bolaco(*words("out", "kfac-svd", "0.01"))
    assert done.code == 1
    assert done.err.endswith("bolaco: error: out: no row has a result\n")
    assert not Path("out/frontier.svg").exists()
    assert Path("out/report.html").exists()


def test_a_defect_is_not_a_row(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: Any) -> Any:
        raise KeyError("ours")

    with monkeypatch.context() as patch:
        patch.setattr(compress, "perplexities_of", defect)
        with pytest.raises(KeyError):
            bolaco(*words("out", "svd", "0.8"))
        exhausted = RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")
        patch.setattr(compress, "perplexities_of", lambda *_: (_ for _ in ()).throw(exhausted))
        assert "memory" in bolaco(*words("out", "svd", "0.8")).err
        assert not Path("out").exists()
        full = OSError(28, "No space left on device", "disk")
        patch.setattr(compress, "perplexities_of", lambda *_: (_ for _ in ()).throw(full))
        assert "no space left on the disk" in bolaco(*words("out", "svd", "0.8")).err
    assert not Path("out").exists()
    ok(*words("out", "svd", "0.8"))


# --- resumption ---------------------------------------------------------------------------------------------------

# moment -> (function, in which call of it, "before" or "after" it does its work)
MOMENTS = {
    "in the pass over the text": ("bolaco.factorize.store.FactorStore.save", 2, "after"),
    "between two rows": ("bolaco.comparison.run.make_row", 2, "before"),
    "before a row is recorded": ("bolaco.comparison.run.make_row", 2, "after"),
    "while the result is written": ("bolaco.comparison.run.write_results", 1, "before"),
}


@pytest.fixture(scope="module")
def undisturbed(shared: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shared)
        ok(*words("undisturbed", "default,svd", "0.7"))
    return shared / "undisturbed"


@pytest.mark.parametrize("moment", mostly_slow(MOMENTS, "in the pass over the text", "before a row is recorded"))
def test_killed(moment: str, undisturbed: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = words("out", "default,svd", "0.7")
    done = killed(*MOMENTS[moment], given)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not Path("out").exists()
    number = list(MOMENTS).index(moment)
    if number:  # what is finished can be looked at
        table = Path("out.work/table.md").read_text(encoding="utf-8").splitlines()
        assert [line.split("|")[1].strip() for line in table if "| 0.7 |" in line] == ["default", "svd"][
            : (1, 1, 2)[number - 1]
        ]
        assert "<html" in Path("out.work/report.html").read_text(encoding="utf-8")
    made = counted(monkeypatch, comparing, "make_row")
    runs = counted(monkeypatch, rows, "compress_loaded")
    collected = counted(monkeypatch, run, "collect")
    ok(*given)
    assert len(made) == (2, 1, 1, 0)[number]
    assert len(runs) == (2, 1, 0, 0)[number]
    assert len(collected) == (1 if number == 0 else 0)
    assert what_counts("out") == what_counts(undisturbed)
    assert {path.name for path in Path().iterdir()} == {
        *("model", "text.txt", "other.txt", "third.txt", "questions.jsonl", "out")
    }


def left_in(work: Path) -> dict[str, int]:
    """How many folders each stage has left in a work folder."""
    found: dict[str, int] = {}
    for path in work.iterdir():
        if path.is_dir():
            stage = path.name.rpartition("-")[0]
            found[stage] = found.get(stage, 0) + 1
    return found


def test_rows_use_the_work_folder_of_the_comparison(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds statistics and factors there; what only one of them needed is gone when it is finished."""
    during: list[dict[str, int]] = []
    original = comparing.make_row

    def watched(*given: Any) -> Any:
        result = original(*given)
        during.append(left_in(Path("out.work")))
        return result

    monkeypatch.setattr(comparing, "make_row", watched)
    walks = counted(monkeypatch, run, "input_walk")
    gradients = counted(monkeypatch, stored, "gradient_walk")
    passes = counted(monkeypatch, factors, "factorize")
    methods = "default,kfac-svd,bolaco-5x1,lpaf,fwsvd"
    ok(*words("out", methods, "0.8,0.7", "--set", "lpaf:method.steps=2", "--keep-work"))
    assert len(walks) == 1
    assert len(gradients) == 2
    # One pass for all, and one for each row of lpaf, whose matrices are its own.
    assert [len(jobs) for _, jobs, *_ in passes] == [3, 1, 1]
    common = {"gradient": 1, "fisher": 1, "factors": 3}
    own = [{"refined": 1}, {}, {"search": 1}, {"subject": 1, "factors": 1}, {}]
    for i, found in enumerate(during):
        expected = common | {"row": 1}
        for stage, count in own[i % 5].items():
            expected[stage] = expected.get(stage, 0) + count
        assert found == expected, i
    assert left_in(Path("out.work")) == common
    files = {path.name.rpartition("-")[0] for path in Path("out.work").glob("*.json")}
    assert files == {"row", "dense", "dense-all", "plain", ""}  # recipe.json and seconds
    assert not Path("out.work.lock").exists()


def test_a_changed_option_of_one_method_computes_its_rows_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok(*words("out", "kfac-svd,svd-llm,fwsvd", "0.8,0.7", "--keep-work"))
    made = counted(monkeypatch, comparing, "make_row")
    gradients = counted(monkeypatch, stored, "gradient_walk")
    passes = counted(monkeypatch, factors, "factorize")
    evaluated = counted(monkeypatch, measure, "perplexity")
    more = ("--work", "out.work", "--keep-work")
    ok(*words("same", "kfac-svd,svd-llm,fwsvd", "0.8,0.7", *more))
    assert made == gradients == passes == evaluated == []
    assert what_counts("same") == what_counts("out")
    ok(*words("other", "kfac-svd,svd-llm,fwsvd", "0.8,0.7", *more, "--set", "kfac-svd:method.shrinkage=0.9"))
    assert [(method, keep) for _, _, method, keep, _ in made] == [("kfac-svd", 0.8), ("kfac-svd", 0.7)]
    assert gradients == []  # what it does not change is still there
    assert [[job.method.method.name for job in jobs] for _, jobs, *_ in passes] == [["kfac"]]
    assert len(evaluated) == 2
    before, after = ({row["name"]: row for row in what_counts(out)["rows"]} for out in ("out", "other"))
    assert {name for name in before if before[name] != after[name]} == {"kfac-svd-0.8", "kfac-svd-0.7"}
    assert after["kfac-svd-0.8"]["perplexity"] != before["kfac-svd-0.8"]["perplexity"]
    # A row more is that row, from factors that are there.
    made.clear()
    passes.clear()
    ok(*words("more", "kfac-svd,svd-llm,fwsvd", "0.8,0.7,0.6", *more))
    assert [(method, keep) for _, _, method, keep, _ in made] == [(m, 0.6) for m in ("kfac-svd", "svd-llm", "fwsvd")]
    assert passes == []
    ok(*words("fresh", "kfac-svd", "0.6"))
    (fresh,), reused = results("fresh")["rows"], results("more")["rows"][-3]
    assert (fresh["ranks"], fresh["name"]) == (reused["ranks"], reused["name"])
    assert fresh["perplexity"] == pytest.approx(reused["perplexity"], rel=1e-4)


def test_an_option_of_the_evaluation_computes_no_factors_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok(*words("out", "svd-llm", "0.8", "--keep-work"))
    passes = counted(monkeypatch, factors, "factorize")
    ok(*words("other", "svd-llm", "0.8", "--work", "out.work", "--set", "evaluation.windows=3"))
    assert passes == []
    assert results("other")["texts"][0]["windows"] == 3
    assert not Path("out.work").exists()


def test_models_that_are_wanted_later_are_made(place: Path) -> None:
    ok(*words("out", "svd", "0.8", "--keep-work"))
    ok(*words("models", "svd", "0.8", "--work", "out.work", "--keep-models", "--keep-work"))
    assert info("models/models/svd-0.8")["ranks"] == results("out")["rows"][0]["ranks"]
    assert what_counts("models")["rows"] == what_counts("out")["rows"]


def test_another_comparison_in_the_same_work_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupted one has finished is used as far as it is the same."""
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "write_results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert bolaco(*words("out", "svd", "0.8")).code == 130
    assert Path("out.work/table.md").exists()
    passes = counted(monkeypatch, factors, "factorize")
    ok(*words("out", "svd", "0.7"))
    assert passes == []
    assert [row["name"] for row in results("out")["rows"]] == ["svd-0.7"]
    assert not Path("out.work").exists()
