"""bolaco in a notebook: its names, texts in memory, models in memory, progress, and the tour in ``examples``."""

from __future__ import annotations

import importlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

import bolaco
from bolaco import api
from bolaco.data.memory import in_memory
from bolaco.data.sources import TokenStream, read_documents
from bolaco.errors import DataError, RecipeError
from bolaco.progress import Reporter
from bolaco.recipe.recipe import load_recipe
from bolaco.report.card import model_card
from tests.models import TINY, english, save_tiny, text_file, tiny_llama, tiny_tokenizer, token_blocks

TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"
DOCUMENTS = [english(60, seed) for seed in range(20)]
QUICK = {name: value for name, value in TINY.items() if not name.startswith(("search", "validation"))}
QUICK |= {"refinement.steps": 0, "search.rank_multiple": 4}


def compress(**words: Any) -> Any:
    options = {**QUICK, **words.pop("options", {})}
    options.pop("calibration.seq_len", None)
    words = {"keep": 0.8, "model": tiny_llama(), "tokenizer": tiny_tokenizer()} | words
    return bolaco.compress(**words, options={k: v for k, v in options.items() if v is not None})


# --- names --------------------------------------------------------------------------------------------------------


def test_the_package_shows_its_functions() -> None:
    functions = {"compare", "compress", "delta", "distill", "evaluate", "evaluate_tasks", "export", "fuse"}
    functions |= {"generate_text", "load", "tune", "unfuse"}
    assert functions <= set(dir(bolaco))
    assert functions == set(bolaco.__all__) - {"DeltaModel", "__version__"}
    assert all(callable(getattr(bolaco, name)) for name in functions)


def test_tune_is_a_function_whatever_was_imported(tmp_path: Path) -> None:
    """Its folder has the same name, and both can be used."""
    for module in ("bolaco.tune", "bolaco.tune.settings"):
        importlib.import_module(module)
        import bolaco.tune.settings as imported

        assert imported.make_settings
        with pytest.raises(RecipeError, match="no-such-mode"):
            bolaco.tune("model", "no-such-mode", "text.txt", tmp_path / "out")


@pytest.mark.parametrize("name", ["delta", "distill"])
def test_other_functions_that_have_a_folder_stay_functions(name: str) -> None:
    folder = importlib.import_module(f"bolaco.{name}")
    with pytest.raises(TypeError, match=rf"{name}\(\) missing .* required positional arguments"):
        folder()
    with pytest.raises(TypeError, match=rf"{name}\(\) missing .* required positional arguments"):
        getattr(bolaco, name)()


# --- texts in memory ----------------------------------------------------------------------------------------------


def test_a_name_changes_with_the_content() -> None:
    texts = [["a b", "c"], ["a", "b c"], ["a b c"], ["c", "a b"], ["a b", "c", "d"]]
    names = [in_memory(documents, "calibration").name for documents in texts]
    assert len(set(names)) == len(names)
    assert names[0].startswith("in memory: 2 documents, ")
    assert in_memory(tuple(texts[0]), "calibration").name == names[0]
    assert in_memory(datasets.Dataset.from_dict({"text": texts[0], "other": [1, 2]}), "x").name == names[0]
    blocks = [torch.arange(12).view(3, 4), torch.arange(12).view(4, 3), torch.arange(1, 13).view(3, 4)]
    assert len({in_memory(tokens, "x").name for tokens in blocks}) == 3
    assert in_memory(blocks[0].int(), "x").name == in_memory(blocks[0], "x").name


def test_rows_without_text_are_passed_over() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", None, "  ", "b"]})
    assert in_memory(rows, "x").documents == ("a", "b")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "there is no text"),
        ([" ", ""], "there is no text"),
        (["a", 3], "document 1 is int"),
        ([b"bytes"], "document 0 is bytes"),
        (b"bytes", "got bytes"),
        (7, "got int"),
        ({"text": ["a"]}, "got dict"),
        (datasets.Dataset.from_dict({"words": ["a"]}), r"a column 'text' is expected, .* \['words'\]"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})), "a data set with a column 'text'"),
        (torch.zeros(3, dtype=torch.long), r"\[blocks, length\] of integers, this one is \[3\] of int64"),
        (torch.zeros(3, 4), "of float32"),
        (torch.zeros(3, 4, dtype=torch.bool), "of bool"),
        (torch.zeros(0, 4, dtype=torch.long), r"\[0, 4\]"),
    ],
)
@pytest.mark.parametrize("word", ["calibration", "evaluation"])
def test_what_is_no_text_is_refused(data: Any, message: str, word: str) -> None:
    with pytest.raises(DataError, match=f"^{word}: .*{message}"):
        bolaco.compress("no/model", keep=0.8, **{word: data})


