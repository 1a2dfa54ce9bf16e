"""Requests of a manager as streams, each with separate sampling settings."""

import asyncio
import time
from collections import Counter
from typing import Any

import pytest
import torch
from test_continuous_batching import alone, attached, batching, prompts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_ext.serving._continuous import adapter_requests
from lora_ext.serving._sampling import Sampling
from lora_ext.serving._streams import RequestStream, TextStream

NAMES = ["a0", None, "a1", "a0"]


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def drawn(sampling: Sampling, scores: torch.Tensor, count: int = 300) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    return Counter(int(sampling.draw(scores, generator)) for _ in range(count))


def test_tokens_follow_temperature_and_top_p() -> None:
    scores = logits(0.5, 0.3, 0.2)
    assert drawn(Sampling(0.0), torch.tensor([1.0, 2.0, 2.0])) == {1: 300}  # first of equal logits
    assert drawn(Sampling(1e-40), scores) == {0: 300}
    for temperature in (1.0, 2.0):
        found = drawn(Sampling(temperature), scores, 4000)
        for token, p in enumerate((scores / temperature).softmax(-1).tolist()):
            # Five standard deviations of a binomial; one seed in 3 million exceeds them.
            assert abs(found[token] - 4000 * p) < 5 * (4000 * p * (1 - p)) ** 0.5
    scores = logits(0.2, 0.5, 0.3)
    assert set(drawn(Sampling(1.0, top_p=0.4), scores)) == {1}
    assert set(drawn(Sampling(1.0, top_p=0.6), scores)) == {1, 2}
    assert set(drawn(Sampling(1.0, top_p=0.9), scores)) == {0, 1, 2}


def test_invalid_sampling_settings_raise() -> None:
    for fields, message in (
        ({"temperature": -1.0}, "temperature: expected a number from 0, found -1.0"),
        ({"temperature": float("nan")}, "temperature: expected a number from 0, found nan"),
        ({"temperature": "hot"}, "temperature: expected a number from 0, found 'hot'"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], found 0.0"),
        ({"seed": 1.5}, "seed: expected None or a 64-bit integer, found 1.5"),
        ({"seed": 1 << 70}, "seed: expected None or a 64-bit integer"),
    ):
        with pytest.raises(ValueError, match=f"Sampling: {message}"):
            Sampling(**fields)


@pytest.mark.slow
def test_each_request_uses_its_sampling_settings() -> None:
    model, pool = attached(slots=4)
    given = prompts(4)
    seeded = Sampling(1.5, top_p=0.9, seed=7)
    how = batching()
    how["generation_config"].do_sample = True
    with model.continuous_batching_context_manager(**how) as manager:

        def run(*requests: tuple[int, Sampling]) -> list[list[int]]:
            for place, (row, sampling) in enumerate(requests):
                manager.add_request(
                    given[row], str(place), adapter_name=NAMES[row], sampling=sampling
                )
            found = [manager.get_result(timeout=30) for _ in requests]
            assert [result.error for result in found] == [None] * len(found)
            return [r.generated_tokens for r in sorted(found, key=lambda r: r.request_id)]

        greedy = Sampling(0.0)
        mixed = run((0, greedy), (1, seeded), (2, greedy), (3, seeded), (3, Sampling(1.5, seed=8)))
        assert mixed[0] == alone(model, given[0], "a0")
        assert mixed[2] == alone(model, given[2], "a1")
        assert run((3, seeded)) == run((3, seeded)) == [mixed[3]] != [mixed[4]]
    how = batching(return_logprobs=True)
    with model.continuous_batching_context_manager(**how) as manager:
        with pytest.raises(NotImplementedError, match="sampling: expected None with r"):
            manager.add_request([5], adapter_name="a0", sampling=seeded)
    assert pool.stats()["pins"] == 0


