"""The HTML report: what it draws, that nothing in it comes from outside, and how a browser shows it."""

from __future__ import annotations

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bolaco.api import tune
from bolaco.checkpoint.info import (
    CompressedInfo,
    Curves,
    MatrixCurve,
    TrialRecord,
    TunedInfo,
    read_curves,
    read_info,
)
from bolaco.models.structure import Site
from bolaco.report.charts import rank_map, search_chart
from bolaco.report.comparison import markdown, task_tables
from bolaco.report.curves import matrix_curves, retained_energy, thinned
from bolaco.report.html import comparison_page, number, result_page, tuned_page
from bolaco.report.record import ComparisonRecord
from bolaco.report.svg import Series, chart, standalone, ticks
from bolaco.settings import merge
from tests.browser import MISSING, Browser, browser
from tests.command import bolaco, ok
from tests.models import Compressed, compress_tiny, compressed, save_tiny, text_file, tiny_llama

HOSTILE = "<script>alert('x')</script>\"&|"


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """A result that has everything a report shows: a search, and refined blocks."""
    out = tmp_path_factory.mktemp("searched") / "small"
    options = {"refinement.steps": 3, "refinement.sequences": 4}
    return compress_tiny(tiny_llama(), out, keep=0.7, search="5x1", trials=4, options=options)


