"""`bolaco tune` on the command line: what it prints, what it refuses, and being killed."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from tests.command import PROGRESS, bolaco, compress, digest, furnish, info, ok, snapshot
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.processes import killed

SETTINGS = ("training.autocast=false", "evaluation.windows=3", "data.seq_len=32")


def words(out: str, *more: str, model: str = "small", mode: str = "factors", data: str = "text.txt") -> list[str]:
    """The words of a small `tune`; an option given again overrules."""
    given = ["tune", model, "--mode", mode, "--data", data, "--max-steps", "3", "--batch", "2", "-o", out]
    for setting in SETTINGS:
        given += ["--set", setting]
    return [*given, *more]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A furnished folder with a compressed model ``small``."""
    folder = furnish(tmp_path_factory.mktemp("shared"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ok(*compress("small", "--search", "hand"))
    return folder


@pytest.fixture
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A furnished folder of the test's own, as the current one."""
    monkeypatch.chdir(furnish(tmp_path, shared / "model"))
    (tmp_path / "small").symlink_to(shared / "small")
    return tmp_path


def refused(given: list[str], *parts: str) -> None:
    """One line of error with these parts, and every file and folder as before."""
    before = snapshot()
    done = bolaco(*given)
    *said, last = done.err.splitlines()
    assert done.code == 1, done.err
    assert last.startswith("bolaco: error: ")
    assert [line for line in said if not PROGRESS.match(line)] == []
    assert done.out == ""
    for part in parts:
        assert part in last
    assert len(last) < 500
    assert snapshot() == before


def test_what_is_printed(place: Path) -> None:
    done = ok(*words("out"))
    assert [line for line in done.err.splitlines() if not PROGRESS.match(line)] == []
    record = info("out")["tuning"]
    assert "small, tuned: perplexity on 93 tokens of text.txt" in done.out
    assert f"{record['trainable_parameters']:,}" in done.out
    assert f"{record['perplexity']['after']:.3f}" in done.out
    assert done.out.splitlines()[-1] == "written to out"
    assert ok("inspect", "out").out.splitlines()[0] in done.out
    modes = ok("methods").out
    assert all(name in modes for name in ("factors", "diagonal", "lora", "continued"))


def test_words_reach_the_settings(place: Path) -> None:
    jsonl = place / "chat.jsonl"
    jsonl.write_text('{"prompt": "the river", "response": "sees a house"}\n' * 9, encoding="utf-8")
    more = [
        "--eval",
        "other.txt",
        "--learning-rate",
        "0.01",
        "--distill",
        "0.5",
        "--teacher",
        "model",
        "--types",
        "q,o",
    ]
    more += ["--seed", "3", "--epochs", "9", "--set", "trainer.adam_epsilon=1e-7", "--set", "options.norms=true"]
    ok(*words("out", *more, "--minutes", "5", data="chat.jsonl"))
    record = info("out")["tuning"]
    made = record["settings"]
    assert record["kind"] == "instructions"
    assert record["perplexity"]["data"] == "other.txt"
    assert made["training"]["learning_rate"] == 0.01
    assert made["training"]["minutes"] == 5
    assert made["distillation"] == {"weight": 0.5, "teacher": "model"}
    assert made["types"] == ["q", "o"]
    assert made["seed"] == 3
    assert made["trainer"] == {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-7}
    assert made["options"] == {"norms": True, "biases": False}


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnish(tmp_path, save_tiny(tmp_path / "narrow", tiny_llama(vocab_size=50))))
    done = bolaco(*words("out", model="model", mode="continued"))
    assert done.code == 1
    assert re.search(r"the text holds token \d+, but the model has embeddings of 50 tokens only", done.err)


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--mode", "factor"], ["unknown mode 'factor'", "did you mean 'factors'?"]),
        (["--mode", "zzz"], ["unknown mode 'zzz'", "known are continued, "]),
        (["--data", "nowhere.txt"], ["nowhere.txt: no such file"]),
        (["--data", "wrong.jsonl", "--text-column", "body"], ["wrong.jsonl: rows have no 'body' string"]),
        (["--data", "wrong.jsonl"], ["wrong.jsonl, line 2: has question, answer; known are messages;"]),
        (["--seq-len", "129", "--set", "data.seq_len=129"], ["data.seq_len: 129 tokens", "128 positions"]),
        (["--max-steps", "0"], ["training.max_steps", "(got 0)"]),
        (["--distill", "2"], ["distillation.weight", "(got 2.0)"]),
        (["--distill", "1", "--teacher", "foreign"], ["foreign has another vocabulary than small"]),
        (["--distill", "1", "--teacher", "wide"], ["wide has a vocabulary of 99 tokens, small one of 96"]),
        (["--distill", "1", "--teacher", "./nowhere"], ["./nowhere: no such folder"]),
        (["--types", "q,w"], ["types: unknown type 'w'"]),
        (["--set", "options.norm=1"], ["options.norm: mode 'factors' has no such option; did you mean 'norms'?"]),
        (["--set", "trainer.max_steps=3"], ["trainer.max_steps: cannot be set there; use training.max_steps"]),
        (["--set", "trainer.adam_eps=3"], ["trainer.adam_eps", "did you mean 'adam_epsilon'?"]),
        (["--set", "trainer.optim=nonsense"], ["trainer: transformers refuses these settings", "nonsense"]),
        (["--set", "training.foo=1"], ["training.foo: there is no such setting; known are max_steps, epochs, "]),
        (["--set", "training.max_step=1"], ["training.max_step: there is no such setting; did you mean 'max_steps'?"]),
        (["--set", "evaluation.windows=4000"], ["text.txt: too short for evaluation: 4000 x 32 tokens"]),
        (["--device", "toaster"], ["device 'toaster' cannot be used here"]),
        (["--mode", "continued", "--types", "q"], ["types: mode 'continued' trains all parameters"]),
        (["--work", "out/work"], ["the output and the work folder must not be one inside the other"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_refused(place: Path, more: list[str], parts: list[str]) -> None:
    rows = [{"prompt": "a", "response": "the river"}, {"question": "a", "answer": "b"}]
    Path("wrong.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    save_tiny(place / "wide", tiny_llama(vocab_size=99))
    other = tiny_tokenizer()
    other.add_tokens(["unheard"])
    save_tiny(place / "foreign", tokenizer=other)
    refused(words("out", *more), *parts)


@pytest.mark.parametrize("mode", ["factors", "diagonal"])
def test_nothing_is_factored(place: Path, mode: str) -> None:
    refused(words("out", model="model", mode=mode), f"mode '{mode}' tunes factored matrices", "has none; compress it")
    matter = words("out", "--types", "v", mode=mode)
    refused(matter, "has none of type v")


def test_a_dense_model_names_no_teacher(place: Path) -> None:
    given = words("out", "--distill", "1", model="model", mode="continued")
    refused(given, "distillation.teacher is missing", "--teacher MODEL")


def test_the_output_exists(place: Path) -> None:
    Path("out").mkdir()
    refused(words("out"), "out: exists already and is not overwritten")


def test_no_data(place: Path) -> None:
    given = words("out")
    del given[4:6]
    refused(given, "data.source is missing", "--data SRC")


def test_peft_is_not_installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    done = bolaco(*words("out", mode="lora"))
    assert done.code == 1
    assert "mode lora and its adapters need PEFT" in done.err.splitlines()[-1]
    assert "pip install 'bolaco[tune]'" in done.err.splitlines()[-1]


def test_a_work_folder_of_other_settings(place: Path) -> None:
    """What depends on the change runs again, and nothing else; tests/test_tune_work.py has a table of it."""

    def stages(out: str, *more: str) -> list[str]:
        done = ok(*words(out, *more, "--work", "work", "--keep-work"))
        return [line.partition(":")[0] for line in done.err.splitlines() if not line.startswith("loading")]

    measure, train, result = "evaluate the input", "train", "evaluate the result"
    assert stages("first") == [measure, train, result]
    assert stages("again") == [result]
    assert stages("other", "--learning-rate", "0.5") == [train, result]
    assert json.loads(Path("work/recipe.json").read_text())["recipe"]["training"]["learning_rate"] == 0.5
    Path("text.txt").write_text(Path("other.txt").read_text() * 3, encoding="utf-8")
    assert stages("text", "--learning-rate", "0.5") == [measure, train, result]
    assert len(list(Path("work").glob("trained-*.json"))) == 3
    assert digest("first/model.safetensors") == digest("again/model.safetensors")
    assert len({digest(f"{out}/model.safetensors") for out in ("first", "other", "text")}) == 3


def test_a_loss_that_is_not_finite_ends_the_run(place: Path) -> None:
    done = bolaco(*words("out", "--learning-rate", "1e30", "--set", "training.max_grad_norm=0"))
    assert done.code == 1
    assert "lower training.learning_rate" in done.err.splitlines()[-1]
    assert not Path("out").exists()


def test_killed_and_given_again(place: Path) -> None:
    """The default precision included: products in bfloat16."""
    given = words("out", "--max-steps", "8", "--set", "training.save_steps=2", "--set", "training.autocast=true")
    whole = [word if word != "out" else "whole" for word in given]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the killed process
    done = killed("bolaco.tune.trainer._Watch.on_step_end", 5, "after", given)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (checkpoints,) = Path("out.work").glob("trained-*/checkpoints")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    done = ok(*given)
    assert "training: 4 of 8 steps are done already" in done.err
    ok(*whole)
    torch.set_num_threads(threads)
    assert info("out")["tuning"]["curve"] == info("whole")["tuning"]["curve"]
    assert digest("out/model.safetensors") == digest("whole/model.safetensors")
    assert not Path("out.work").exists()