@pytest.mark.slow
def test_request_cancelled_before_the_loop_receives_it_is_cancelled() -> None:
    model, pool = attached(slots=2)
    with model.continuous_batching_context_manager(**batching()) as manager:
        put = manager.input_queue.put

        def late(state: Any, **how: Any) -> None:
            manager.cancel_request("mine")
            # The loop processes the cancellation during this pause, before the request exists.
            time.sleep(0.3)
            put(state, **how)

        manager.input_queue.put = late
        manager.add_request([5, 6], "mine", adapter_name="a0", max_new_tokens=100_000)
        del manager.input_queue.put
        manager.add_request([5, 6], "other", adapter_name="a1")
        assert manager.get_result(timeout=30).request_id == "other"
        assert adapter_requests(manager).unfinished == 0
    assert pool.stats()["pins"] == 0


@pytest.mark.slow
def test_streams_give_the_tokens_of_the_single_request() -> None:
    model, pool = attached(slots=4)
    given = prompts(4)
    expected = [alone(model, *row) for row in zip(given, NAMES, strict=True)]

    async def collect(stream: RequestStream) -> list[int]:
        return [token async for tokens in stream for token in tokens]

    async def run(manager: Any) -> list[list[int]]:
        streams = [
            RequestStream(manager, ids, adapter_name=name)
            for ids, name in zip(given, NAMES, strict=True)
        ]
        assert adapter_requests(manager).unfinished == 4
        return await asyncio.gather(*map(collect, streams))

    with model.continuous_batching_context_manager(**batching()) as manager:
        assert asyncio.run(run(manager)) == expected
        assert manager.output_router.result_handlers == {}
    assert pool.stats()["pins"] == 0


def test_cancelled_or_failed_stream_releases_everything() -> None:
    model, pool = attached(slots=4)
    how = batching()

    async def run(manager: Any) -> None:
        stream = RequestStream(manager, [5, 6, 7], adapter_name="a0", max_new_tokens=100_000)
        await anext(stream)
        stream.cancel()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        with pytest.raises(KeyError, match="'a9' is not loaded"):
            RequestStream(manager, [5, 6, 7], adapter_name="a9")
        while adapter_requests(manager).unfinished:
            await asyncio.sleep(0.01)
        assert manager.output_router.result_handlers == {}
        broken = RequestStream(manager, [5, 6, 7], adapter_name="a1", max_new_tokens=100_000)
        await anext(broken)
        manager.batch_processor.update_batch = None  # This ends the manager's thread.
        with pytest.raises(RuntimeError, match="RequestStream: the request failed: "):
            async for _ in broken:
                pass
        with pytest.raises(RuntimeError, match="RequestStream: expected a running manager"):
            RequestStream(manager, [5, 6, 7])
        assert manager.output_router.result_handlers == {}

    with model.continuous_batching_context_manager(**how) as manager:
        asyncio.run(run(manager))
    assert pool.stats()["pins"] == 0


@pytest.mark.slow
def test_streams_of_a_stopped_manager_end_with_an_error() -> None:
    model, pool = attached(slots=4)
    how = batching(max_batch_tokens=16, num_blocks=8)

    async def run(manager: Any) -> None:
        streams = [
            RequestStream(manager, [5, 6, 7], adapter_name=name, max_new_tokens=100_000)
            for name in ("a0", "a1", None)
        ]
        await anext(streams[0])
        streams += [RequestStream(manager, [5, 6], adapter_name="a0", max_new_tokens=100_000)]
        await asyncio.to_thread(manager.stop, hard_stop=True)
        for stream in streams:
            with pytest.raises(RuntimeError, match=r"RequestStream: the (manager|request)"):
                async for _ in stream:
                    pass
            assert stream.finished
        assert manager.output_router.result_handlers == {}
        assert pool.stats()["pins"] == adapter_requests(manager).unfinished == 0
        with pytest.raises(RuntimeError, match="expected a running manager"):
            stream = RequestStream(manager, [5, 6, 7], adapter_name="a0")
            await anext(stream)

    with model.continuous_batching_context_manager(**how) as manager:
        asyncio.run(run(manager))
    assert pool.stats()["pins"] == 0