@pytest.fixture(scope="module")
def tuned(searched: Compressed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, tuned for a few steps."""
    out = tmp_path_factory.mktemp("tuned") / "small"
    options = {"evaluation.windows": 2, "training.autocast": False}
    words = {"seq_len": 32, "max_steps": 3, "distill": 1.0, "teacher": str(save_tiny(out.with_name("original")))}
    tune(str(searched.path), "factors", str(text_file()), out, options=options, **words)
    return out


def comparison(folder: Path) -> ComparisonRecord:
    """A comparison's record around one result, with a failed row and one whose perplexity is not finite."""
    return ComparisonRecord.model_validate(comparison_values(folder))


def comparison_values(folder: Path) -> dict[str, Any]:
    """The same as JSON has it."""
    info, curves = (found(folder).model_dump(mode="json") for found in (read_info, read_curves))
    fields = ("keep_linears", "keep_model", "parameters", "parameters_linears", "bytes", "storage", "ranks", "trials")
    scores = {"piqa.jsonl": {"examples": 9, "acc": 0.5, "acc_stderr": 0.1}}
    row = {field: info[field] for field in fields} | {"tasks": scores}
    row |= {"seconds": info["seconds"], "peak_bytes": 2**20, "curves": curves, "versions": info["versions"]}
    row |= {"recipe": info["recipe"], "recipe_yaml": "keep: 0.7\n"}
    names = ["default", "a-method-with-a-long-name", "svd-llm", "kfac-svd", HOSTILE]
    rows = [
        row
        | {"name": f"{m}-{k}", "method": m, "keep": k, "perplexity": [30.0 + i] * 2, "gap": [0.1 + i / 3 + 1 - k] * 2}
        for k in (0.8, 0.7)
        for i, m in enumerate(names)
    ]
    rows[1] |= {"perplexity": [None, 41.0], "gap": [None, 0.5]}
    failed = {"name": "x-0.7", "method": "x", "keep": 0.7, "error": f"no {HOSTILE}"}
    rows.append(failed | {"recipe": {}, "recipe_yaml": ""})
    dense = {"perplexity": [28.0, 39.0], "tasks": {"piqa.jsonl": {"examples": 9, "acc": 0.6, "acc_stderr": None}}}
    dense |= {"parameters": 21_664, "parameters_linears": 15_360, "bytes": 86_656}
    return {
        "format": 1,
        "model": HOSTILE,
        "methods": [*names, "x"],
        "keep": [0.8, 0.7],
        "task_keep": 0.8,
        "calibration": [f"8 x 32 tokens of {HOSTILE}"],
        "texts": [
            {"source": source, "windows": 4, "seq_len": 32, "tokens": 124}
            for source in (
                f"wiki-{HOSTILE}.txt",
                "a/folder/with_a_very_long_name_that_cannot_be_broken/at/all/text.txt",
            )
        ],
        "dense": dense,
        "rows": rows,
        "seconds": {"load": 1.5},
        "memory": "row",
        "versions": {"bolaco": "1"},
    }


# --- numbers ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_retained_energy(values: list[float], points: int) -> None:
    spectrum = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    found = retained_energy(spectrum, points)
    assert len(found) == points
    assert found == sorted(found)
    assert found[-1] == 1
    for i, share in enumerate(found, start=1):
        rank = max(1, round(i * len(values) / points))
        expected = math.fsum(sorted(values, reverse=True)[:rank]) / (math.fsum(values) or 1)
        assert sum(values) == 0 or abs(share - expected) < 2e-6


def test_what_a_rank_retains() -> None:
    site = Site("model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj", 0, "q", None, (0, 4), 4, 6, False)
    other = Site("model.layers.0.self_attn.v_proj", "layers.0.self_attn.v_proj", 0, "v", None, (0, 2), 2, 6, False)
    spectra = {site.name: torch.tensor([8.0, 1.0, 0.75, 0.25])}
    found = matrix_curves([site, other], spectra, {site.name: 2, other.name: None})
    assert found[site.name].shape == (4, 6)
    assert found[site.name].kept == pytest.approx(0.9)
    assert found[other.name] == MatrixCurve(shape=(2, 6))
    assert matrix_curves([site], spectra, {site.name: None})[site.name].kept == 1


@given(st.lists(st.floats(-1e3, 1e3), max_size=150), st.integers(1, 32))
@settings(max_examples=60, deadline=None)
def test_thinned_losses_have_the_same_mean(values: list[float], points: int) -> None:
    found = thinned(values, points)
    assert len(found) == min(points, len(values))
    if len(values) <= points:
        assert found == pytest.approx(values)
    elif len(values) % points == 0:
        assert sum(found) / len(found) == pytest.approx(sum(values) / len(values), abs=1e-6)


@given(st.floats(1e-3, 1e4), st.floats(1.01, 1e5), st.booleans())
@settings(max_examples=200, deadline=None)
def test_ticks_lie_on_the_axis(low: float, ratio: float, logarithmic: bool) -> None:
    high = low * ratio
    found = ticks(low, high, logarithmic)
    assert 1 <= len(found) <= 9
    assert found == sorted(set(found))
    slack = 1e-3 * high
    assert all(low - slack <= tick <= high + slack for tick in found)


# --- charts -------------------------------------------------------------------------------------------------------


def test_cells_of_the_rank_map(searched: Compressed) -> None:
    curves = read_curves(searched.path)
    svg = ET.fromstring(str(rank_map("x", searched.info.ranks, "two-factor", curves)))
    notes = [e.text or "" for e in svg.iter() if e.tag.endswith("title")][1:]
    assert len(notes) == len(searched.info.ranks) == 14
    q = searched.info.ranks["model.layers.1.self_attn.q_proj"]
    assert f"layer 1 q: rank {q}, {q * 64 / 1024:.3f}" in notes
    assert sum("dense" in note for note in notes) == sum(rank is None for rank in searched.info.ranks.values())


def test_points_of_the_search(searched: Compressed) -> None:
    svg = str(search_chart("x", searched.info.trials))
    assert len(re.findall(r'<circle [^>]*class="mark"><title>trial: \d', svg)) == 4
    best = min(range(4), key=lambda i: searched.info.trials[i].objective)
    assert f"the best is trial {best} " in svg
    assert search_chart("x", []) is None


def test_points_that_are_not_finite_are_left_out() -> None:
    series = [Series("a", [(0.9, math.inf), (0.8, 2.0), (0.7, math.nan)]), Series("b", [(0.8, 0.5), (0.7, -1.0)])]
    svg = standalone(chart("x", "t", "d", series, "x", "y", logarithmic=True))
    ET.fromstring(svg)
    assert "nan" not in svg
    assert "inf" not in svg
    assert len(re.findall(r"<title>[ab]: ", svg)) == 2


def test_every_series_looks_different() -> None:
    """By colour and shape, also without colours within each eight."""
    series = [Series(f"series {i}", [(0.9, 1.0 + i), (0.8, 2.0 + i)]) for i in range(24)]
    svg = ET.fromstring(str(chart("x", "t", "d", series, "x", "y")))
    looks: dict[str, set[str]] = {}
    for group in (e for e in svg if e.tag.endswith("}g")):
        for mark in (e for e in group if e.get("class") == "mark"):
            shape = mark.tag + (mark.get("d") or "").partition("l")[2]
            looks.setdefault((mark[0].text or "").partition(":")[0], set()).add(f"{group.get('class')} {shape}")
    assert len(looks) == 24
    assert all(len(found) == 1 for found in looks.values())
    assert len(set().union(*looks.values())) == 24


def test_a_search_of_one_trial_and_equal_values() -> None:
    trials = [TrialRecord(keep={}, ranks={}, objective=3.0, perplexity=3.0, kl=0.0, seconds=0.0)]
    assert "1 trials" in str(search_chart("x", trials))
    assert "NaN" not in str(search_chart("x", trials * 3))


# --- the page as a text -------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks nesting, and collects what the tests ask about."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: Counter[str] = Counter()
        self.bare_heads = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags[tag] += 1
        self.bare_heads += tag == "th" and "scope" not in given
        if "id" in given:
            self.ids.append(given["id"] or "")
        for name in ("aria-labelledby", "aria-describedby"):
            self.references += (given.get(name) or "").split()
        for name in ("src", "href", "srcset", "action", "data", "onclick", "onload", "onerror"):
            assert name not in given, (tag, name)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


def check(text: str) -> Page:
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    assert page.tags["h1"] == page.tags["main"] == 1
    assert page.tags["title"] >= 1 + page.tags["svg"]
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == page.bare_heads == 0
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in page.ids}
    assert re.findall(r"https?://[^\s\"<]+", text.replace("http://www.w3.org/2000/svg", "")) == []
    return page


