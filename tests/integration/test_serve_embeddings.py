"""``/v1/embeddings`` of an embedding model compared with PEFT, and cross-origin requests."""

import asyncio
import base64
import copy
import dataclasses
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

from lora_ext.pool import PoolFullError, UnknownAdapterError
from lora_ext.serving import (
    Preparation,
    QueueFullError,
    StoppedError,
    pooling_of,
    preparation_of,
)

pytestmark = needs_packages
TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13"]
ORIGIN = "https://page.example"


def save_embedder(folder: Path, mode: str | None) -> Any:
    """Save a tiny Llama without a head, adapters and pooling files, and return the model."""
    from transformers import AutoModel

    save_model(folder)
    model = AutoModel.from_pretrained(folder / "tiny").eval()
    model.save_pretrained(folder / "tiny")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    for name in ("x", "y"):
        torch.manual_seed(ord(name))
        base = AutoModel.from_pretrained(folder / "tiny")
        adapted = peft.get_peft_model(base, peft.LoraConfig(**config, init_lora_weights=False))
        adapted.save_pretrained(folder / "embedders" / name)
    if mode is not None:
        save_pooling(folder / "tiny", mode)
    return model


def save_pooling(folder: Path, mode: str, *more: str) -> None:
    kinds = ("models.Transformer", "models.Pooling", "models.Normalize", *more)
    parts = [{"type": f"sentence_transformers.{k}", "path": k[7:]} for k in kinds]
    parts[0]["path"] = ""  # The transformer is in the folder itself.
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
    """Yield a function that sends a list of bodies at the same time."""
    import httpx

    from lora_ext.server import Settings, make_app

    folder = tmp_path_factory.mktemp("embed")
    save_embedder(folder, request.param)
    engine = Settings(folder / "tiny", folder / "embedders", device="cpu").engine()
    transport = httpx.ASGITransport(make_app(engine, "tiny", origins=[ORIGIN]))

    loop = asyncio.new_event_loop()  # All requests use this loop, as in a server.

    def ask(path: str, bodies: list[Any], method: str = "POST", **how: Any) -> list[Any]:
        async def all_of_them() -> list[Any]:
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                asked = (client.request(method, path, json=body, **how) for body in bodies)
                return await asyncio.gather(*asked)

        return loop.run_until_complete(all_of_them())

    with engine:
        yield SimpleNamespace(ask=ask, folder=folder, engine=engine, mode=request.param or "mean")
    loop.close()


def test_embeddings_equal_peft_for_any_batch(server: Any) -> None:
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


def test_mixtures_equal_the_concatenated_adapters_of_peft(server: Any) -> None:
    from transformers import AutoModel

    names = [each["path"] for each in server.ask("/lora-adapters", [None], "GET")[0].json()]
    assert {*names} >= {"x", "y"} and names == sorted(names)
    mixed = [{"id": "x", "scale": 0.7}, {"id": names.index("y"), "scale": -1.5}]
    bodies: list[Any] = [{"model": "tiny", "input": TEXTS, "lora": mixed}]
    bodies += [{**bodies[0], "lora": each} for each in ([{"id": "x", "scale": 1}], [], None)]
    bodies += [{"model": "x", "input": TEXTS}, {"model": "tiny", "input": TEXTS}]
    vectors = [
        torch.tensor([one["embedding"] for one in answer.json()["data"]])
        for answer in server.ask("/v1/embeddings", bodies)
    ]
    base = AutoModel.from_pretrained(server.folder / "tiny").eval()
    model: Any = peft.PeftModel.from_pretrained(base, server.folder / "embedders" / "x", "x")
    model.load_adapter(server.folder / "embedders" / "y", "y")
    # PEFT multiplies both factors by the roots of weights, which must not be negative.
    for name, value in model.named_parameters():
        if ".lora_B.y." in name:
            value.data.neg_()
    model.add_weighted_adapter(["x", "y"], [0.7, 1.5], "both", "cat")
    model.set_adapter("both")
    for i, text in enumerate(TEXTS):
        ids = server.engine.tokenizer(text).input_ids
        wanted = expected(model.base_model.model, server.folder, None, ids, server.mode)
        torch.testing.assert_close(vectors[0][i], wanted)
    for one, other in ((1, 4), (2, 5), (3, 5)):
        torch.testing.assert_close(vectors[one], vectors[other], atol=1e-6, rtol=1e-5)
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3