@pytest.mark.slow
def test_texts_of_a_stream_end_with_a_reason() -> None:
    model, pool = attached(slots=2)
    tokenizer = byte_tokenizer(97)
    prompt = prompts(1)[0]
    tokens = alone(model, prompt, "a0")
    text = tokenizer.decode(tokens)

    async def collect(manager: Any, *stop: str, **settings: Any) -> tuple[str, str | None]:
        stream = RequestStream(manager, prompt, adapter_name="a0", **settings)
        assert stream.finish_reason is None
        return "".join([t async for t in stream.texts(tokenizer, stop)]), stream.finish_reason

    with model.continuous_batching_context_manager(**batching()) as manager:
        assert asyncio.run(collect(manager)) == (text, "length")
        assert asyncio.run(collect(manager, eos_token_id=tokens[-1]))[1] == "stop"
        cut = asyncio.run(collect(manager, text[2], max_new_tokens=100))
        assert cut == (text[: text.index(text[2])], "stop")
        while adapter_requests(manager).unfinished:
            time.sleep(0.01)
    assert pool.stats()["pins"] == 0


def byte_tokenizer(size: int = 256) -> Any:
    names = sorted(pre_tokenizers.ByteLevel.alphabet())[:size]
    inner = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_texts_are_whole_characters_and_words_and_end_before_a_stop() -> None:
    tokenizer = byte_tokenizer()

    def pieces(text: str, *stop: str, step: int = 1) -> tuple[list[str], bool]:
        stream = TextStream(tokenizer, stop)
        ids = tokenizer(text).input_ids
        found = [stream.feed(ids[i : i + step]) for i in range(0, len(ids), step)]
        return [*found, stream.flush()], stream.stopped

    assert pieces("aé!") == (["a", "", "é", "!", ""], False)
    assert pieces("aé!", step=3) == (["aé", "!", ""], False)
    assert pieces("one two", "e t") == (["o", "n", "", "", "", "", "", ""], True)
    assert pieces("one tap", "e to") == (["o", "n", "", "", "", "e ta", "p", ""], False)
    assert pieces("abab", "bb", "ba") == (["a", "", "", "", ""], True)
    assert pieces("xaab", "aab") == (["x", "", "", "", ""], True)
    assert pieces("xaa", "aab") == (["x", "", "", "aa"], False)
    half = TextStream(tokenizer)
    assert half.feed(tokenizer("é").input_ids[:1]) == ""
    assert half.flush() == "\N{REPLACEMENT CHARACTER}"
    inner = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1, "a": 2, "b": 3}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    stream = TextStream(tokenizer)
    assert [stream.feed([token]) for token in (2, 0, 0, 3, 0, 2)] == ["a", "", "", " b", "", " a"]


ALPHABETS = [
    "naïve 日本語",
    "한국어 ไทย",
    "👍🏽 ok",
    "👩‍👩‍👧‍👦!",
    "a\N{REPLACEMENT CHARACTER}b",
    "🇩🇪🇫🇷",
    "e\u0301",
]


def fallback_tokenizer() -> Any:
    """Return a tokenizer of known words, and bytes for all others, as in Llama."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "日", "o", "k"]
    inner = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("text", ALPHABETS)
@pytest.mark.parametrize("step", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("make", [byte_tokenizer, fallback_tokenizer])
def test_characters_of_several_bytes_are_not_split(make: Any, text: str, step: int) -> None:
    tokenizer = make()
    ids = tokenizer(text).input_ids
    assert len(ids) >= len(text) and tokenizer.decode(ids) == text
    stream = TextStream(tokenizer)
    pieces = [stream.feed(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert "".join([*pieces, stream.flush()]) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces if piece not in text)
    for stop in {character for character in text if character != " "}:
        stream = TextStream(tokenizer, stop)
        pieces = [stream.feed(ids[i : i + step]) for i in range(0, len(ids), step)]
        assert "".join([*pieces, stream.flush()]) == text[: text.index(stop)] and stream.stopped
