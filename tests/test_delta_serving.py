"""Deltas measured by `bolaco bench`, and behind the server of the examples."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from bolaco.models.load import load_model, load_tokenizer
from tests.command import bolaco, ok
from tests.deltas import delta_words, fine_tuned, save_pair
from tests.models import save_tiny, tiny_llama

SERVER = Path(__file__).parents[1] / "examples" / "delta_server.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two deltas; leave it as it is."""
    folder = save_pair(tmp_path_factory.mktemp("served"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, name in enumerate(("small", "smaller"), 1):
            save_tiny(folder / "tuned", fine_tuned(tiny_llama(), seed, size=0.3))
            ok(*delta_words(name, method="lowrank", ratio="1/4" if name == "small" else "1/8"))
    return folder


def test_bench(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = ["bench", "small", "smaller", "--deltas", "--counts", "1,3", "--prompt", "8", "--new-tokens", "2"]
    one, three = json.loads(ok(*words, "--json").out)
    base = 4 * sum(p.numel() for p in load_model("base").parameters())
    sizes = [json.loads((place / name / "bolaco.json").read_text())["bits"] for name in ("small", "smaller")]
    packed = [sum(bits[part] for part in ("matrices", "others", "embeddings")) // 8 for bits in sizes]
    assert one["bytes_packed"] == base + packed[0]
    assert three["bytes_packed"] == base + 2 * packed[0] + packed[1]
    assert three["bytes"] > three["bytes_packed"]
    assert [row["bytes_models"] for row in (one, three)] == [base, 3 * base]
    assert min(row[name] for row in (one, three) for name in ("prefill", "decode", "decode_models")) > 0
    shown = ok(*words, "--unpacked", "0").out
    assert "whole models" in shown
    assert json.loads(ok(*words, "--unpacked", "0", "--json").out)[1]["bytes"] == three["bytes_packed"]
    assert "expected numbers from 1 up" in bolaco(*words[:3], "--deltas", "--counts", "0").err
    assert "not a folder that `bolaco delta` wrote" in bolaco("bench", "base", "--deltas").err


def application(*words: str) -> Any:
    spec = importlib.util.spec_from_file_location("delta_server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    import sys

    sys.modules["delta_server"] = module
    spec.loader.exec_module(module)
    return module.main(list(words))[0]


def test_the_server_answers_the_openai_client(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="pip install 'bolaco[serve]'")
    openai = pytest.importorskip("openai", reason="the client of the server's test")
    http = pytest.importorskip("httpx2", reason="the client of the server's test")
    monkeypatch.chdir(place)
    app = application("base", "--delta", "first=small", "--delta", "second=smaller")
    prompts = {"first": "the small river", "second": "a farmer sees the old house", "base": "the small river"}

    async def ask() -> dict[str, Any]:
        transport = http.ASGITransport(app=app)
        async with app.router.lifespan_context(app), http.AsyncClient(transport=transport) as web:
            client = openai.AsyncOpenAI(base_url="http://here/v1", api_key="none", http_client=web, max_retries=0)
            listed = [model.id async for model in client.models.list()]
            assert listed == ["base", "first", "second"]
            # All at once: they become rows of one batch.
            tasks = [
                client.completions.create(model=name, prompt=prompt, max_tokens=6, temperature=0)
                for name, prompt in prompts.items()
            ]
            found = dict(zip(prompts, await asyncio.gather(*tasks), strict=True))
            with pytest.raises(openai.NotFoundError, match="there are base, first, second"):
                await client.completions.create(model="third", prompt="the", max_tokens=2)
            with pytest.raises(openai.BadRequestError, match="prompt is empty"):
                await client.completions.create(model="base", prompt="", max_tokens=2)
            several = await client.completions.create(model="first", prompt=["the", "a"], max_tokens=3, temperature=0)
            assert [choice.index for choice in several.choices] == [0, 1]
            return found

    found = asyncio.run(ask())
    tokenizer = load_tokenizer("base")
    for name, prompt in prompts.items():
        model = load_model({"first": "small", "second": "smaller"}.get(name, name))
        given = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(given, max_new_tokens=6, do_sample=False, pad_token_id=3)[0, given.shape[1] :]
        assert found[name].choices[0].text == tokenizer.decode(made, skip_special_tokens=True)
        assert found[name].usage.prompt_tokens == given.shape[1]
        assert found[name].model == name
    assert found["first"].choices[0].text != found["base"].choices[0].text
