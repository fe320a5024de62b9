"""The optimizer's state of a chopped model, filled by steps of the original (arXiv 2305.14864)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from bolaco import api
from bolaco.errors import RecipeError
from bolaco.models.load import load_model
from bolaco.tune.fill import filled
from bolaco.tune.mode import Context
from bolaco.tune.modes import continued
from bolaco.tune.modes.continued import MODE
from bolaco.tune.resolve import resolve
from bolaco.tune.settings import make_settings
from bolaco.tune.trainer import TuneTrainer
from tests.command import digest
from tests.models import Compressed, compressed, compressed_once, save_tiny, slow, text_file, token_blocks

OPTIONS = {"training.autocast": False, "evaluation.windows": 2, "data.sequences": 8}


def chopped(family: str = "llama") -> Compressed:
    return compressed_once(family, layers=6, preset="chop", search=None)


def run(out: Path, **options: Any) -> Any:
    source = chopped()
    original = save_tiny(out.parent / "tiny", source.original) if not (out.parent / "tiny").exists() else None
    assert original is None or original.exists()
    words = {"max_steps": 2, "batch": 2, "seq_len": 16}
    settings = OPTIONS | {f"options.{key}": value for key, value in options.items()}
    return api.tune(str(source.path), "continued", str(text_file()), out, options=settings, **words)


@pytest.mark.parametrize("family", ["llama", slow("gpt2")])
def test_moments_are_those_of_the_original_at_the_blocks_that_stay(family: str) -> None:
    source = chopped(family)
    model, original = load_model(str(source.path)), load_model_of(source)
    tokens = [block[None] for block in token_blocks(3, 16)]
    given = {"training.autocast": False, "training.max_grad_norm": 0, "training.batch": 1}
    settings, options = resolve(make_settings("m", {"mode": "continued", "data": "x"}, given), MODE)
    context = Context(model, settings, options, source.info, lambda n: tokens[:n], lambda _: original)
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    found = filled(context, 3)
    # The reference: AdamW by its definition, of gradients that transformers computes.
    parameters = dict(original.named_parameters())
    mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
    square = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for rows in tokens:
        original.zero_grad()
        original.requires_grad_(True)
        original(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        for name, p in parameters.items():
            mean[name] = 0.9 * mean[name] + 0.1 * p.grad
            square[name] = 0.95 * square[name] + 0.05 * p.grad**2
    assert found.steps == 3
    assert found.mean.keys() == found.square.keys() == dict(model.named_parameters()).keys()
    stays = dict(enumerate(source.info.layers))
    assert any(new != old for new, old in stays.items())
    for name, tensor in found.mean.items():
        parts = name.split(".")
        theirs = ".".join(str(stays[int(part)]) if part.isdigit() else part for part in parts)
        torch.testing.assert_close(tensor, mean[theirs], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found.square[name], square[theirs], rtol=1e-3, atol=1e-8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def load_model_of(source: Compressed) -> Any:
    return copy.deepcopy(source.original).requires_grad_(False)


def test_training_begins_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[dict[str, Any]] = []
    create = TuneTrainer.create_optimizer

    def creating(self: Any, model: Any = None) -> Any:
        optimizer = create(self, model)
        seen.append({"steps": {float(state["step"]) for state in optimizer.state.values()}, "of": len(optimizer.state)})
        return optimizer

    monkeypatch.setattr(TuneTrainer, "create_optimizer", creating)
    plain, full = run(tmp_path / "plain"), run(tmp_path / "full", fill=3)
    assert seen[0] == {"steps": set(), "of": 0}
    assert seen[1] == {"steps": {3.0}, "of": len(list(load_model(str(plain.path)).parameters()))}
    assert digest(full.path / "model.safetensors") != digest(plain.path / "model.safetensors")
    assert full.info.tuning.settings["options"] == {"fill": 3}


def test_they_are_found_again_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = run(tmp_path / "whole", fill=2)
    with monkeypatch.context() as patch:
        patch.setattr(TuneTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", fill=2)
    monkeypatch.setattr("bolaco.tune.fill._moments", lambda *_: pytest.fail("filled again"))
    again = run(tmp_path / "out", fill=2)
    assert digest(again.path / "model.safetensors") == digest(whole.path / "model.safetensors")


def test_it_is_for_chopped_models_and_adamw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = {"max_steps": 1, "batch": 2, "seq_len": 16, "options": OPTIONS | {"options.fill": 2}}
    for source in (compressed("llama").path, save_tiny(tmp_path / "model")):
        with pytest.raises(RecipeError, match=r"options\.fill: .* is no model that blocks were removed from"):
            api.tune(str(source), "continued", str(text_file()), tmp_path / "out", **words)
    save_tiny(tmp_path / "tiny", chopped().original)
    words["options"] |= {"trainer.optim": "sgd"}
    with pytest.raises(RecipeError, match=r"options\.fill: is for AdamW"):
        api.tune(str(chopped().path), "continued", str(text_file()), tmp_path / "out", **words)
    assert continued.ContinuedOptions().fill == 0
