"""lm-evaluation-harness with a loaded model: our progress, no bars, nothing of the caller's changed.

The only module that imports lm_eval, and only when tasks are evaluated; it is an optional dependency.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel

from bolaco.errors import DataError, NonFiniteError, UnsupportedModelError
from bolaco.models.quiet import quiet
from bolaco.progress import Reporter, Tick

_SEEDS = {"python": 0, "numpy": 1234, "torch": 1234}  # lm-evaluation-harness's defaults
FEWSHOT_SEED = 1234


class _Ticker(CacheHook):  # type: ignore[misc]  # the harness is not typed
    """The harness reports every finished request to its cache; here it moves the progress instead."""

    def __init__(self, tick: Tick) -> None:
        super().__init__(None)
        self.tick = tick

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.tick(1)


class HarnessModel(HFLM):  # type: ignore[misc]
    """A loaded model for the harness.

    Args:
        model: causal model, in evaluation mode; used where it is, in its own type.
        tokenizer: copied, because the harness may add a padding token.
        batch: sequences at once.
        reporter: where progress goes.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch: int, reporter: Reporter) -> None:
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UnsupportedModelError("tasks need a tokenizer with a BOS or an EOS token; this one has neither")
        # In bfloat16 the log-probabilities of likely answers would often be equal.
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            batch_size=batch,
            softmax_dtype="float32",
        )
        self.reporter = reporter
        self.cut = 0  # requests longer than the model's positions

    @contextmanager
    def _stage(self, title: str, requests: list[Any]) -> Iterator[None]:
        with self.reporter.stage(title, len(requests)) as tick:
            self.set_cache_hook(_Ticker(tick))
            yield

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations, and whether each is the greedy one."""
        with self._stage("score the answers", requests):
            result: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
            return result

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts."""
        with self._stage("score the texts", requests):
            result: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
            return result

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of prompts."""
        with self._stage("generate the answers", requests):
            result: list[str] = super().generate_until(requests, disable_tqdm)
            return result

    def _loglikelihood_tokens(self, requests: list[Any], **words: Any) -> list[tuple[float, bool]]:
        for texts, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                text = repr((texts or ("",))[-1][:60])
                raise DataError(
                    f"the answer {text} has {len(continuation)} tokens after a context of {len(context)}: at least one "
                    f"of each is needed, and the model has {self.max_length} positions"
                )
            self.cut += len(context) + len(continuation) > self.max_length + 1
        result: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **words)
        # The likeliest of answers that are not numbers would be the first one: an accuracy that looks like one.
        if any(math.isnan(value) for value, _ in result):
            raise NonFiniteError(
                "the model's log-probabilities are NaN; try --dtype float32, or the weights are damaged"
            )
        return result


@contextmanager
def undisturbed() -> Iterator[None]:
    """The harness's seeds, no bars and no warnings while this lasts; everything as it was afterwards."""
    logger = logging.getLogger("lm_eval")
    level, start = logger.level, tqdm.__init__

    def hidden(self: Any, *args: Any, **words: Any) -> None:
        start(self, *args, **words | {"disable": True})

    states = random.getstate(), np.random.get_state()
    logger.setLevel(logging.ERROR)
    # The harness asks for its bars explicitly, which overrules TQDM_DISABLE.
    tqdm.__init__ = hidden
    try:
        with quiet(), torch.random.fork_rng():
            random.seed(_SEEDS["python"])
            np.random.seed(_SEEDS["numpy"])
            torch.manual_seed(_SEEDS["torch"])
            yield
    finally:
        tqdm.__init__ = start
        logger.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