def ranks_of(**words: Any) -> Any:
    return compress(**words).info


def test_documents_are_what_a_file_of_them_is(tmp_path: Path) -> None:
    """A list, a data set and a file give the same tokens, so the same ranks and perplexities."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
    infos = [ranks_of(calibration=data, seq_len=32) for data in (str(file), DOCUMENTS, rows)]
    assert infos[0].ranks == infos[1].ranks == infos[2].ranks
    assert len({info.perplexity.compressed for info in infos}) == 1
    assert infos[1].recipe["calibration"]["source"] == in_memory(DOCUMENTS, "x").name
    assert "in memory: 20 documents, " in infos[1].perplexity.data
    assert infos[1].perplexity.data in model_card(infos[1], "small")


def test_tokens_are_used_as_they_are(tmp_path: Path) -> None:
    """They give what the text gives that they are the tokens of; their shape says how much there is."""
    stream = TokenStream(str(text_file()), tiny_tokenizer())
    calibration, evaluation = stream.take(8, 32, "calibration"), stream.take(4, 32, "evaluation")
    from_text = ranks_of(calibration=str(text_file()), seq_len=32)
    without = {"calibration.sequences": None, "evaluation.windows": None}
    from_tokens = ranks_of(calibration=calibration, evaluation=evaluation, options=without)
    together = ranks_of(calibration=torch.cat([calibration, evaluation]), options={"calibration.sequences": None})
    assert from_text.ranks == from_tokens.ranks == together.ranks
    assert from_text.perplexity.compressed == from_tokens.perplexity.compressed == together.perplexity.compressed
    assert from_tokens.recipe["calibration"]["sequences"] == 8
    assert from_tokens.recipe["evaluation"]["windows"] == 4
    with pytest.raises(DataError, match="too short for calibration: 13 x 32 tokens are needed, 12 x 32 are left"):
        ranks_of(calibration=torch.cat([calibration, evaluation]), options={"calibration.sequences": 13})
    with pytest.raises(DataError, match="too short for evaluation: 4 x 32 tokens are needed, 4 x 16 are left"):
        ranks_of(calibration=calibration, evaluation=evaluation[:, :16], options={"evaluation.seq_len": 32})


def test_a_run_goes_on_with_the_same_texts_only(tmp_path: Path) -> None:
    """Artefacts are found again by content, whatever the text is called."""
    work = tmp_path / "work"
    words = {"model": tiny_llama(), "tokenizer": tiny_tokenizer(), "seq_len": 32, "options": QUICK}
    names = []
    for data in (DOCUMENTS, list(DOCUMENTS), DOCUMENTS[::-1]):
        recipe = api.make_recipe(
            api.recipe_values(
                keep=0.8,
                calibration=in_memory(data, "x").name,
                seq_len=32,
                options={**QUICK, "calibration.seq_len": 32, "model": "tiny"},
            )
        )
        given = {in_memory(data, "x").name: in_memory(data, "x")}
        out = tmp_path / f"out{len(names)}"
        api.run(recipe, out, work=work, keep_work=True, model=words["model"], tokenizer=words["tokenizer"], given=given)
        names.append({path.name for path in work.glob("factors-*")})
    assert names[0] == names[1] < names[2]


def test_a_recipe_of_such_a_run_says_that_its_text_was_in_memory(tmp_path: Path) -> None:
    result = compress(calibration=DOCUMENTS, seq_len=32, out=tmp_path / "out")
    source = result.info.recipe["calibration"]["source"]
    with pytest.raises(DataError, match=f"{source}: was given to a function of Python and is no source"):
        next(read_documents(source))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(card.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml").calibration.source == source


def test_evaluation_takes_what_calibration_takes() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokens = TokenStream(in_memory(DOCUMENTS, "x"), tokenizer).take(None, 24, "evaluation")
    results = [
        bolaco.evaluate(model, data, seq_len=24, tokenizer=tokenizer)
        for data in (DOCUMENTS, datasets.Dataset.from_dict({"text": DOCUMENTS}), tokens)
    ]
    assert len({result.perplexity for result in results}) == 1
    assert bolaco.evaluate(model, tokens, tokenizer=tokenizer).seq_len == 24
    assert bolaco.evaluate(model, token_blocks(3, 12), tokenizer=tokenizer, limit=2).windows == 2


def test_comparisons_take_it_too(tmp_path: Path) -> None:
    result = bolaco.compare(
        tiny_llama(),
        ["svd", "svd-llm"],
        [0.8],
        tmp_path / "out",
        calibration=DOCUMENTS,
        evaluation=[str(text_file()), token_blocks(4, 32)],
        tokenizer=tiny_tokenizer(),
        seq_len=32,
        options={name: value for name, value in QUICK.items() if not name.startswith("refinement")},
    )
    assert not result.failed
    sources = [text.source for text in result.record.texts]
    assert sources == [str(text_file()), in_memory(token_blocks(4, 32), "x").name]


# --- models in memory ---------------------------------------------------------------------------------------------


def test_without_a_folder_the_model_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one that would be in the folder, and nothing is left anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = save_tiny(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    words = {"calibration": str(text_file()), "seq_len": 32, "model": str(folder), "tokenizer": None}
    result = compress(**words)
    assert sorted(tmp_path.rglob("*")) == before
    assert isinstance(result.model, PreTrainedModel)
    assert result.model.config.model_type == "lowrank_llama"
    assert result.info.keep_linears <= 0.8
    written = compress(**words, out=tmp_path / "out")
    tokens = token_blocks(2, 16)
    assert torch.equal(result.model(tokens).logits, written.model(tokens).logits)
    assert written.model is written.model
    assert result.tokenizer("the house").input_ids == written.tokenizer("the house").input_ids
    assert result.model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 19)
    # Its tokenizer is found by its name, as that of the original is.
    assert bolaco.evaluate(result.model, DOCUMENTS, seq_len=32, limit=2).windows == 2
    result.model.save_pretrained(tmp_path / "saved")
    assert torch.equal(bolaco.load(str(tmp_path / "saved"))(tokens).logits, result.model(tokens).logits)


def test_a_failure_leaves_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(DataError):
        compress(calibration=DOCUMENTS[:1], seq_len=32)
    assert list(tmp_path.iterdir()) == []


def test_export(tmp_path: Path) -> None:
    result = compress(calibration=str(text_file()), seq_len=32, out=tmp_path / "out")
    stock = bolaco.load(str(bolaco.export(tmp_path / "out", tmp_path / "stock")))
    tokens = token_blocks(2, 16)
    assert stock.config.model_type == "llama"
    assert torch.allclose(stock(tokens).logits, result.model(tokens).logits, atol=1e-3)


# --- progress -----------------------------------------------------------------------------------------------------


def said(**kind: Any) -> str:
    screen = io.StringIO()
    reporter = Reporter.watched(Console(file=screen, width=80, **kind))
    reporter.say("loading")
    with reporter.stage("long work", 2) as tick:
        tick(1)
        tick(1)
    return screen.getvalue()


def test_functions_are_silent_where_nobody_watches() -> None:
    assert said() == ""


def test_functions_show_progress_in_a_terminal() -> None:
    shown = said(force_terminal=True)
    assert "loading" in shown
    assert "2/2" in shown


def test_functions_show_progress_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines where ipywidgets are missing, with which rich draws its bar."""
    shown: list[str] = []
    console = Console(force_jupyter=True)
    monkeypatch.setattr(console, "print", lambda text, **_: shown.append(text))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reporter = Reporter.watched(console)
    with reporter.stage("long work", 2) as tick:
        tick(2)
    assert shown == ["long work: 2/2 in 0:00"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert reporter._draws()


# --- the tour -----------------------------------------------------------------------------------------------------


def test_the_tour(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell in one namespace; what the first code cell sets is smaller here."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    cells = [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells[0]["metadata"]["tags"] == ["parameters"]
    assert not any(cell["outputs"] for cell in cells)
    space: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), space)  # noqa: S102 - it is ours
        if cell is cells[0]:
            rows = [json.dumps({"text": text}) for text in DOCUMENTS]
            (tmp_path / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
            space |= {"MODEL": str(save_tiny(tmp_path / "model")), "SOURCE": str(tmp_path / "text.jsonl")}
            space |= {"SEQ_LEN": 32, "SEQUENCES": 8, "WINDOWS": 4, "PROMPT": "the old house"}
    said = capsys.readouterr().out
    assert "10 documents to calibrate on" in said
    assert "LowRankLlamaForCausalLM" in said
    assert said.endswith("LlamaForCausalLM\n")
    assert list((tmp_path / "temporary").iterdir()) == []