def test_invalid_requests_of_an_embedding_model_are_rejected(server: Any) -> None:
    ask = {"model": "x", "input": "w5"}
    refusals = (
        ({"model": "nobody"}, 404, "nobody"),
        ({"input": ""}, 400, "input[0]: expected 1 to 2048 tokens, found 0"),
        ({"input": [[5], [5] * 3000]}, 400, "input[1]: expected 1 to 2048 tokens"),
        ({"input": [97]}, 400, "input[0]: expected token ids in [0, 97)"),
        ({"input": []}, 422, "input"),
        ({"dimensions": 7}, 400, "dimensions: expected 32, the size of the vectors, found 7"),
        ({"encoding_format": "int8"}, 422, "encoding_format"),
        ({"truncate": True}, 422, "truncate"),
        ({"lora": []}, 400, "lora: expected null unless model is the base model"),
        ({"model": "tiny", "lora": [{"id": "z", "scale": 0}]}, 404, "lora.0.id: expected a name"),
        ({"model": "tiny", "lora": [{"id": "x", "scale": 1e39}]}, 400, "lora: 'x': expected a"),
        ({"model": "tiny", "lora": [{"id": "x"}]}, 422, "lora.0.scale: Field required"),
    )
    good, *answers = server.ask(
        "/v1/embeddings", [ask, *({**ask, **more} for more, _, _ in refusals)]
    )
    assert good.status_code == 200
    for answer, (_, code, named) in zip(answers, refusals, strict=True):
        assert answer.status_code == code and named in answer.json()["error"]["message"]
    body = {"model": "x", "messages": [{"role": "user", "content": "w5"}]}
    (chat,) = server.ask("/v1/chat/completions", [body])
    assert chat.status_code == 400 and "found embedding model" in chat.json()["error"]["message"]


def test_files_of_sentence_transformers_are_used_or_rejected(tmp_path: Path) -> None:
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
    save_pooling(tmp_path, "mean")
    assert preparation_of(tmp_path / "nowhere") is None
    assert preparation_of(tmp_path) == Preparation()
    listed = {"prompts": {"query": "to find: "}, "default_prompt_name": None}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(listed))
    assert preparation_of(tmp_path) == Preparation()
    (tmp_path / "sentence_roberta_config.json").write_text(json.dumps({"max_seq_length": 128}))
    assert preparation_of(tmp_path) == Preparation(max_length=128)
    listed["default_prompt_name"] = "query"
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(listed))
    assert preparation_of(tmp_path) == Preparation("to find: ", 128)
    pooling = tmp_path / "Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "include_prompt": False}))
    with pytest.raises(ValueError, match=r"Pooling: include_prompt: expected true, .* 'query'"):
        preparation_of(tmp_path)
    listed["default_prompt_name"] = "document"
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"default_prompt_name: expected one of .*'document'"):
        preparation_of(tmp_path)


def test_scripts_of_an_allowed_page_are_accepted(server: Any) -> None:
    wants = {"Access-Control-Request-Method": "POST"}
    for origin, allowed in ((ORIGIN, True), ("https://other.example", False)):
        headers = {"Origin": origin, **wants}
        (found,) = server.ask("/v1/embeddings", [None], "OPTIONS", headers=headers)
        assert found.headers.get("access-control-allow-origin") == (origin if allowed else None)


