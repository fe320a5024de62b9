"""A distillation as a whole, on a tiny teacher: its stages, runs that are killed, the command line, the documents."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bolaco
from bolaco.cli import main
from bolaco.distill.predict import Predictor
from bolaco.distill.prompt import Prompts
from bolaco.distill.record import read_distilled
from bolaco.distill.reinforce import LEAST_VARIETY, MOST_DIVERGENCE, Reinforcement
from bolaco.distill.run import Stages, task_texts
from bolaco.distill.settings import make_settings
from bolaco.distill.teacher import Teacher
from bolaco.errors import CheckpointError, DataError
from bolaco.models.load import load_model, load_tokenizer, weights_fingerprint
from bolaco.progress import Reporter
from bolaco.runs.session import begin
from bolaco.work.folder import WorkFolder
from tests.command import bolaco as command
from tests.command import digest, ok, snapshot
from tests.distilling import LABELS, toy_options, toy_rows, toy_words, write_rows
from tests.models import english, mostly_slow, save_tiny
from tests.processes import killed

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a task, texts to report on, and a finished run ``out``."""
    folder = tmp_path_factory.mktemp("distill")
    save_tiny(folder / "model")
    write_rows(folder / "task.jsonl", toy_rows(45))
    write_rows(folder / "other.jsonl", toy_rows(30, 7))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "said.txt").write_text(ok(*call("out")).out, encoding="utf-8")
    return folder