def test_compress_writes_a_report(searched: Compressed) -> None:
    text = (searched.path / "report.html").read_text(encoding="utf-8")
    page = check(text)
    assert page.tags["svg"] == 1 + 1 + 6 + 1 + 1  # ranks, search, spectra without v, refinement, next tokens
    assert f"{searched.info.perplexity.compressed:.4g}" in text
    assert f"{searched.info.keep_linears:.4f}" in text
    assert "bolaco run" in text
    assert "](report.html)" in (searched.path / "README.md").read_text(encoding="utf-8")


def test_losses_of_refined_blocks_are_kept(searched: Compressed) -> None:
    losses = read_curves(searched.path).refinement
    assert sorted(losses) == ["0", "1"]
    assert all(len(values) == 3 and min(values) > 0 for values in losses.values())
    assert read_curves(compressed("llama").path).refinement == {}


def test_a_tuned_result_has_a_report_of_the_tuning(tuned: Path) -> None:
    page, record = (tuned / "report.html").read_text(encoding="utf-8"), read_info(tuned).tuning
    assert record is not None
    assert f"before {number(record.perplexity.before)}" in page
    assert f"The loss is {record.curve[0].loss:.4g} at step 1 and" in page

    def other(**changes: Any) -> TunedInfo:
        return TunedInfo(format=1, model_type="llama", tuning=record.model_copy(update=changes))

    assert "<script" not in tuned_page(other(model=HOSTILE, mode=HOSTILE), HOSTILE)
    assert tuned_page(other(curve=[]), "x").count("<svg ") == 0


def changed(run: Compressed, **values: Any) -> CompressedInfo:
    """What ``bolaco.json`` says, with other values; those of a part are laid over it."""
    return CompressedInfo.model_validate(merge(run.info.model_dump(), values))


def test_everything_from_outside_is_escaped(searched: Compressed) -> None:
    hostile = {"perplexity": {"data": HOSTILE}, "recipe": {"model": HOSTILE}}
    info = changed(searched, model=HOSTILE, method=HOSTILE, **hostile).model_copy(
        update={"versions": {HOSTILE: HOSTILE}}
    )
    text = result_page(info, read_curves(searched.path), HOSTILE)
    check(text)
    assert text.count("&lt;script&gt;") >= 8
    text = comparison_page(comparison(searched.path))
    check(text)
    assert text.count("&lt;script&gt;") >= 8


def test_a_model_that_broke(searched: Compressed) -> None:
    text = result_page(changed(searched, perplexity={"compressed": math.inf}), read_curves(searched.path), "x")
    check(text)
    assert text.count("not finite") == 4


def test_a_result_without_ranks(searched: Compressed) -> None:
    text = result_page(
        searched.info.model_copy(update={"ranks": {}, "trials": []}), Curves(matrices={}, refinement={}), "x"
    )
    assert check(text).tags["svg"] == 0
    assert "<h2>Ranks</h2>" not in text


def test_tasks_have_a_mean_where_there_are_several(searched: Compressed) -> None:
    values = comparison_values(searched.path)
    dense = {"examples": 9, "acc": 0.6, "acc_stderr": 0.3, "acc_norm": 0.5, "acc_norm_stderr": None}
    values["dense"]["tasks"] = {
        "a": dense,
        "b": dense | {"acc": 0.2, "acc_stderr": 0.4},
        "c": {"examples": 3, "f1": 0.1},
    }
    values["rows"] = [values["rows"][0] | {"tasks": {"a": dense, "b": {"examples": 9}}}]
    acc, norm, f1 = task_tables(ComparisonRecord.model_validate(values))
    assert acc.columns == ["method", "a (9)", "b (9)", "mean"]
    assert acc.rows[0] == ["dense", "0.6000 ± 0.3000", "0.2000 ± 0.4000", "0.4000 ± 0.2500"]
    assert acc.rows[1][1:] == ["0.6000 ± 0.3000", "", ""]
    assert norm.rows[0][-1] == "0.5000"
    assert (f1.columns, f1.rows[0]) == (["method", "c (3)"], ["dense", "0.1000"])


