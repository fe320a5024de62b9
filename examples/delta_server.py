"""A server for one base and the fine-tunes of it, in the form of OpenAI's completions.

    pip install 'bolaco[serve]'
    python examples/delta_server.py smollm2-135m --delta maths=deltas/maths --delta sql=deltas/sql --port 8000

``model`` of a request is the name of a delta, or ``base``. Requests that wait are answered together, a row of one batch
each, whatever their deltas. An example: it streams nothing, counts no users and believes everybody.
"""

from __future__ import annotations

import argparse
import asyncio
import time
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from bolaco import DeltaModel
from bolaco.delta.serve import BASE
from bolaco.errors import BolacoError
from bolaco.models.load import load_tokenizer


class Asked(BaseModel):
    """A request."""

    model: str
    prompt: str | list[str]
    max_tokens: int = Field(16, gt=0, le=4096)
    temperature: float = Field(1.0, ge=0, le=2)
    stop: str | list[str] | None = None


@dataclass
class Waiting:
    """A prompt in the queue, and where its answer goes."""

    prompt: str
    asked: Asked
    answer: asyncio.Future[tuple[str, int, int, str]]


def answers(model: DeltaModel, tokenizer: Any, batch: list[Waiting]) -> list[tuple[str, int, int, str]]:
    """Text, tokens of the prompt and of the text, and why it ends, for each of a batch."""
    tokenizer.padding_side = "left"
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = [tokenizer(waiting.prompt).input_ids for waiting in batch]
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    temperature = batch[0].asked.temperature
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    device = model.model.device
    found = model.generate(
        tokens.to(device),
        [waiting.asked.model for waiting in batch],
        attention_mask=mask.to(device),
        max_new_tokens=max(waiting.asked.max_tokens for waiting in batch),
        pad_token_id=pad,
        **sampling,
    )
    made = []
    for waiting, row, prompt in zip(batch, found[:, longest:].tolist(), rows, strict=True):
        new = row[: waiting.asked.max_tokens]
        ended = tokenizer.eos_token_id in new
        new = new[: new.index(tokenizer.eos_token_id)] if ended else new
        text = tokenizer.decode(new, skip_special_tokens=True)
        stops = [waiting.asked.stop] if isinstance(waiting.asked.stop, str) else waiting.asked.stop or []
        places = [text.index(stop) for stop in stops if stop in text]
        text = text[: min(places)] if places else text
        made.append((text, len(prompt), len(new), "stop" if ended or places else "length"))
    return made


def server(model: DeltaModel, tokenizer: Any, batch: int = 8) -> FastAPI:
    """The application; at most ``batch`` prompts are answered at once."""
    queue: asyncio.Queue[Waiting] = asyncio.Queue()

    async def work() -> None:
        while True:
            taken = [await queue.get()]
            # What waits already goes along, if it is sampled in the same way.
            rest = []
            while not queue.empty() and len(taken) < batch:
                other = queue.get_nowait()
                (taken if other.asked.temperature == taken[0].asked.temperature else rest).append(other)
            for other in rest:
                queue.put_nowait(other)
            try:
                done = await asyncio.to_thread(answers, model, tokenizer, taken)
                for waiting, answer in zip(taken, done, strict=True):
                    if not waiting.answer.done():  # nobody waits for it any more
                        waiting.answer.set_result(answer)
            except Exception as error:  # noqa: BLE001 - the next batch is to be answered
                for waiting in taken:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    app = FastAPI(title="bolaco deltas", lifespan=lifespan)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        """Errors as OpenAI's clients read them."""
        body = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": body}, error.status_code)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in (BASE, *model.names)]}

    @app.post("/v1/completions")
    async def completions(asked: Asked) -> dict[str, Any]:
        if asked.model != BASE and asked.model not in model.names:
            known = ", ".join((BASE, *model.names))
            raise HTTPException(404, f"no model {asked.model!r}; there are {known}")
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        if not prompts or not all(prompts):
            raise HTTPException(400, "prompt is empty")
        loop = asyncio.get_running_loop()
        waiting = [Waiting(prompt, asked, loop.create_future()) for prompt in prompts]
        for one in waiting:
            queue.put_nowait(one)
        try:
            done = await asyncio.gather(*(one.answer for one in waiting))
        except BolacoError as error:
            raise HTTPException(400, str(error)) from None
        asked_tokens, made_tokens = sum(d[1] for d in done), sum(d[2] for d in done)
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
            "choices": [
                {"index": i, "text": text, "finish_reason": why, "logprobs": None}
                for i, (text, _, _, why) in enumerate(done)
            ],
            "usage": {
                "prompt_tokens": asked_tokens,
                "completion_tokens": made_tokens,
                "total_tokens": asked_tokens + made_tokens,
            },
        }

    return app


def main(words: list[str] | None = None) -> tuple[FastAPI, argparse.Namespace]:
    """The application of the words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--delta", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--unpacked", type=int, default=4, help="deltas that are kept unpacked (4)")
    parser.add_argument("--batch", type=int, default=8, help="prompts that are answered at once (8)")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(words)
    deltas = dict(word.split("=", 1) for word in args.delta)
    model = DeltaModel(args.base, deltas, unpacked=args.unpacked)
    return server(model, load_tokenizer(args.base), args.batch), args


if __name__ == "__main__":
    import uvicorn

    application, given = main()
    uvicorn.run(application, host="127.0.0.1", port=given.port)