@pytest.fixture
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("model", "task.jsonl", "other.jsonl", "out"):
        (tmp_path / name).symlink_to(shared / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(out: str, *more: str, **changes: object) -> list[str]:
    words = ["distill", "model", "--task", "task.jsonl", "--eval", "other.jsonl", *toy_words(**changes)]
    return [*words, "-o", out, *more]


def stages_in(folder: Path, teacher: Teacher, **changes: object) -> tuple[Stages, WorkFolder]:
    words = {"teacher": "model", "task": "task.jsonl", "evaluation": "other.jsonl"}
    settings = make_settings(words, toy_options(**changes))
    work = WorkFolder(folder / "work", settings)
    work.__enter__()
    return Stages(settings, task_texts(settings), teacher, begin(work, settings, Reporter(quiet=True))), work


# --- what came of it ----------------------------------------------------------------------------------------------


def test_the_folder(shared: Path) -> None:
    info = read_distilled(shared / "out")
    assert info.labels == tuple(sorted(LABELS))
    assert info.accuracy.texts == 30
    assert sum(map(sum, info.accuracy.confusion)) == 30
    assert sum(info.accuracy.confusion[n][n] for n in range(3)) / 30 == pytest.approx(info.accuracy.mixed)
    rows = [json.loads(line) for line in (shared / "out" / "store" / "items.jsonl").read_text().splitlines()]
    generated = [row for row in rows if row["origin"] == "generated"]
    # A part of them is apart, for the choice of retrieval.
    assert 0 < len(generated) < sum(info.store.kept.values())
    assert {row["text"] for row in rows if row["origin"] == "labelled"} == {row["text"] for row in toy_rows(45)}
    assert sum(info.store.drawn.values()) == 60
    for label in info.labels:
        counts = (info.store.kept, info.store.copies, info.store.uncertain)
        assert sum(count[label] for count in counts) == info.store.drawn[label]
    assert f"{info.accuracy.mixed:.4f}" in (shared / "said.txt").read_text(encoding="utf-8")
    assert not (shared / "out.work").exists()


def test_the_prompts_have_learned(shared: Path) -> None:
    info = read_distilled(shared / "out")
    for learned in (info.classify, info.generate):
        assert min(learned.held_out.values()) < 0.95 * learned.held_out[0]


def test_the_report(shared: Path) -> None:
    page = (shared / "out" / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r"<title id=[^>]+>([^<]+)</title>", page)
    assert {"Loss on held-out texts", "Reward of a step", "Divergence of a step", "Loss of the student"} <= set(titles)
    assert "Confusion" in page
    assert "<script" not in page
    info = read_distilled(shared / "out")
    assert info.reinforced.before.texts[0][0] in page
    assert len(re.findall('id="([^"]+)"', page)) == len(set(re.findall('id="([^"]+)"', page)))


def test_nothing_that_is_written_becomes_markup(shared: Path) -> None:
    from bolaco.distill.page import distilled_page

    info = read_distilled(shared / "out")
    before = info.reinforced.before.model_copy(update={"texts": [["<script>alert(1)</script>"]] * 3})
    info = info.model_copy(update={"reinforced": info.reinforced.model_copy(update={"before": before})})
    page = distilled_page(info, "<b>out</b>")
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page


# --- stages -------------------------------------------------------------------------------------------------------


def test_the_teacher_stays_as_it_is(place: Path) -> None:
    model = load_model("model")
    before = weights_fingerprint(model)
    stages, work = stages_in(place, Teacher(model, load_tokenizer("model")), student_steps=5)
    for stage in ("prompts", "center", "reinforced", "store"):
        getattr(stages, stage)
        assert weights_fingerprint(model) == before, stage
    stages.finish(place / "again")
    assert weights_fingerprint(model) == before
    work.__exit__()
    assert weights_fingerprint(load_model("model")) == before


@pytest.mark.parametrize(("algorithm", "rate"), [("rloo", 0.1), ("ppo", 0.03)])
def test_reinforcement_raises_the_reward_within_bounds(place: Path, algorithm: str, rate: float) -> None:
    teacher = Teacher(load_model("model"), load_tokenizer("model"))
    changes = {
        "prompt_steps": 60,
        "reinforce_steps": 20,
        "reinforce_every": 10,
        "reinforce_batch": 24,
        "reinforce_evaluation": 96,
        "reinforce_kl_target": 3.0,
        "reinforce_learning_rate": rate,
    }
    stages, work = stages_in(place, teacher, reinforce_algorithm=algorithm, **changes)
    prompts, how = stages.reinforced
    work.__exit__()
    # On texts that are not those that the best prompts were chosen on.
    found = []
    for generate in (stages.prompts[0].generate, prompts.generate):
        settings, labels = stages.settings, stages.texts.learn.labels
        given = Prompts(prompts.classify, stages.prompts[0].generate, prompts.tokens)
        fresh = settings.reinforce.model_copy(update={"evaluation": 300})
        other = Reinforcement(teacher, given, labels, stages.center, settings.prompt, fresh, 99)
        other.policy = torch.nn.Parameter(generate.clone())
        found.append(other.evaluate())
    before, after = found
    assert before.kl == 0
    assert after.reward > before.reward + 0.1
    assert after.certainty > before.certainty
    assert 0 < after.kl <= MOST_DIVERGENCE * 3.0
    assert after.distinct >= LEAST_VARIETY * before.distinct
    assert how.after.reward > how.before.reward
    assert len(how.rewards) == len(how.kl) == len(how.weights) == 20


def test_stages_alone_are_found_by_the_next(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("prompt", "reinforce", "store"):
        words = call(stage, "--work", "work")
        ok("distill", stage, *words[1:])
        assert Path("work").is_dir()
        assert (Path(stage) / "prompts" / "prompts.json").is_file()
        assert (Path(stage) / "store").is_dir() == (stage == "store")
    marks = {path: path.stat().st_mtime_ns for path in Path("work").rglob("*.safetensors")}
    ok(*call("whole", "--work", "work", "--keep-work"))
    assert all(path.stat().st_mtime_ns == mark for path, mark in marks.items())
    prompts = [f"prompts/{name}/adapter_model.safetensors" for name in ("classify", "generate-1")]
    same = ["model.safetensors", "store/items.jsonl", "store/items.safetensors", *prompts]
    assert [digest(Path("whole") / name) for name in same] == [digest(Path("out") / name) for name in same]


MOMENTS = {
    "in the prompt that classifies": ("bolaco.distill.steps.save_tensors", 3, "after"),
    "in the prompts that generate": ("bolaco.distill.steps.save_tensors", 11, "before"),
    "in the policy gradient": ("bolaco.distill.reinforce.Reinforcement.reward", 5, "after"),
    "in the store": ("bolaco.data.written.write_text", 3, "after"),
    "at the end of the store": ("bolaco.distill.store.save_file", 1, "after"),
    "in the student": ("bolaco.distill.student.divergence", 20, "after"),
    "while it is written": ("bolaco.distill.page.rendered", 1, "before"),
    "in the last moment": ("bolaco.work.folder.WorkFolder.close", 1, "before"),
}


QUICK_MOMENTS = ("in the prompts that generate", "in the policy gradient", "in the student", "in the last moment")


@pytest.mark.parametrize("moment", mostly_slow(MOMENTS, *QUICK_MOMENTS))
def test_killed(moment: str, place: Path) -> None:
    assert killed(*MOMENTS[moment], call("mine")).returncode == -9
    ok(*call("mine"))
    whole, mine = (snapshot(folder) for folder in ("out", "mine"))
    differ = {"distill.json", "report.html"}  # seconds
    assert {Path(name).relative_to("out"): d for name, d in whole.items() if Path(name).name not in differ} == {
        Path(name).relative_to("mine"): d for name, d in mine.items() if Path(name).name not in differ
    }
    records = [read_distilled(Path(folder)).model_dump(exclude={"seconds"}) for folder in ("out", "mine")]
    assert records[0] == records[1]
    left = {path.name for path in place.iterdir() if "mine" in path.name}
    assert left == {"mine"}


# --- answers ------------------------------------------------------------------------------------------------------


def test_predict(place: Path) -> None:
    done = ok("distill", "predict", "out", "--data", "other.jsonl", "--items", "2", "-o", "answers.jsonl")
    info = read_distilled(Path("out"))
    assert f"30 texts answered, {info.accuracy.mixed:.4f} of the labelled ones right" in done.out
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == [row["text"] for row in toy_rows(30, 7)]
    for row in rows:
        assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert command("distill", "predict", "out", "--data", "other.jsonl", "-o", "answers.jsonl").code == 1
    predictor = Predictor("out", neighbours=3, share=0.5)
    (answer,) = predictor.predict(["warm light river"])
    assert len(answer.items) == 3
    keys, own = predictor.store.keys, predictor.student.read(predictor.student.encode(["warm light river"], "t"))
    nearest = (keys @ own[1][0]).topk(3)
    assert answer.items == tuple(predictor.store.items[n].text for n in nearest.indices.tolist())
    weights = (nearest.values / predictor.retrieval.temperature).softmax(0)
    wanted = 0.5 * own[0][0] + 0.5 * (weights @ predictor.store.values[nearest.indices])
    assert list(answer.probabilities.values()) == pytest.approx(wanted.tolist(), abs=1e-6)
    assert Predictor("out", share=0.0).predict(["warm"])[0].items == ()


def copied(source: Path, target: Path) -> Path:
    """A folder of links, in which files can be put in the place of some."""
    target.mkdir()
    for path in source.resolve().rglob("*"):
        other = target / path.relative_to(source.resolve())
        other.mkdir() if path.is_dir() else other.symlink_to(path)
    return target


def test_what_cannot_be_answered_is_one_line(place: Path) -> None:
    Path("none.jsonl").write_text("", encoding="utf-8")
    write_rows(Path("long.jsonl"), [{"text": english(100)}])
    write_rows(Path("other-label.jsonl"), [{"text": "a", "label": "autumn"}])
    for data, said in [
        ("missing.jsonl", "missing.jsonl: cannot be read"),
        ("none.jsonl", "none.jsonl: there is no text in it"),
        ("long.jsonl", "long.jsonl: text 1 has"),
        ("other-label.jsonl", "line 1: label 'autumn' is none of story, summer, winter"),
    ]:
        done = command("distill", "predict", "out", "--data", data, "-o", "answers.jsonl")
        assert (done.code, said in done.err, len(done.err.splitlines())) == (1, True, 1), done.err
    assert not Path("answers.jsonl").exists()
    with pytest.raises(CheckpointError, match="no folder that `bolaco distill` wrote"):
        Predictor("model")
    empty = copied(Path("out"), Path("empty"))
    (empty / "store" / "items.jsonl").unlink()
    (empty / "store" / "items.jsonl").write_text("")
    with pytest.raises(DataError, match="the store is empty"):
        Predictor(empty, share=0.5)
    mixed_up = copied(Path("out"), Path("mixed-up"))
    info = json.loads((mixed_up / "distill.json").read_text(encoding="utf-8"))
    (mixed_up / "distill.json").unlink()
    (mixed_up / "distill.json").write_text(json.dumps(info | {"labels": ["winter", "summer"]}))
    with pytest.raises(CheckpointError, match="the student has 3 labels"):
        Predictor(mixed_up)
    damaged = copied(Path("out"), Path("damaged"))
    (damaged / "distill.json").unlink()
    (damaged / "distill.json").write_text('{"teacher": "model"}')
    with pytest.raises(CheckpointError, match=r"distill\.json: damaged \(labels: Field required\)"):
        Predictor(damaged)


# --- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--labels", "winter,summer,story,autumn"], "label 'autumn' never occurs"),
        (["--labels", "winter,summer"], "line 3: label 'story' is none of winter, summer"),
        (["--task", "one.jsonl"], "has the label 'winter' only"),
        (["--task", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--task", "long.jsonl"], "has 1"),
        (["--set", "student.config=bart"], "student bart: an encoder with a decoder"),
        (["--set", "student.lenght=3"], "did you mean 'length'"),
        (["--data", "other.jsonl"], "--data and --items are of `distill predict`"),
        (["--set", "reinforce.length=121"], "lower the length to 120"),
        (["--set", "store.certainty=1"], "the store is empty: of 60 texts of the teacher"),
    ],
)
def test_what_is_wrong_is_one_line(place: Path, more: list[str], said: str) -> None:
    write_rows(Path("one.jsonl"), [{"text": "cold", "label": "winter"}] * 3)
    write_rows(Path("long.jsonl"), [*toy_rows(9), {"text": english(130), "label": "story"}])
    quick = {"prompt_steps": 1, "prompt_generate_steps": 1, "reinforce_steps": 0, "reinforce_evaluation": 6}
    done = command(*call("mine", *more, **quick))
    assert done.code == 1
    assert said in done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("bolaco: error: ")
    assert not Path("mine").exists()


def test_without_texts_to_report_on(place: Path) -> None:
    write_rows(Path("few.jsonl"), toy_rows(3))
    words = [word for word in call("mine") if word not in ("--eval", "other.jsonl")]
    words[words.index("task.jsonl")] = "few.jsonl"
    done = command(*words)
    assert "few.jsonl: has one text of each label" in done.err


def test_from_python(place: Path) -> None:
    quick = {"prompt_steps": 2, "prompt_generate_steps": 2, "reinforce_steps": 0, "student_steps": 3}
    result = bolaco.distill("model", "task.jsonl", "mine", seed=1, options=toy_options(**quick))
    assert result.info is not None
    # A part of the task is not learned from, and reported on.
    assert result.info.accuracy.texts == 9
    assert result.info.accuracy.source == "task.jsonl"
    assert result.info.reinforced.rewards == []


# --- documents ----------------------------------------------------------------------------------------------------


def test_the_commands_of_the_document_run(place: Path) -> None:
    text = (DOCS / "distill.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("bolaco ")]
    assert len(lines) >= 6
    write_rows(Path("labelled.jsonl"), toy_rows(45))
    write_rows(Path("test.jsonl"), toy_rows(12, 7))
    Path("texts.jsonl").symlink_to("test.jsonl")
    for line in lines:
        words = ["model" if word == "smollm2-135m" else word for word in shlex.split(line, comments=True)[1:]]
        if words[0] == "distill" and words[1] != "predict":
            # The document's own settings win.
            place_of = words.index("--task")
            words[place_of:place_of] = toy_words()
        if words[0] == "generate-text":
            words += ["--sequences", "3", "--length", "8", "--batch", "5"]
        assert main(words) == 0, line
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(example, "distill.md", "exec"), {})  # noqa: S102 - our own document
    tensors = load_file("tiny/store/items.safetensors")
    assert tensors.keys() == {"probabilities", "embeddings", "keys"}
