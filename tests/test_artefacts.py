"""A work folder used again with something changed: what depends on the change runs again, and nothing else."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from bolaco.allocate.search.run import Evaluator
from bolaco.factorize import run as factorize_run
from bolaco.factorize.store import FactorStore
from bolaco.refine.fit import BlockFit
from bolaco.refine.train import BlockTrainer
from bolaco.runs import measure
from bolaco.statistics.backward import BlockGradientWalk
from bolaco.transform import prune as pruning
from tests.command import compress, furnish, ok, what_counts
from tests.models import english, mostly_slow, save_tiny, slow, tiny_llama

# Recipes by name: words, and settings. Each has stages that another has not.
BASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "default": (("--preset", "default"), {"refinement_steps": 2, "calibration_gradient_sequences": 4}),
    "5x1": (("--preset", "bolaco-5x1"), {"search_trials": 2}),
    "lpaf": (("--preset", "lpaf"), {"method_steps": 4}),
    "chop": (("--preset", "chop", "--keep", "0.6"), {}),
}
LAYERS = {"chop": 4}  # where two are too few


def other_weights() -> None:
    layers = AutoConfig.from_pretrained("model").num_hidden_layers
    model = tiny_llama(num_hidden_layers=layers)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 0.5
    Path("model").unlink()  # a link
    save_tiny(Path("model"), model)


def other_text() -> None:
    Path("text.txt").write_text(english(1200, seed=7), encoding="utf-8")


def other_evaluation() -> None:
    Path("other.txt").write_text(english(400, seed=8), encoding="utf-8")


@dataclass(frozen=True)
class Change:
    """Words and settings that are added, or something that is done in the folder before."""

    words: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    act: Callable[[], None] = lambda: None


def to(*words: str, **settings: Any) -> Change:
    """A change of the recipe."""
    return Change(words, settings)


def of(act: Callable[[], None]) -> Change:
    """A change of what the recipe names."""
    return Change(act=act)


AGAIN: list[tuple[str, str, Change, set[str]]] = [
    ("default", "nothing", to(), set()),
    ("default", "keep", to("--keep", "0.7"), {"refine"}),
    ("default", "refinement.steps", to(refinement_steps=3), {"refine"}),
    ("default", "refinement.fit", to(refinement_fit=True), {"fit", "refine"}),
    ("default", "method.shrinkage", to(method_shrinkage=0.3), {"collect", "factors", "refine"}),
    ("default", "calibration.sequences", to(calibration_sequences=7), {"collect", "factors", "refine"}),
    (
        "default",
        "calibration.gradient_sequences",
        to(calibration_gradient_sequences=3),
        {"gradients", "collect", "factors", "refine"},
    ),
    ("default", "calibration.groups", to(calibration_groups=2), {"collect", "factors", "refine"}),
    ("default", "calibration.batch", to(calibration_batch=3), {"gradients", "collect", "factors", "refine"}),
    ("default", "calibration.cache", to(calibration_cache="disk"), set()),
    ("default", "storage, lower ranks", to("--storage", "two-factor"), {"refine"}),
    ("default", "storage, other units", to("--storage", "shared"), {"collect", "factors", "refine"}),
    ("default", "search.rank_multiple, higher ranks", to(search_rank_multiple=2), {"collect", "factors", "refine"}),
    ("default", "search.rank_multiple, lower ranks", to(search_rank_multiple=8), {"refine"}),
    ("default", "search.dense_types", to(search_dense_types="[v]"), {"refine"}),
    ("default", "search.name", to("--search", "uniform"), {"refine"}),
    ("default", "method.name, same statistics", to("--method", "afm"), {"collect", "factors", "refine"}),
    ("default", "method.name, others", to("--method", "fwsvd"), {"gradients", "factors", "refine"}),
    ("default", "seed", to("--seed", "1"), {"gradients", "collect", "factors", "refine"}),
    ("default", "evaluation.windows", to(evaluation_windows=3), {"dense"}),
    ("default", "validation.candidates", to(validation_candidates=5), set()),
    ("default", "text", of(other_text), {"gradients", "collect", "factors", "refine"}),
    ("default", "text of the evaluation", of(other_evaluation), {"dense"}),
    ("default", "weights", of(other_weights), {"gradients", "collect", "factors", "dense", "refine"}),
    ("5x1", "nothing", to(), set()),
    ("5x1", "keep", to("--keep", "0.7"), {"select", "trials"}),
    ("5x1", "search.trials", to(search_trials=3), {"trials"}),
    ("5x1", "search.kl_weight", to(search_kl_weight=0.1), {"select", "trials"}),
    (
        "5x1",
        "search.rank_multiple, higher ranks",
        to(search_rank_multiple=2),
        {"collect", "factors", "select", "trials"},
    ),
    ("5x1", "search.rank_multiple, lower ranks", to(search_rank_multiple=8), {"select", "trials"}),
    ("5x1", "search.name", to("--search", "5x4"), {"select", "trials"}),
    ("5x1", "no search", to("--search", "hand", search_trials=None), set()),
    ("5x1", "storage, higher ranks", to("--storage", "pivoted"), {"collect", "factors", "select", "trials"}),
    ("5x1", "refinement.steps", to(refinement_steps=2), {"refine"}),
    # What is compared with is what follows the calibration text in its source.
    ("5x1", "calibration.sequences", to(calibration_sequences=7), {"collect", "factors", "select", "trials"}),
    ("5x1", "calibration.cache", to(calibration_cache="disk"), set()),
    ("5x1", "validation.sequences", to(validation_sequences=2), {"select", "trials"}),
    ("5x1", "validation.source", to("--validation", "other.txt"), {"dense", "select", "trials"}),
    ("5x1", "method.name", to("--method", "svd"), {"factors", "select", "trials"}),
    ("5x1", "seed", to("--seed", "1"), {"select", "trials"}),
    ("5x1", "evaluation.windows", to(evaluation_windows=3), {"dense"}),
    ("5x1", "text", of(other_text), {"collect", "factors", "select", "trials"}),
    ("5x1", "weights", of(other_weights), {"collect", "factors", "dense", "select", "trials"}),
    ("lpaf", "nothing", to(), set()),
    ("lpaf", "method.steps", to(method_steps=5), {"prune", "factors"}),
    ("lpaf", "keep", to("--keep", "0.7"), {"prune", "factors"}),
    ("lpaf", "seed", to("--seed", "1"), {"prune", "factors"}),
    ("lpaf", "storage, higher ranks", to("--storage", "pivoted"), {"factors"}),
    ("lpaf", "calibration.cache", to(calibration_cache="disk"), set()),
    ("lpaf", "evaluation.windows", to(evaluation_windows=3), {"dense"}),
    ("lpaf", "weights", of(other_weights), {"prune", "factors", "dense"}),
    ("chop", "keep", to("--keep", "0.8"), set()),
    ("chop", "method.pattern", to(method_pattern="input"), set()),
    ("chop", "evaluation.windows", to(evaluation_windows=3), {"dense"}),
    ("chop", "weights", of(other_weights), {"dense"}),
]


# Of these the result is compared with that of a fresh run; of all of them in the slow tests.
COMPARED = {
    "default": {
        *("nothing", "keep", "refinement.fit", "calibration.groups", "storage, other units", "evaluation.windows"),
        *("method.name, same statistics", "text", "weights"),
    },
    "5x1": {
        *("keep", "search.trials", "search.rank_multiple, higher ranks", "storage, higher ranks"),
        *("validation.source", "weights"),
    },
    "lpaf": {"keep", "method.steps", "storage, higher ranks"},
    "chop": {"keep", "method.pattern"},
}


# At least one that begins at each of the stages; the others in the slow tests.
QUICK = {
    "default": {
        *("keep", "refinement.fit", "calibration.gradient_sequences", "storage, other units", "method.name, others"),
        *("search.rank_multiple, higher ranks", "validation.candidates", "evaluation.windows", "text", "weights"),
    },
    "5x1": {
        *("keep", "search.trials", "search.rank_multiple, higher ranks", "no search", "refinement.steps"),
        *("validation.source", "weights"),
    },
    "lpaf": {"method.steps", "storage, higher ranks", "evaluation.windows"},
    "chop": {"keep", "weights"},
}


def rows() -> Iterator[Any]:
    """Each change once, and again in the slow tests where its result is compared there only."""
    for base, name, *values in AGAIN:
        compared = name in COMPARED[base]
        row = pytest.param if name in QUICK[base] else slow
        yield row(base, *values, compared, id=f"{base}: {name}")
        if not compared:
            yield slow(base, *values, True, id=f"{base}: {name}, compared")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums must be added in the same order to give the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(base: str, out: str, change: Change | None = None) -> list[str]:
    """A small `compress` by a recipe of :data:`BASES`, with something changed; its work folder is kept."""
    change = change or Change()
    first, settings = BASES[base]
    settings = {name: value for name, value in (settings | change.settings).items() if value is not None}
    return compress(out, *first, *change.words, "--keep-work", **settings)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each recipe a furnished folder with its result ``out`` and its work folder."""
    folder = tmp_path_factory.mktemp("shared")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for base in BASES:
        (folder / base).mkdir()
        furnish(folder / base, save_tiny(folder / f"model-{base}", tiny_llama(num_hidden_layers=LAYERS.get(base, 2))))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder / base)
            ok(*words(base, "out"))
    torch.set_num_threads(before)
    return folder


