"""What stops a run is said by ``--dry-run`` in the same words, and before anything is computed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from bolaco.runs import factors
from tests.bad_input.common import one_line, refused
from tests.command import bolaco, compress, ok
from tests.models import english, save_tiny, tiny_llama


def edited(file: str, **values: object) -> None:
    """A copy of the model whose ``file`` has other values."""
    folder = save_tiny(Path("edited"))
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _short_positions() -> list[str]:
    save_tiny(Path("edited"), tiny_llama(max_position_embeddings=16))
    return []


def _foreign_tokenizer() -> list[str]:
    save_tiny(Path("edited"), tiny_llama(vocab_size=40))
    return []


def _without_tokenizer() -> list[str]:
    tiny_llama().save_pretrained("edited")
    return []


def _edit(file: str, **values: object) -> list[str]:
    edited(file, **values)
    return []


def _text(*words: str) -> list[str]:
    save_tiny(Path("edited"))
    Path("few.txt").write_text(english(40, 1))
    Path("empty.txt").write_text("")
    return list(words)


def _out(*words: str) -> list[str]:
    save_tiny(Path("edited"))
    Path("link").symlink_to("nowhere")
    Path("elsewhere").mkdir()
    Path("linked.work").symlink_to("elsewhere")
    Path("there").mkdir()
    return list(words)


# What is at fault -> how it comes about, as further words of the command, and what is said.
FAULTS = {
    "text that is not there": (lambda: _text("--calibration", "gone.txt"), "gone.txt: no such file"),
    "text too short": (lambda: _text("--calibration", "few.txt"), "few.txt: too short for calibration"),
    "no text": (lambda: _text("--calibration", "empty.txt"), "empty.txt: too short for calibration"),
    "text of the table too short": (lambda: _text("--eval", "few.txt"), "few.txt: too short for evaluation"),
    "sequences too long": (lambda: _text("--seq-len", "129"), "128 positions"),
    "few positions": (_short_positions, "the model has 16 positions; lower seq_len"),
    "tokens of another model": (_foreign_tokenizer, "but the model has embeddings of 40 tokens only"),
    "no tokenizer": (_without_tokenizer, "no usable tokenizer"),
    "no BOS": (
        lambda: [*_edit("tokenizer_config.json", bos_token=None), "--set", "bos=window"],
        "bos: window needs a tokenizer with a BOS token",
    ),
    "attentions": (lambda: _edit("config.json", output_attentions=True), "cannot be saved"),
    "device": (lambda: _text("--device", "toaster"), "device 'toaster' cannot be used"),
    "warm start": (lambda: _text("--warm-start", "model"), "model: no bolaco.json in it"),
    "output there already": (lambda: _out("-o", "there"), "there: exists already"),
    "output that is a link to nowhere": (lambda: _out("-o", "link"), "link: exists already"),
    "work folder that is a link": (lambda: _out("-o", "linked"), "linked.work: a link, which cannot be removed"),
    "work folder inside": (lambda: _out("--work", "out/work"), "must not be one inside the other"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_dry_run_says_what_the_run_says(what: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run says it before it factors anything."""
    make, part = FAULTS[what]
    words = compress("out", *make(), model="edited")
    monkeypatch.setattr(factors, "factorize", lambda *_, **__: pytest.fail("factorized"))
    run, dry = bolaco(*words), bolaco(*words, "--dry-run")
    one_line(run, part)
    one_line(dry, part)
    assert run.err.splitlines()[-1] == dry.err.splitlines()[-1]
    refused([*words, "--dry-run"], part)


@pytest.mark.parametrize("what", ["no tokenizer", "attentions", "tokens of another model"])
def test_blocks_that_are_removed_are_not_known_late_either(what: str, place: Path) -> None:
    make, part = FAULTS[what]
    words = ["compress", "edited", "--keep", "0.5", "--method", "chop", "--eval", "other.txt", "--seq-len", "32"]
    words += ["--set", "evaluation.windows=4", "-o", "out", *make()]
    one_line(bolaco(*words), part)
    one_line(bolaco(*words, "--dry-run"), part)


def test_a_dry_run_reads_nothing_from_the_hub(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("read"))
    monkeypatch.setattr("bolaco.data.sources.check_hub", lambda *_: pytest.fail("asked"))
    said = ok(*compress("out", "--search", "hand", "--dry-run", calibration="allenai/c4")).out
    assert "tokens of allenai/c4, which is on the hub and was not read" in said
    words = compress("out", "--search", "hand", "--seq-len", "129", "--dry-run", calibration="allenai/c4")
    refused(words, "128 positions")


@pytest.mark.parametrize("flag", [os.ST_RDONLY, 0])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_an_output_that_cannot_be_written_is_known_at_once(
    flag: int, more: tuple[str, ...], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write where others may not, but nobody on a disk that is read-only."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flag))
    Path("closed").mkdir()
    why = os.strerror(errno.EROFS if flag else errno.EACCES)
    refused([*compress("closed/out", "--work", "work"), *more], "closed/out: cannot be written", why)
    refused([*compress("out", "--work", "closed/deep/work"), *more], "closed/deep/work: cannot be written", why)


def test_a_tokenizer_that_cannot_be_saved(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no vocabulary file")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", broken)
    monkeypatch.setattr(factors, "factorize", lambda *_, **__: pytest.fail("factorized"))
    for more in ([], ["--dry-run"]):
        one_line(bolaco(*compress("out"), *more), "cannot be saved: no vocabulary file")


def test_a_dry_run_knows_the_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=2**40, used=2**40 - 2**10, free=2**10)
    monkeypatch.setattr("bolaco.work.files.shutil.disk_usage", lambda _: usage)
    refused(compress("out", "--dry-run"), "no space left for the checkpoint")
