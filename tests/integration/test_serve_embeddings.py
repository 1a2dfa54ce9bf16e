"""``/v1/embeddings`` of a model that embeds, against PEFT's layers, and whose scripts may ask."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from served import needs_packages, save_model
from torch import Tensor

from lora_ext.serving import pooling_of

pytestmark = needs_packages
TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13"]
ORIGIN = "https://page.example"


def save_embedder(folder: Path, mode: str | None) -> Any:
    """A tiny random Llama without a head, with sentence-transformers' files for its pooling."""
    from transformers import AutoModel

    save_model(folder)
    model = AutoModel.from_pretrained(folder / "tiny").eval()
    model.save_pretrained(folder / "tiny")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    for name in ("x", "y"):
        torch.manual_seed(ord(name))
        adapted = peft.get_peft_model(
            AutoModel.from_pretrained(folder / "tiny"),
            peft.LoraConfig(**config, init_lora_weights=False),
        )
        adapted.save_pretrained(folder / "embedders" / name)
    if mode is not None:
        save_pooling(folder / "tiny", mode)
    return model


def save_pooling(folder: Path, mode: str, *more: str) -> None:
    """sentence-transformers' files."""
    kinds = ("models.Transformer", "models.Pooling", "models.Normalize", *more)
    parts = [{"type": f"sentence_transformers.{k}", "path": k[7:]} for k in kinds]
    (folder / "modules.json").write_text(json.dumps(parts))
    (folder / "Pooling").mkdir(exist_ok=True)
    modes = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    pooling = {f"pooling_mode_{each}": each.startswith(mode) for each in modes}
    config = {"word_embedding_dimension": 32, **pooling, "include_prompt": True}
    (folder / "Pooling" / "config.json").write_text(json.dumps(config))


def expected(model: Any, folder: Path, name: str | None, ids: list[int], mode: str) -> Tensor:
    if name is not None:
        model = peft.PeftModel.from_pretrained(model, folder / "embedders" / name).base_model.model
    with torch.inference_mode():
        states = model(torch.tensor([ids])).last_hidden_state[0]
    kept = {"cls": states[0], "mean": states.mean(0), "lasttoken": states[-1]}[mode]
    return kept / kept.norm()


