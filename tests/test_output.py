"""What commands give to programs: JSON, quiet and verbose progress, logs, the hub, several sizes at once."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bolaco import cli
from bolaco.checkpoint.info import read_info
from bolaco.errors import CheckpointError
from bolaco.evaluation.speed import Speed
from bolaco.factorize import run as factorize_run
from bolaco.models.load import load_model
from bolaco.parser import SHELLS, command_parser
from bolaco.progress import Reporter
from bolaco.runs import several
from bolaco.settings import json_text
from bolaco.version import __version__
from tests.command import Done, bolaco, compress, furnish, info, ok, snapshot, what_counts
from tests.models import save_tiny, tiny_deep

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A furnished folder with the result ``small``; leave it as it is."""
    folder = furnish(tmp_path_factory.mktemp("shared"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ok(*quick("small"))
    return folder


@pytest.fixture
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, as the current one."""
    monkeypatch.chdir(furnish(tmp_path, shared / "model"))
    (tmp_path / "small").symlink_to(shared / "small")
    return tmp_path


def quick(out: str, *more: str) -> list[str]:
    """A small `compress` without a search."""
    return compress(out, "--preset", "default", *more, refinement_steps=0)


def strict(done: Done) -> Any:
    """The one JSON document that is all of the standard output; Python's own extensions are refused."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(done.out, parse_constant=refuse)


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_compress_prints_one_document(place: Path) -> None:
    done = ok(*quick("out", "--json"))
    found = strict(done)
    assert found.pop("path") == "out"
    assert found == info("out")
    assert "factorize" in done.err or "statistics" in done.err or "loading" in done.err


def test_inspect_prints_what_the_folder_says(place: Path) -> None:
    assert strict(ok("inspect", "small", "--json")) == {"path": "small"} | info("small")
    done = bolaco("inspect", "small", "--json", "--html", "page.html")
    assert (done.code, done.out) == (1, "")


@pytest.mark.parametrize("more", [[], ["--preset", "chop", "--set", "method.pattern=both"], ["--search", "uniform"]])
def test_a_dry_run_has_the_numbers_of_the_run(place: Path, more: list[str]) -> None:
    words = ["compress", "model", "--target-size", "70kB" if "chop" not in more else "90kB", *more]
    words += ["--calibration", "text.txt", "--eval", "other.txt", "--set", "calibration.seq_len=32"]
    words += ["--set", "calibration.sequences=8", "--set", "evaluation.windows=2"]
    found = strict(ok(*words, "--dry-run", "--json"))
    assert found["dry_run"] is True
    assert found["recipe"]["target_size"] == (90_000 if "chop" in more else 70_000)
    assert found["bytes"] <= found["recipe"]["target_size"]
    dense = info("small")
    for name in ("parameters_dense", "parameters_linears_dense", "bytes_dense", "dtype_dense", "layers_dense"):
        assert found[name] == dense[name]
    if "uniform" in more:
        ok(*words, "--set", "refinement.steps=0", "-o", "out")
        run = info("out")
        for name in ("keep", "parameters", "parameters_linears", "dtype", "layers", "ranks", "method"):
            assert found[name] == run[name]


SPEED = Speed("model", "float32", 10, 40, 5, 0.5, 1000, {1: 3.5}, {1: float("inf")})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds need a process for each model; that they are printed does not."""
    monkeypatch.setattr("bolaco.evaluation.speed.measure_apart", lambda model, **_: replace(SPEED, model=model))


def test_bench_and_eval_print_what_they_write(place: Path, measured: None) -> None:
    words = ["bench", "model", "small", "--batch", "1"]
    printed = strict(ok(*words, "--json"))
    assert [speed["model"] for speed in printed] == ["model", "small"]
    assert printed[0] == asdict(SPEED) | {"prefill": {"1": 3.5}, "decode": {"1": "Infinity"}}
    assert "ratios are to the first model" in ok(*words, "--json", "speed.json").out
    assert json.loads(Path("speed.json").read_text()) == printed
    words = ["eval", "small", "--data", "other.txt", "--seq-len", "32", "--limit", "2"]
    printed = strict(ok(*words, "--json"))
    assert ok(*words, "--json", "result.json").out.startswith("perplexity ")
    written = json.loads(Path("result.json").read_text())
    assert printed.keys() == written.keys()
    assert printed["perplexity"] == written["perplexity"]


def test_what_is_not_finite_is_a_string() -> None:
    assert json.loads(json_text({"a": [float("inf"), float("nan"), -float("inf"), 1.5]})) == {
        "a": ["Infinity", "NaN", "-Infinity", 1.5]
    }


def test_an_error_prints_no_document(place: Path) -> None:
    words = ["compress", "model", "--target-size", "1kB", "--calibration", "text.txt", "--eval", "other.txt"]
    sizes = ["calibration.seq_len=32", "calibration.sequences=8", "evaluation.windows=2"]
    done = bolaco(*words, *(word for size in sizes for word in ("--set", size)), "--json", "--dry-run")
    assert (done.code, done.out) == (1, "")
    assert "smallest possible" in done.err


def test_the_fields_are_documented(place: Path, measured: None) -> None:
    text = (DOCS / "json.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    dry = strict(ok(*quick("out", "--dry-run", "--json")))
    (speed,) = strict(ok("bench", "model", "--json"))
    scored = strict(ok("eval", "model", "--data", "other.txt", "--seq-len", "32", "--limit", "1", "--json"))
    for fields in (info("small"), dry, speed, scored):
        assert fields.keys() <= named


# --- loudness and the log -----------------------------------------------------------------------------------------


def test_quiet_and_verbose(place: Path) -> None:
    assert ok(*quick("a", "-q")).err == ""
    usual, loud = ok(*quick("b")).err.splitlines(), ok(*quick("c", "-v")).err.splitlines()
    assert usual[0] == "loading model"
    assert any(f"bolaco {__version__}," in line for line in loud)
    assert any(re.fullmatch(r"load: \d+\.\d s, [\d,]+ MiB resident at most so far", line) for line in loud)
    assert len(loud) > len(usual)
    assert bolaco(*quick("d", "-q", "-v")).code == 2


@pytest.mark.parametrize("loudness", [[], ["-q"]])
def test_the_log_says_everything_with_its_time(place: Path, loudness: list[str]) -> None:
    ok(*quick("out", "--keep-work", *loudness))
    lines = Path("out.work/log.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    text = "\n".join(line[20:] for line in lines)
    for part in (
        f"bolaco {__version__},",
        "LowRankRecipe {",
        "loading model",
        "evaluate the result: begins, 4 to do",
        "factorize: ",
    ):
        assert part in text
    ok(*quick("again", "--work", "out.work"))
    assert not Path("out.work").exists()


def test_the_log_has_the_traceback_of_a_failure(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The screen has one line."""

    def fail(*_: object) -> None:
        raise CheckpointError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr("bolaco.runs.compress.perplexities_of", fail)
        done = bolaco(*quick("out"))
    assert done.code == 1
    assert done.err.splitlines()[-1] == "bolaco: error: no such luck"
    text = Path("out.work/log.txt").read_text(encoding="utf-8")
    assert "Traceback" in text
    assert "no such luck" in text
    ok(*quick("out"))
    assert not Path("out.work").exists()


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = Reporter(quiet=True)
    with reporter.logged(tmp_path / "log.txt"):
        reporter.say("one")
        assert reporter._log is not None
        reporter._log.close()

        class Full:
            def write(self, text: str) -> None:
                raise OSError(28, "No space left on device")

            close = write

        reporter._log = Full()  # type: ignore[assignment]
        reporter.say("two")
        Full.close = lambda self: None  # type: ignore[assignment]
    assert (tmp_path / "log.txt").read_text().endswith(" one\n")


# --- several keep ratios ------------------------------------------------------------------------------------------

KEEP = ("0.9", "0.8", "0.7")


def several_words(out: str, *more: str) -> list[str]:
    words = quick(out, *more)
    words[words.index("--keep") + 1] = ",".join(KEEP)
    return words


def test_several_sizes_share_statistics_and_factors(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result is what a run of its own gives."""
    passes: list[int] = []
    real = factorize_run.factorize
    monkeypatch.setattr("bolaco.runs.factors.factorize", lambda *a, **k: (passes.append(1), real(*a, **k))[1])
    done = ok(*several_words("out"))
    assert len(passes) == 1
    assert {path.name for path in Path("out").iterdir()} == {"keep-0.9", "keep-0.8", "keep-0.7", "table.md"}
    assert not Path("out.work").exists()
    sizes = [read_info(f"out/keep-{keep}").bytes for keep in KEEP]
    assert sizes == sorted(sizes, reverse=True)
    for keep in KEEP:
        words = quick("single")
        words[words.index("--keep") + 1] = keep
        words[words.index("-o") + 1] = f"single-{keep}"
        ok(*words)
        assert what_counts(f"out/keep-{keep}") == what_counts(f"single-{keep}")
        for text in (f"single-{keep}", f"out/keep-{keep}"):
            assert f'from_pretrained("{Path(text).name}"' in (Path(text) / "README.md").read_text(encoding="utf-8")
        assert f"keep-{keep}" in done.out
    table = Path("out/table.md").read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in table[2:6]] == ["original", *(f"keep-{keep}" for keep in KEEP)]
    assert load_model("out/keep-0.7").config.model_type == "lowrank_llama"


@pytest.mark.parametrize("preset", ["chop", "joint", "lpaf"])
def test_other_recipes_at_several_sizes(place: Path, preset: str) -> None:
    words = compress("out", "--preset", preset)
    words[words.index("--keep") + 1] = "1,0.9"
    if preset == "chop":
        save_tiny(Path("deep"), tiny_deep("llama", 4))
        words[1] = "deep"
    if preset == "lpaf":
        words += ["--set", "method.steps=2"]
    found = strict(ok(*words, "--json"))
    assert list(found["results"]) == ["keep-1", "keep-0.9"]
    assert found["results"]["keep-0.9"]["keep"] == 0.9


@pytest.mark.parametrize("at", ["keep-0.8", "the end"])
def test_a_killed_run_of_several_sizes_goes_on(place: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = several.compress_loaded

    def stop(recipe: Any, out: Path, *more: Any) -> Any:
        if out.name == at:
            raise KeyboardInterrupt
        return real(recipe, out, *more)

    with monkeypatch.context() as patch:
        patch.setattr(several, "compress_loaded", stop)
        if at == "the end":
            patch.setattr(several.shutil, "copytree", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        assert bolaco(*several_words("out")).code == 130
    assert not Path("out").exists()
    done = ok(*several_words("out"))
    already = re.findall(r"^(keep-\S+): is there already$", done.err, re.MULTILINE)
    assert already == (["keep-0.9"] if at == "keep-0.8" else [f"keep-{keep}" for keep in KEEP])
    assert len(list(Path("out").glob("keep-*"))) == 3
    assert not any(".partial-" in path for path in snapshot())


@pytest.mark.parametrize(
    ("keep", "code", "message"),
    [
        ("0.9,x", 2, "expected numbers with commas between"),
        ("", 2, "expected numbers with commas between"),
        ("0.9,", 2, "expected numbers with commas between"),
        ("0.9,1.5", 1, "keep: must be above 0 and at most 1"),
        ("0.9,nan", 1, "keep: must be above 0 and at most 1"),
        ("1.5,0.9", 1, "keep: "),
        ("0.9,0.01", 1, "keep 0.01 allows"),  # before anything is computed
    ],
)
def test_bad_ratios(place: Path, keep: str, code: int, message: str) -> None:
    words = quick("out")
    words[words.index("--keep") + 1] = keep
    done = bolaco(*words)
    assert done.code == code
    assert message in done.err
    assert not Path("out").exists()
    assert not Path("out.work").exists()


def test_what_is_about_one_result(place: Path) -> None:
    for more in (["--print-recipe"], ["--push-to-hub", "me/small"]):
        done = bolaco(*several_words("out", *more))
        assert (done.code, done.out) == (1, "")
        assert f"{more[0]} is about one result" in done.err
    assert len(strict(ok(*several_words("out", "--dry-run", "--json")))) == 3
    assert "keep-0.8:" in ok(*several_words("out", "--dry-run")).out


# --- the hub ------------------------------------------------------------------------------------------------------


class FakeHub:
    """A hub that takes everything, and remembers it."""

    calls: list[tuple[str, Any]]
    fails: str = ""

    def _called(self, name: str, value: Any) -> None:
        type(self).calls.append((name, value))
        if name == self.fails:
            raise RuntimeError("the hub is closed\nfor today")

    def whoami(self) -> dict[str, str]:
        self._called("whoami", None)
        return {"name": "me"}

    def create_repo(self, repo_id: str, **words: Any) -> Any:
        self._called("create_repo", (repo_id, words))
        url = type("Url", (str,), {"repo_id": f"me/{repo_id}"})
        return url(f"https://hub/me/{repo_id}")

    def upload_folder(self, **words: Any) -> None:
        self._called("upload_folder", (words["repo_id"], sorted(path.name for path in words["folder_path"].iterdir())))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    fake = type("Fake", (FakeHub,), {"calls": []})
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    return fake


def test_a_result_is_uploaded(place: Path, hub: type[FakeHub]) -> None:
    done = ok(*quick("out", "--push-to-hub", "small", "--json"))
    assert [name for name, _ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1] == ("small", {"repo_type": "model", "private": True, "exist_ok": True})
    assert hub.calls[2][1] == ("me/small", sorted(path.name for path in Path("out").iterdir()))
    assert done.err.splitlines()[-1] == "uploaded to https://hub/me/small"
    assert strict(done)["path"] == "out"


def test_who_is_not_logged_in_hears_it_first(place: Path, hub: type[FakeHub]) -> None:
    hub.fails = "whoami"
    before = snapshot()
    done = bolaco(*quick("out", "--push-to-hub", "small"))
    assert (done.code, done.out) == (1, "")
    assert "the hub does not know who you are (the hub is closed); log in first" in done.err
    assert snapshot() == before


@pytest.mark.parametrize("name", ["a/b/c", "with space", "-x-", "a//b", "name.git"])
def test_a_name_that_is_none(place: Path, hub: type[FakeHub], name: str) -> None:
    done = bolaco(*quick("out"), f"--push-to-hub={name}")
    assert done.code == 1
    assert f"--push-to-hub {name}: a repository is called NAME or OWNER/NAME" in done.err
    assert hub.calls == []


@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
def test_an_upload_that_fails_leaves_the_result(place: Path, hub: type[FakeHub], call: str) -> None:
    hub.fails = call
    done = bolaco(*quick("out", "--push-to-hub", "small"))
    assert done.code == 1
    assert "out: is written, but was not uploaded (the hub is closed)" in done.err
    assert "hf upload small out" in done.err
    assert info("out")["keep"] == 0.8


# --- completion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("shtab") is None:
        pytest.skip("shtab is not installed")
    script = ok("completion", shell).out
    assert "target-size" in script
    assert "compress" in script


def test_completion_is_that_of_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("shtab")
    fake.complete = lambda parser, shell: f"{shell} {parser.format_usage()}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shtab", fake)
    assert ok("completion", "zsh").out == f"zsh {command_parser().format_usage()}\n"


def test_completion_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    done = bolaco("completion", "bash")
    assert (done.code, done.out) == (1, "")
    assert "pip install 'bolaco[completion]'" in done.err
    assert cli._COMMANDS.keys() >= {"completion"}


def test_several_results_are_not_tuned(place: Path) -> None:
    """Tuning would otherwise be left out without a word."""
    words = ["compress", "model", "--keep", "0.9,0.8", "--calibration", "text.txt", "--tune", "factors", "-o", "out"]
    for more in ([], ["--dry-run"]):
        done = bolaco(*words, *more)
        assert (done.code, done.out) == (1, "")
        assert "tuning: it is of one result" in done.err