def test_texts_are_tokenized_like_in_sentence_transformers(tmp_path: Path) -> None:
    from lora_ext.server import Settings

    model = save_embedder(tmp_path, "mean")
    limits = json.dumps({"max_seq_length": 4, "do_lower_case": True})
    (tmp_path / "tiny" / "sentence_bert_config.json").write_text(limits)
    prompts = {"prompts": {"query": "w9 w10 ", "other": "w11 "}, "default_prompt_name": "query"}
    (tmp_path / "tiny" / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    texts: list[Any] = [" W5\n", "w5 w6 w7", "w8 w8 w8 w8 w8 w8", [5, 6]]
    read = [[9, 10, 5], [9, 10, 5, 6], [9, 10, 8, 8], [5, 6]]
    with Settings(tmp_path / "tiny", tmp_path / "embedders", device="cpu").engine() as engine:
        vectors, tokens = asyncio.run(engine.embed(texts))  # pyright: ignore
        with pytest.raises(ValueError, match=r"input\[0\]: expected 1 to 4 tokens, found 5"):
            asyncio.run(engine.embed([[5, 6, 7, 8, 9]]))  # pyright: ignore
    assert tokens == sum(map(len, read))
    for ids, vector in zip(read, vectors, strict=True):
        torch.testing.assert_close(vector, expected(model, tmp_path, None, ids, "mean"))


def test_float8_adapters_embed_close_to_the_adapters(tmp_path: Path) -> None:
    from lora_ext.server import Settings

    model, own = save_embedder(tmp_path, "mean"), {"lora_dtype": "float8_e4m3fn", "device": "cpu"}
    with Settings(tmp_path / "tiny", tmp_path / "embedders", **own).engine() as engine:
        base, vector = (asyncio.run(engine.embed([[5, 6]], n))[0][0] for n in (None, "x"))
    exact = expected(model, tmp_path, "x", [5, 6], "mean")
    assert 0 < (vector - exact).norm() < (base - exact).norm() / 10


@pytest.mark.parametrize(
    ("max_length", "context", "kept"),
    [(None, 6, 6), (10, 6, 6), (9000, 4096, 2048), (10, 4096, 10)],
)
def test_long_texts_are_truncated_at_the_smallest_limit(
    max_length: int | None, context: int, kept: int, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    from lora_ext.serving import Embedder

    model = save_embedder(tmp_path, None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    how = {"context": context, "preparation": Preparation(max_length=max_length)}
    embedder = Embedder(copy.deepcopy(model), tokenizer, tmp_path / "embedders", **how)
    vectors, tokens = asyncio.run(embedder.embed(["w5 w6 " * 2000]))
    assert tokens == kept
    wanted = expected(model, tmp_path, None, ([5, 6] * kept)[:kept], "mean")
    torch.testing.assert_close(vectors[0], wanted)


def test_adapter_that_overflows_fails_only_its_request(server: Any) -> None:
    from lora_ext import adapter

    value = adapter.LoraAdapter.load(server.folder / "embedders" / "x")
    huge = {  # updates are infinite for any input
        name: factors._replace(a=factors.a * 1e6, b=factors.b * 1e38)
        for name, factors in value.modules.items()
    }
    dataclasses.replace(value, modules=huge).save(server.folder / "embedders" / "huge")
    bodies = [{"model": name, "input": TEXTS} for name in ("x", "huge", "y")]
    one, failed, two = server.ask("/v1/embeddings", bodies)
    assert one.status_code == two.status_code == 200
    words = failed.json()["error"]["message"]
    assert failed.status_code == 400 and "expected finite vectors" in words and "'huge'" in words
    assert all(torch.tensor(e["embedding"]).isfinite().all() for e in one.json()["data"])


def test_failing_texts_and_requests_beyond_the_limit_do_not_affect_others(tmp_path: Path) -> None:
    embedder = save_bert(tmp_path)[1]

    def refuse(_: Any, __: Any, given: dict[str, Any]) -> None:
        if (given["input_ids"] == 13).any():
            raise RuntimeError("token 13")

    embedder.model.register_forward_pre_hook(refuse, with_kwargs=True)
    texts = [[[5, 6]], [[7, 13], [8]], [[9]], [[10]], [[13]]]
    found = asyncio.run(all_at_once(embedder, [(text, None) for text in texts]))
    failed = [isinstance(each, RuntimeError) for each in found]
    assert failed == [False, True, False, False, True]
    embedder = save_bert(tmp_path, max_requests=4)[1]
    found = asyncio.run(all_at_once(embedder, [([[5, 6]], None)] * 50))
    assert [isinstance(each, QueueFullError) for each in found] == [False] * 4 + [True] * 46
    assert embedder.requests == 0
    with pytest.raises(ValueError, match="embed: input: expected at least one text, found none"):
        asyncio.run(asyncio.wait_for(embedder.embed([]), 20))
    assert not isinstance(asyncio.run(all_at_once(embedder, [([[5]], None)]))[0], Exception)


def bounded(folder: Path, **settings: Any) -> tuple[Any, Any, list[list[Any]]]:
    """Return a model, an embedder with room for one adapter, and a list that receives the names of
    each forward."""
    embedder, batches = save_bert(folder)[1], []
    embedder.folder.load("x")
    embedder.pool.trim()
    room = {"max_loaded_bytes": embedder.pool.reserved_bytes, "host_cache_bytes": 0}
    model, embedder = save_bert(folder, **{**room, **settings})
    forward = embedder._forward

    def note(batch: list[Any]) -> Any:
        batches.append([each.name for each in batch])
        return forward(batch)

    work = embedder._work

    async def work_after_tokenization() -> None:
        while embedder._preparing:  # so that the first batch can contain any of the requests
            await asyncio.sleep(0.001)
        await work()

    embedder._forward, embedder._work = note, work_after_tokenization
    return model, embedder, batches


@pytest.mark.parametrize(
    ("max_wait_s", "expected_batches"),
    [
        (1e9, [["x", None, "x"], ["y", "y"]]),
        (0.0, [["x"], ["y", None], ["x"], ["y"]]),
    ],
)
def test_requests_without_room_wait_at_most_for_the_limit(
    max_wait_s: float, expected_batches: list[list[Any]], tmp_path: Path
) -> None:
    model, embedder, batches = bounded(tmp_path, max_wait_s=max_wait_s)
    names = ["x", "y", None, "x", "y"]
    found = asyncio.run(all_at_once(embedder, [([[5, 6, 7]], name) for name in names]))
    for name, vectors in zip(names, found, strict=True):
        wanted = expected(copy.deepcopy(model), tmp_path, name, [5, 6, 7], "cls")
        torch.testing.assert_close(vectors[0], wanted)
    assert batches == expected_batches
    assert embedder.requests == 0 and embedder.pool.stats()["pins"] == 0


@pytest.mark.parametrize("host_cache_bytes", [0, 1 << 20])
def test_mixture_above_the_limit_is_refused_for_good(host_cache_bytes: int, tmp_path: Path) -> None:
    _, embedder, batches = bounded(tmp_path, host_cache_bytes=host_cache_bytes)
    both = {"x": 0.5, "y": 0.5}
    mixed, other = asyncio.run(all_at_once(embedder, [([[5]], both), ([[5]], "y")]))
    assert isinstance(mixed, PoolFullError) and mixed.final
    assert not isinstance(other, BaseException) and batches == [["y"]]


def test_request_whose_adapter_is_unloaded_meanwhile_reads_it_again(tmp_path: Path) -> None:
    model, embedder, batches = bounded(tmp_path)
    forward, unloads = embedder._forward, [True, True, False]

    def unload(batch: list[Any]) -> Any:
        if unloads.pop(0):
            embedder.folder.unload("x")
        return forward(batch)

    embedder._forward = unload
    (found,) = asyncio.run(all_at_once(embedder, [([[5, 6]], "x")]))
    wanted = expected(copy.deepcopy(model), tmp_path, "x", [5, 6], "cls")
    torch.testing.assert_close(found[0], wanted)
    assert batches == [["x"]] * 3
    unloads[:] = [True] * 99
    (found,) = asyncio.run(all_at_once(embedder, [([[5, 6]], "x")]))
    assert isinstance(found, UnknownAdapterError)
    assert embedder.requests == 0 and embedder.pool.stats()["pins"] == 0


def test_positions_of_roberta_start_after_the_padding_token(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    from lora_ext.serving import Embedder

    config = RobertaConfig(vocab_size=97, max_position_embeddings=18, pad_token_id=1, **SMALL)
    embedder = Embedder(RobertaModel(config).eval(), None, tmp_path)
    fits, long = list(range(5, 21)), list(range(5, 22))
    found = asyncio.run(all_at_once(embedder, [([fits, [5]], None), ([long], None)]))
    assert embedder.context == 16 and found[0][0].isfinite().all()
    assert "input[0]: expected 1 to 16 tokens, found 17" in str(found[1])


def test_forward_has_at_most_max_batch_tokens(tmp_path: Path) -> None:
    model, embedder = save_bert(tmp_path, max_batch_tokens=64)
    shapes: list[tuple[int, int]] = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        shapes.append(tuple(given["input_ids"].shape))

    embedder.model.register_forward_pre_hook(note, with_kwargs=True)
    texts = [[5 + i % 90, 6] for i in range(40)]
    texts[7] = list(range(5, 55))  # one long text among short ones
    texts[30] = [8] * 80  # exceeds max_batch_tokens, so it is computed alone
    vectors, _ = asyncio.run(embedder.embed(texts, "x"))
    assert max(rows * width for rows, width in shapes if rows > 1) <= 64
    assert len(shapes) <= 4 and (1, 80) in shapes
    for ids, vector in zip(texts, vectors, strict=True):
        wanted = expected(copy.deepcopy(model), tmp_path, "x", ids, "cls")
        torch.testing.assert_close(vector, wanted)
    shapes.clear()
    embedder.model.register_forward_hook(lambda *_: embedder.__exit__())
    (found,) = asyncio.run(all_at_once(embedder, [(texts, None)]))
    assert isinstance(found, StoppedError) and len(shapes) == 1, f"found {found!r}"


SMALL: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 48}


def save_bert(folder: Path, **settings: Any) -> tuple[Any, Any]:
    from transformers import BertConfig, BertModel

    from lora_ext.serving import Embedder

    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=97, **SMALL)).eval()
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    for name in ("x", "y"):
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        adapted.save_pretrained(str(folder / "embedders" / name))
    own = copy.deepcopy(model)
    return model, Embedder(own, None, folder / "embedders", pooling="cls", **settings)


async def all_at_once(embedder: Any, asked: list[tuple[Any, Any]]) -> list[Any]:
    """Send all requests at once; return the vectors or the error of each."""
    calls = (embedder.embed(texts, name) for texts, name in asked)
    found = await asyncio.gather(*calls, return_exceptions=True)
    return [each if isinstance(each, BaseException) else each[0] for each in found]


def test_encoder_embeds_each_text_with_its_adapter(tmp_path: Path) -> None:
    model, embedder = save_bert(tmp_path)
    texts, names = [[5, 6, 7], [8], [9, 10, 11, 12]], (None, "x", "y")
    found = asyncio.run(all_at_once(embedder, [(texts, name) for name in names]))
    for name, vectors in zip(names, found, strict=True):
        for ids, vector in zip(texts, vectors, strict=True):
            wanted = expected(copy.deepcopy(model), tmp_path, name, ids, "cls")
            torch.testing.assert_close(vector, wanted)
