"""Losses against transformers' and torch's own, on whole logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from bolaco.errors import NonFiniteError, UnsupportedModelError
from bolaco.evaluation.objective import SLAB, Head, Scores, final_hidden, hidden_states, score
from bolaco.evaluation.perplexity import perplexity
from tests.models import FAMILIES, VOCABULARY, tiny_llama, token_blocks

HEADS = {
    "plain": FAMILIES["llama"],
    "tied": FAMILIES["qwen2"],
    "softcapped": FAMILIES["gemma2"],
    "scaled": FAMILIES["granite"],
    "narrow embedding": FAMILIES["opt_post_norm"],
}
heads = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
# Bytes of logits such that a chunk holds 5 positions, which does not divide the length.
FIVE_ROWS = 5 * VOCABULARY * 4


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    return token_blocks(5, 24)


def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits.double()


def changed(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """The model with noise on its projections; the head is as it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name or "fc" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@heads
def test_nll_is_cross_entropy_of_the_whole_logits(make: Callable[[], PreTrainedModel], blocks: Tensor) -> None:
    model = make()
    logits = logits_of(model, blocks)
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), blocks[:, 1:], reduction="none").sum(dim=1)
    found = score(model, Head(model), blocks, batch=2)
    torch.testing.assert_close(found.nll, expected, rtol=1e-5, atol=0)
    assert found.nll.dtype == torch.float64
    assert found.predicted == 23
    assert found.kl.tolist() == [0.0] * 5
    torch.testing.assert_close(found.perplexities, (expected / 23).exp(), rtol=1e-5, atol=0)
    assert found.perplexity == pytest.approx(math.exp(float(expected.sum()) / (5 * 23)), rel=1e-5)


@heads
def test_kl_is_the_divergence_from_model_to_reference(make: Callable[[], PreTrainedModel], blocks: Tensor) -> None:
    model, teacher = changed(make()), make()
    ours, theirs = logits_of(model, blocks).log_softmax(-1), logits_of(teacher, blocks).log_softmax(-1)
    # F.kl_div(input, target) is KL(target || input): the model's probabilities are the weights.
    expected = F.kl_div(theirs, ours, reduction="none", log_target=True).sum(dim=(1, 2))
    distributions = torch.distributions
    other = distributions.kl_divergence(
        distributions.Categorical(logits=ours), distributions.Categorical(logits=theirs)
    )
    torch.testing.assert_close(other.sum(dim=1), expected)
    reference = hidden_states(teacher, blocks, batch=2)
    found = score(model, Head(model), blocks, batch=3, reference=reference)
    torch.testing.assert_close(found.kl, expected, rtol=1e-4, atol=1e-4)
    assert found.mean_kl == pytest.approx(float(expected.mean()), rel=1e-4)
    # Large enough to tell the directions apart.
    opposite = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=(1, 2))
    assert ((opposite / expected - 1).abs() > 0.01).any()


@heads
def test_kl_of_a_model_with_itself_is_nothing(make: Callable[[], PreTrainedModel], blocks: Tensor) -> None:
    model = make()
    found = score(model, Head(model), blocks, reference=hidden_states(model, blocks, batch=4))
    assert found.kl.abs().max() < 1e-4
    assert found.objective(1e-3) == pytest.approx(found.perplexity, abs=1e-6)


@heads
@pytest.mark.parametrize("slab", [1, FIVE_ROWS, 24 * VOCABULARY * 4, SLAB])
def test_the_chunk_size_changes_nothing(make: Callable[[], PreTrainedModel], slab: int, blocks: Tensor) -> None:
    model = changed(make())
    reference = hidden_states(make(), blocks, batch=5)
    whole = score(model, Head(model), blocks, reference=reference, slab=10**9)
    found = score(model, Head(model), blocks, reference=reference, slab=slab)
    torch.testing.assert_close(found.nll, whole.nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.kl, whole.kl, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_the_batch_size_changes_nothing(batch: int, blocks: Tensor) -> None:
    model, teacher = changed(tiny_llama()), tiny_llama()
    ticks: list[int] = []
    reference = hidden_states(teacher, blocks, batch, ticks.append)
    torch.testing.assert_close(reference, hidden_states(teacher, blocks, 5), rtol=1e-4, atol=1e-5)
    found = score(model, Head(model), blocks, batch, reference, tick=ticks.append)
    whole = score(model, Head(model), blocks, 5, reference)
    torch.testing.assert_close(found.nll, whole.nll, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.kl, whole.kl, rtol=1e-4, atol=1e-4)
    assert sum(ticks) == 2 * len(blocks)


@heads
def test_perplexity_is_exp_of_transformers_own_loss(make: Callable[[], PreTrainedModel], blocks: Tensor) -> None:
    model = make()
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in blocks]
    found = perplexity(model, blocks, batch=2)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (found.tokens, found.windows, found.seq_len) == (5 * 23, 5, 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_gives_the_logits_of_every_family(family: str, blocks: Tensor) -> None:
    model = FAMILIES[family]()
    hidden = hidden_states(model, blocks[:1], 1)[0]
    with torch.no_grad():
        torch.testing.assert_close(Head(model)(hidden).double(), logits_of(model, blocks[:1])[0], rtol=1e-5, atol=1e-5)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda x: 1.1 * x,
    "capped": lambda x: x.tanh(),
    "permuted": lambda x: x.flip(-1),
}