@pytest.fixture
def begin(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Furnishes a folder of the test's own, with the work folder of a finished run, and makes it the current one."""

    def furnished(base: str) -> None:
        monkeypatch.chdir(furnish(tmp_path, shared / f"model-{base}"))
        shutil.copytree(shared / base / "out.work", "out.work")

    return furnished


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """Runs a command; returns the stages that did something, but for the evaluation of the result."""
    calls: Counter[str] = Counter()

    def count(stage: str, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls[stage] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count("prune", pruning, "prune")
    count("gradients", BlockGradientWalk, "run")
    count("collect", factorize_run, "collect")
    count("factors", FactorStore, "save")
    count("dense", measure, "perplexity")
    count("select", Evaluator, "select")
    count("trials", Evaluator, "scores")
    count("fit", BlockFit, "run")
    count("refine", BlockTrainer, "train")

    def run(*words: str) -> set[str]:
        calls.clear()
        ok(*words)
        calls["dense"] -= 1  # of the result
        return {stage for stage, count in calls.items() if count}

    return run


def test_those_compared_are_in_the_table() -> None:
    assert {(base, name) for base, names in COMPARED.items() for name in names} <= {row[:2] for row in AGAIN}


@pytest.mark.parametrize(("base", "change", "again", "compared"), rows())
def test_what_depends_on_a_change_runs_again(
    base: str,
    change: Change,
    again: set[str],
    compared: bool,
    begin: Callable[[str], None],
    ran: Callable[..., set[str]],
) -> None:
    begin(base)
    change.act()
    assert ran(*words(base, "out", change)) == again
    if not compared:
        return
    ok(*words(base, "fresh", change))
    found, wanted = (load_file(f"{name}/model.safetensors") for name in ("out", "fresh"))
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    assert what_counts("out") == what_counts("fresh")


@pytest.mark.parametrize("base", mostly_slow(BASES, "default", "5x1"))
def test_there_and_back_again_runs_nothing(
    base: str, shared: Path, begin: Callable[[str], None], ran: Callable[..., set[str]]
) -> None:
    """What is there for one recipe stays when another one uses the folder."""
    begin(base)
    for keep in ("0.7", "0.8", "0.7"):
        ok(*words(base, f"at-{keep}", to("--keep", keep, "--work", "out.work")))
        shutil.rmtree(f"at-{keep}")
    assert ran(*words(base, "out")) == set()
    assert what_counts("out") == what_counts(shared / base / "out")


def test_a_model_of_another_name_is_known_by_its_weights(
    begin: Callable[[str], None], ran: Callable[..., set[str]]
) -> None:
    begin("default")
    Path("model").rename("elsewhere")
    changed = words("default", "out")
    changed[changed.index("model")] = "elsewhere"
    assert ran(*changed) == set()


def test_another_number_of_threads_goes_on_with_what_is_there(
    begin: Callable[[str], None], ran: Callable[..., set[str]]
) -> None:
    """Weights and text are known by their bytes, not by sums that are rounded in another order."""
    begin("default")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)  # what is there is of one
    try:
        assert ran(*words("default", "out")) == set()
    finally:
        torch.set_num_threads(threads)


def test_more_trials_are_added_to_those_there_are(
    begin: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin("5x1")
    scores, calls = Evaluator.scores, []
    monkeypatch.setattr(Evaluator, "scores", lambda *given: calls.append(given) or scores(*given))
    ok(*words("5x1", "out", to(search_trials=4)))
    assert len(calls) == 2