@pytest.fixture(scope="module", params=["lasttoken", None])
def server(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What answers a list of bodies, all at once."""
    import httpx

    from lora_ext.server import Settings, make_app

    folder = tmp_path_factory.mktemp("embed")
    save_embedder(folder, request.param)
    engine = Settings(folder / "tiny", folder / "embedders", device="cpu").engine()
    transport = httpx.ASGITransport(make_app(engine, "tiny", origins=[ORIGIN]))

    loop = asyncio.new_event_loop()  # the engine's, as a server has one

    def ask(path: str, bodies: list[Any], method: str = "POST", **how: Any) -> list[Any]:
        async def all_of_them() -> list[Any]:
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                asked = (client.request(method, path, json=body, **how) for body in bodies)
                return await asyncio.gather(*asked)

        return loop.run_until_complete(all_of_them())

    with engine:
        yield SimpleNamespace(ask=ask, folder=folder, engine=engine, mode=request.param or "mean")
    loop.close()


def test_embeddings_are_pefts_whoever_is_in_the_batch(server: Any) -> None:
    from transformers import AutoModel

    names = [None, "x", "y"]
    bodies = [{"model": name or "tiny", "input": TEXTS} for name in names]
    bodies.append({"model": "x", "input": [5, 6, 7], "encoding_format": "base64", "user": "me"})
    *answers, packed = server.ask("/v1/embeddings", bodies)
    tokens = [server.engine.tokenizer(text).input_ids for text in TEXTS]
    for name, answer in zip(names, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
        for ids, one in zip(tokens, answer.json()["data"], strict=True):
            base = AutoModel.from_pretrained(server.folder / "tiny").eval()
            wanted = expected(base, server.folder, name, ids, server.mode)
            torch.testing.assert_close(torch.tensor(one["embedding"]), wanted)
    bits = base64.b64decode(packed.json()["data"][0]["embedding"])
    found = torch.frombuffer(bytearray(bits), dtype=torch.float32)
    first = torch.tensor(answers[1].json()["data"][0]["embedding"])
    torch.testing.assert_close(found, first, atol=1e-6, rtol=1e-5)
    assert server.engine.requests == 0 and server.engine.pool.stats()["pins"] == 0


def test_what_a_model_of_vectors_refuses(server: Any) -> None:
    ask = {"model": "x", "input": "w5"}
    refusals = (
        ({"model": "nobody"}, 404, "nobody"),
        ({"input": ""}, 400, "input[0]: expected 1 to 2048 tokens, found 0"),
        ({"input": ["w5", "w5 " * 3000]}, 400, "input[1]: expected 1 to 2048 tokens"),
        ({"input": [97]}, 400, "input[0]: expected tokens in [0, 97)"),
        ({"input": []}, 422, "input"),
        ({"dimensions": 7}, 400, "dimensions: expected the model's, 32, found 7"),
        ({"encoding_format": "int8"}, 422, "encoding_format"),
        ({"truncate": True}, 422, "truncate"),
    )
    good, *answers = server.ask(
        "/v1/embeddings", [ask, *({**ask, **more} for more, _, _ in refusals)]
    )
    assert good.status_code == 200
    for answer, (_, code, named) in zip(answers, refusals, strict=True):
        assert answer.status_code == code and named in answer.json()["error"]["message"]
    body = {"model": "x", "messages": [{"role": "user", "content": "w5"}]}
    (chat,) = server.ask("/v1/chat/completions", [body])
    assert chat.status_code == 400 and "which embeds" in chat.json()["error"]["message"]


def test_poolings_of_sentence_transformers_are_read_or_refused(tmp_path: Path) -> None:
    assert pooling_of(tmp_path) is None
    for mode in ("cls", "mean", "lasttoken"):
        save_pooling(tmp_path, mode)
        assert pooling_of(tmp_path) == (mode, True)
    save_pooling(tmp_path, "max")
    with pytest.raises(ValueError, match=r"Pooling: config.json: expected one of .* found max"):
        pooling_of(tmp_path)
    save_pooling(tmp_path, "mean", "models.Dense")
    with pytest.raises(ValueError, match=r"modules.json: type: expected Transformer.* Dense"):
        pooling_of(tmp_path)


def test_scripts_of_an_allowed_page_may_ask(server: Any) -> None:
    wants = {"Access-Control-Request-Method": "POST"}
    for origin, allowed in ((ORIGIN, True), ("https://other.example", False)):
        (found,) = server.ask(
            "/v1/embeddings", [None], "OPTIONS", headers={"Origin": origin, **wants}
        )
        assert found.headers.get("access-control-allow-origin") == (origin if allowed else None)


def test_an_encoder_embeds_each_text_with_its_adapter(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    from lora_ext.serving import Embedder

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertModel(BertConfig(vocab_size=97, hidden_size=32, **sizes)).eval()
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    for name in ("x", "y"):
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        adapted.save_pretrained(tmp_path / "embedders" / name)
    texts, names = [[5, 6, 7], [8], [9, 10, 11, 12]], (None, "x", "y")
    embedder = Embedder(copy.deepcopy(model), None, tmp_path / "embedders", pooling="cls")

    async def all_of_them() -> Any:
        return await asyncio.gather(*(embedder.embed(texts, name) for name in names))

    for name, (vectors, _) in zip(names, asyncio.run(all_of_them()), strict=True):
        for ids, vector in zip(texts, vectors, strict=True):
            wanted = expected(copy.deepcopy(model), tmp_path, name, ids, "cls")
            torch.testing.assert_close(vector, wanted)