# Small logits too: those of a freshly initialised model.
@pytest.mark.parametrize(
    ("change", "size"), [("scaled", 1.0), ("capped", 1.0), ("permuted", 1.0), ("scaled", 1e-3), ("permuted", 1e-3)]
)
def test_logits_that_are_more_than_the_head_s(change: str, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what the model itself makes of hidden states."""
    model = tiny_llama()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(size)
    forward = model.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = CHANGES[change](output.logits)
        return output

    plain, tokens = Head(model), token_blocks(2, 9)
    monkeypatch.setattr(model, "forward", other)
    head = Head(model)
    with torch.no_grad():
        states, expected = final_hidden(model, tokens)[1], model(input_ids=tokens, use_cache=False).logits[1]
        torch.testing.assert_close(head(states), expected, rtol=1e-5, atol=1e-6 * size)
        assert not torch.allclose(plain(states), expected, rtol=1e-2, atol=1e-2 * size)
    assert "forward" not in vars(model.base_model)


def test_logits_that_mix_positions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    base = model.base_model.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        output = base(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + 1
        return output

    forward = model.forward

    def mixed(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(model.base_model, "forward", other)
        output = forward(*args, **kwargs)
        monkeypatch.undo()
        return output

    model.forward = mixed
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*logits"):
        Head(model)


def test_a_model_in_half_precision_passes_the_check() -> None:
    for make in HEADS.values():
        Head(make().to(torch.bfloat16))


def test_a_model_without_an_output_embedding_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no output embedding"):
        Head(tiny_llama().base_model)


@pytest.mark.parametrize("where", ["model", "reference"])
def test_nan_is_refused_by_sequence(where: str, blocks: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    head = Head(model)
    reference = hidden_states(model, blocks, 5)
    if where == "reference":
        reference[3, 7, 0] = torch.nan
    else:
        forward = model.base_model.forward

        def broken(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            rows = (kwargs["input_ids"] == blocks[3]).all(dim=1)
            output.last_hidden_state[rows, 7] = torch.nan
            return output

        monkeypatch.setattr(model.base_model, "forward", broken)
    with pytest.raises(NonFiniteError, match="sequence 3 "):
        score(model, head, blocks, 2, reference)


def test_logits_are_never_made_for_a_whole_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, length = 50_000, 128
    model = tiny_llama(vocab_size=vocabulary, num_hidden_layers=1)
    tokens = torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    head = Head(model)
    reference = hidden_states(model, tokens, 2)
    rows: list[int] = []
    call = Head.__call__

    def counted(self: Head, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return call(self, hidden)

    monkeypatch.setattr(Head, "__call__", counted)
    slab = 4 * vocabulary * 10
    score(model, head, tokens, 2, slab=slab)
    assert max(rows) == 10
    assert sum(rows) == tokens.numel()
    rows.clear()
    score(model, head, tokens, 2, reference, slab=slab)
    assert max(rows) == 10
    assert sum(rows) == 2 * tokens.numel()
    rows.clear()
    score(model, head, tokens, 2)
    assert max(rows) * vocabulary * 4 <= SLAB < (max(rows) + 1) * vocabulary * 4
    assert max(rows) < length


def test_an_overflowing_perplexity_is_infinite() -> None:
    scores = Scores(torch.tensor([1e5, 1e4], dtype=torch.float64), torch.tensor([2.0, 4.0], dtype=torch.float64), 10)
    assert scores.perplexity == math.inf
    assert scores.objective(0.5) == math.inf
    assert scores.perplexities.tolist() == [math.inf, math.inf]
    assert scores.mean_kl == 3
    fine = Scores(torch.tensor([10.0, 20.0], dtype=torch.float64), torch.tensor([2.0, 4.0], dtype=torch.float64), 10)
    assert fine.perplexity == pytest.approx(math.exp(1.5))
    assert fine.objective(0.5) == pytest.approx(math.exp(1.5) + 1.5)
    assert fine.perplexities.tolist() == pytest.approx([math.e, math.exp(2)])
