"""A run killed at any moment, started again with the same command, ends as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bolaco.allocate.search.run import Evaluator
from bolaco.factorize import run
from bolaco.runs import compress as runs
from bolaco.work.blockstore import BlockStore
from tests.command import PROGRESS, bolaco, compress, digest, furnish, info, ok, what_counts
from tests.models import mostly_slow, slow
from tests.processes import killed

TRIALS = "4"
# moment -> (function, in which call of it, "before" or "after" it does its work)
MOMENTS = {
    "between two blocks": ("bolaco.factorize.store.FactorStore.save", 1, "after"),
    "while a block's factors are written": ("pathlib.Path.replace", 1, "before .safetensors"),
    "during the selection": ("bolaco.allocate.search.run.score", 2, "before"),
    "in the third trial": ("bolaco.allocate.search.run.Evaluator.scores", 3, "before"),
    "between two parts of a trial's record": ("optuna.trial.Trial.set_user_attr", 3, "after"),
    "before the checkpoint's weights": ("bolaco.runs.compress.write_model", 1, "before"),
    "after the checkpoint's weights": ("bolaco.runs.compress.write_model", 1, "after"),
    "before the last evaluation": ("bolaco.runs.compress.perplexities_of", 1, "before"),
}
# Of the default method, which has stages of its own.
DEFAULT_MOMENTS = {
    "between two blocks of gradients": ("bolaco.work.blockstore.BlockStore.write", 1, "after"),
    "between two refined blocks": ("bolaco.refine.train.BlockTrainer.train", 2, "before"),
    "while a refined block is written": ("bolaco.work.tensors.save_file", 8, "after"),
}


def searching(out: str, *more: str, trials: str = TRIALS) -> list[str]:
    """The words of a small `compress` with a search, whose last trial is proposed from the others."""
    return compress(out, "--trials", trials, *more)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the killed processes: sums must be added in the same order to give the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A furnished folder with the result ``out`` of a run that nothing disturbed."""
    folder = furnish(tmp_path_factory.mktemp("shared"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ok(*searching("out", "--keep-work"))
    torch.set_num_threads(before)
    return folder


@pytest.fixture
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A furnished folder of the test's own, as the current one."""
    monkeypatch.chdir(furnish(tmp_path, shared / "model"))
    return tmp_path


def kill(moment: str, words: list[str]) -> None:
    """Runs a command in the current folder until a moment."""
    done = killed(*(MOMENTS | DEFAULT_MOMENTS)[moment], words)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [line for line in (done.stdout + done.stderr).splitlines() if not PROGRESS.match(line)] == []


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Lets ``owner.name`` keep a list of the arguments it was called with."""
    calls: list[Any] = []
    function = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return calls


def factor_times() -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in Path("out.work").glob("factors-*/*.safetensors")}


# The others end within the same stages.
LEFT_OUT = (
    "between two blocks",  # test_killed_again_and_again begins with it
    "during the selection",
    "before the checkpoint's weights",
    "before the last evaluation",
)


@pytest.mark.parametrize("moment", [slow(moment) if moment in LEFT_OUT else moment for moment in MOMENTS])
def test_killed(moment: str, place: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = searching("out")
    kill(moment, words)
    assert not Path("out").exists()
    finished = factor_times()
    stages = list(MOMENTS)
    in_factors, in_write = moment in stages[:2], moment in stages[5:]
    assert len(finished) == {stages[0]: 1, stages[1]: 0}.get(moment, 2)
    assert bool(list(Path().glob(".out.partial*"))) == in_write

    collected = counted(monkeypatch, run, "collect")
    selected = counted(monkeypatch, Evaluator, "select")
    scored = counted(monkeypatch, Evaluator, "scores")
    done = ok(*words, "--keep-work")

    assert what_counts("out") == what_counts(shared / "out")
    assert {name: time for name, time in factor_times().items() if name in finished} == finished
    assert len(collected) == 2 - len(finished)
    assert len(selected) == (1 if in_factors or moment == stages[2] else 0)
    assert len(scored) == {stages[3]: 2, stages[4]: 4}.get(moment, 0 if in_write else 4)
    assert ("search: 2 trials are in the ledger already" in done.err) == (moment == stages[3])
    assert list(Path().glob(".*")) == []
    assert list(Path("out.work").rglob("*.partial")) == []
    assert not Path("out.work.lock").exists()


def test_killed_again_and_again(place: Path, shared: Path) -> None:
    """The same run killed at one moment after another."""
    words = searching("out")
    for moment in ("between two blocks", "in the third trial", "after the checkpoint's weights"):
        kill(moment, words)
    ok(*words)
    assert what_counts("out") == what_counts(shared / "out")
    assert {path.name for path in Path().iterdir()} == {"model", "text.txt", "other.txt", "out"}


def default_words(out: str) -> list[str]:
    # What is trained on next tokens writes the blocks again: tests/test_refine_train.py, tests/test_kills.py.
    options = {"refinement_steps": 2, "refinement_fit": True, "refinement_logit_steps": 0}
    options |= {"calibration_gradient_sequences": 4}
    return compress(out, "--preset", "default", **options)


@pytest.fixture(scope="module")
def default(shared: Path) -> Path:
    """An undisturbed result of the default method, in the shared folder."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shared)
        ok(*default_words("default"))
    torch.set_num_threads(before)
    return shared / "default"


@pytest.mark.parametrize(
    "moment",
    mostly_slow(DEFAULT_MOMENTS, "between two blocks of gradients", "while a refined block is written"),
)
def test_the_default_method_killed(moment: str, place: Path, default: Path) -> None:
    kill(moment, default_words("out"))
    refined = list(Path("out.work").glob("refined-*/*.safetensors"))
    assert len(refined) == (0 if "gradients" in moment else 1)
    times = {file: file.stat().st_mtime_ns for file in refined}
    ok(*default_words("out"), "--keep-work")
    assert what_counts("out") == what_counts(default)
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    assert len(list(Path("out.work").glob("refined-*/*.safetensors"))) == 2
    assert list(Path("out.work").rglob("*.partial")) == []


def test_half_a_line_in_the_journal(place: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process killed while it wrote leaves at the end of the ledger."""
    words = searching("out")
    shutil.copytree(shared / "out.work", "out.work")
    (journal,) = Path("out.work").glob("search-*/trials.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])  # the last trial was not finished
    scored = counted(monkeypatch, Evaluator, "scores")
    ok(*words)
    assert len(scored) == 1
    assert what_counts("out") == what_counts(shared / "out")


def test_a_stage_that_fails_is_repeated_and_no_other(
    place: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = searching("out")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "disk")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "perplexities_of", fail)
        assert bolaco(*words).code == 1
    assert not Path("out").exists()
    assert list(Path().glob(".*")) == []
    again = ok(*words)
    assert [line.partition(":")[0] for line in again.err.splitlines()] == [
        "loading model",
        "recipe bolaco-5x1",
        "reference",
        "search",  # so many trials are there already
        "evaluate the result",
    ]
    assert what_counts("out") == what_counts(shared / "out")


def stage_of(store: BlockStore) -> str:
    """What a folder of blocks in a work folder is of: its name without the key."""
    return store.folder.name.partition("-")[0]


def with_gradients(out: str, method: str) -> list[str]:
    return compress(out, "--search", "hand", "--method", method)


@pytest.fixture(scope="module")
def undisturbed(shared: Path) -> dict[str, Path]:
    """In the shared folder a result of each method with loss gradients that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shared)
        for method in ("kfac", "fwsvd"):
            ok(*with_gradients(method, method))
    return {method: shared / method for method in ("kfac", "fwsvd")}


@pytest.mark.parametrize(
    ("method", "folder", "after", "blocks", "again"),
    [
        ("kfac", "gradient", "statistics", 1, 2),
        ("kfac", "gradient", "walk", 1, 1),
        ("kfac", "gradient", "statistics", 2, 0),
        ("fwsvd", "fisher", "statistics", 1, 2),
        slow("fwsvd", "fisher", "walk", 1, 1),
        slow("fwsvd", "fisher", "statistics", 2, 0),
    ],
)
def test_interrupted_in_the_loss_gradients(
    method: str,
    folder: str,
    after: str,
    blocks: int,
    again: int,
    undisturbed: dict[str, Path],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stage before the factors that some methods have: it goes on below the last block it finished."""
    save = BlockStore.write
    calls = []

    def interrupted(*args: Any) -> None:
        save(*args)
        calls.extend([args] if stage_of(args[0]) == (folder if after == "statistics" else "walk") else [])
        if len(calls) == blocks:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "write", interrupted)
        assert bolaco(*with_gradients("out", method)).code == 130
    saved = counted(monkeypatch, BlockStore, "write")
    ok(*with_gradients("out", method))
    assert len([call for call in saved if stage_of(call[0]) == folder]) == again
    assert what_counts("out") == what_counts(undisturbed[method])


def test_more_trials_continue_the_ledger(place: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok(*searching("two", "--work", "ledger", "--keep-work", trials="2"))
    scored = counted(monkeypatch, Evaluator, "scores")
    ok(*searching("four", "--work", "ledger", "--keep-work"))
    assert len(scored) == 2
    assert what_counts("four") == what_counts(shared / "out")
    assert what_counts("two")["trials"] == what_counts("four")["trials"][:2]
    ok(*searching("again", "--work", "ledger", trials="2"))  # and fewer are the first of them
    assert len(scored) == 2
    assert what_counts("again") == what_counts("two")
    assert info("again")["recipe"]["search"]["trials"] == 2


def test_work_folder_is_removed_on_success_unless_kept(place: Path) -> None:
    ok(*compress("out", "--search", "hand"))
    assert {path.name for path in Path().iterdir()} == {"model", "text.txt", "other.txt", "out"}
    ok(*compress("other", "--search", "hand", "--keep-work"))
    assert len(list(Path("other.work").glob("factors-*/block-00001.safetensors"))) == 1
    assert not Path("other.work.lock").exists()


def test_interrupted_while_the_work_folder_is_removed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree = shutil.rmtree

    def interrupted(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith("factors-"):
            (Path(path) / "block-00000.safetensors").unlink()
            raise KeyboardInterrupt
        rmtree(path, *args, **kwargs)

    words = compress("out", "--search", "hand")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        assert bolaco(*words).code == 130
    Path("out").rename("first")
    ok(*words)
    assert what_counts("out") == what_counts("first")


def test_work_folder_elsewhere(place: Path) -> None:
    ok(*compress("out", "--search", "hand", "--work", "deep/down", "--keep-work"))
    assert Path("deep/down/recipe.json").is_file()
    assert not Path("out.work").exists()


def test_the_cache_on_disk_changes_nothing_and_is_removed(place: Path) -> None:
    for cache in ("memory", "disk"):
        ok(*compress(cache, "--search", "hand", "--keep-work", calibration_cache=cache))
    assert digest("memory/model.safetensors") == digest("disk/model.safetensors")
    assert list(Path().rglob("hidden.cache")) == []


def test_same_recipe_same_bytes(place: Path, shared: Path) -> None:
    ok(*searching("out"))
    for name in ("model.safetensors", "config.json"):
        assert digest(f"out/{name}") == digest(shared / "out" / name)
    assert what_counts("out") == what_counts(shared / "out")


def test_another_seed_tries_something_else(place: Path, shared: Path) -> None:
    ok(*searching("out", "--seed", "1"))
    first, second = info(shared / "out")["trials"], info("out")["trials"]
    assert first[0]["keep"] == second[0]["keep"]  # the hand allocation
    assert [trial["keep"] for trial in first[1:]] != [trial["keep"] for trial in second[1:]]