def test_a_comparison_of_methods_that_read_no_text_says_so(searched: Compressed) -> None:
    record = comparison(searched.path).model_copy(update={"calibration": []})
    for text in (comparison_page(record), markdown(record)):
        assert "None of these methods reads text." in text
        assert "Calibrated on" not in text
    record = record.model_copy(update={"calibration": ["8 x 32 tokens of a", "4 x 32 tokens of b"]})
    for text in (comparison_page(record), markdown(record)):
        assert "Calibrated on 8 x 32 tokens of a; 4 x 32 tokens of b." in text


def test_a_comparison_shows_every_row(searched: Compressed) -> None:
    record = comparison(searched.path)
    text = comparison_page(record)
    assert check(text).tags["tr"] > len(record.rows)
    assert "smallest of each keep ratio" in text
    assert text.count('class="best"') == 4
    assert 'class="failed"' in text
    assert "0.6000" in text
    assert "0.5000 ± 0.1000" in text


def test_a_result_of_before_still_has_a_report(searched: Compressed, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(searched.path, old)
    for name in ("curves.json", "report.html"):
        (old / name).unlink()
    done = ok("inspect", old, "--html", tmp_path / "page.html")
    assert "report written to" in done.out
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    check(text)
    assert "of the largest of its type" in text
    assert "<h2>Spectra</h2>" not in text
    again = bolaco("inspect", old, "--html", tmp_path / "page.html")
    assert again.code == 1
    assert "exists already" in again.err


@pytest.mark.parametrize("content", ["{", "[]", '{"matrices": {}}'])
def test_damaged_curves_are_one_line(content: str, searched: Compressed, tmp_path: Path) -> None:
    shutil.copytree(searched.path, tmp_path / "out")
    (tmp_path / "out/curves.json").write_text(content, encoding="utf-8")
    done = bolaco("inspect", tmp_path / "out", "--html", tmp_path / "page.html")
    assert done.code == 1
    assert re.fullmatch(r"bolaco: error: \S+curves.json: damaged \(.*\)\n", done.err)
    assert not (tmp_path / "page.html").exists()


def test_bolaco_json_stays_readable(searched: Compressed) -> None:
    written = json.loads((searched.path / "bolaco.json").read_text(encoding="utf-8"))
    assert "curves" not in written
    assert "matrices" not in written


# --- colours ------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_contrast(scheme: int) -> None:
    """WCAG 2 AA, in the light and the dark scheme: 4.5 for text, 3 for lines and markers."""
    style = files("bolaco.report").joinpath("templates/charts.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    for surface in ("paper", "panel"):
        for name, least in {"ink": 4.5, "soft": 4.5, "bad": 4.5, "accent": 3.0}.items():
            assert ratio(colours[name], colours[surface]) >= least, (name, surface)
    for index in range(8):
        assert ratio(colours[f"s{index}"], colours["paper"]) >= 3, index


def ratio(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if MISSING:
        pytest.skip(MISSING)
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


MEASURE = """
document.querySelectorAll('details').forEach(d => d.open = true);
const boxes = [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect());
const page = document.documentElement;
return {
  across: page.scrollWidth,
  charts: boxes.map(b => [b.width, b.height]),
  right: Math.max(...boxes.map(b => b.right)),
  wide: [...document.querySelectorAll('.scroll')].some(s => s.scrollWidth > s.clientWidth),
  paper: getComputedStyle(document.body).backgroundColor,
};
"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["result", "tuned", "comparison"])
def test_in_a_browser(
    kind: str, width: int, dark: bool, searched: Compressed, tuned: Path, session: Browser, tmp_path: Path
) -> None:
    page = (tuned if kind == "tuned" else searched.path) / "report.html"
    if kind == "comparison":
        page = tmp_path / "comparison.html"
        page.write_text(comparison_page(comparison(searched.path)), encoding="utf-8")
    session.open(page, width, dark=dark)
    found = session.run(MEASURE)
    # Not the window's own width: a phone makes it as wide as what overflows.
    assert found["across"] <= width
    assert found["right"] <= width
    assert len(found["charts"]) == page.read_text(encoding="utf-8").count("<svg ")
    assert all(w > 100 and h > 60 for w, h in found["charts"])
    assert found["paper"] == ("rgb(20, 25, 31)" if dark else "rgb(255, 255, 255)")
    assert found["wide"] or width > 390 or kind == "tuned"  # tables scroll in their own box
    assert session.requests() == [page.resolve().as_uri()]
    assert session.messages() == []
