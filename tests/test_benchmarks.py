"""What the benchmarks have in common does what it says: a mistake there would be a wrong number in the documents."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

from bolaco.models.find import inspect_structure
from tests.models import tiny_llama, token_blocks


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.delitem(sys.modules, "common", raising=False)
    import common

    yield common
    sys.modules.pop("common", None)


def test_a_model_has_the_blocks_it_is_given_and_its_own_again(common) -> None:
    model = tiny_llama()
    structure, tokens = inspect_structure(model), token_blocks(1, 8)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=tokens).logits

    before = logits()
    first = copy.deepcopy(structure.block_modules(model)[0])
    for parameter in first.parameters():
        parameter.data.mul_(1.5)
    with common.with_blocks(model, structure, [first]):
        assert not torch.allclose(logits(), before)
    assert torch.equal(logits(), before)
