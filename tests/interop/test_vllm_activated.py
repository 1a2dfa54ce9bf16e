"""Activated adapters in vLLM: adapters of rows and keys of cache blocks, tested without vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from lora_ext.interop.vllm import _activated

INVOCATION = (7, 8)


def adapter(name: str, number: int, invocation: tuple[int, ...] = ()) -> SimpleNamespace:
    made = SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=f"/{name}", base_model_name="somebody's"
    )
    if invocation:
        _activated.send(made, invocation)
    return made


JUDGE, PIRATE = adapter("judge", 5, INVOCATION), adapter("pirate", 2)


def test_invocation_is_read_from_the_base_model_name_of_a_request():
    assert _activated.invocation_of(JUDGE) == INVOCATION
    assert _activated.invocation_of(PIRATE) == () == _activated.invocation_of(None)


# Steps are (computed tokens, scheduled tokens, samples, slot per token, slot per sample). The
# prompt has its invocation at position 4.
STEPS = [
    (0, 3, 1, [0, 0, 0], [0]),
    (2, 4, 1, [0, 0, 5, 5], [5]),
    (0, 8, 1, [0, 0, 0, 0, 5, 5, 5, 5], [5]),
    (5, 2, 2, [5, 5], [5, 5]),
    (8, 1, 1, [5], [5]),
    (0, 0, 0, [], []),
]


@pytest.mark.parametrize(("done", "count", "sampled", "tokens", "samples"), STEPS)
def test_tokens_before_the_start_use_the_base_model(done, count, sampled, tokens, samples):
    prompt = [7, 8, 1, 2, 7, 8, 3, 4]  # The last invocation [7, 8] starts at 4.
    ids = np.zeros((3, 12), dtype=np.int32)
    ids[1, :8] = prompt
    ids[1, 8:10] = INVOCATION  # generated, so not an invocation
    batch = SimpleNamespace(
        num_reqs=3,
        request_lora_mapping=np.array([2, 5, 0]),
        num_prompt_tokens=np.array([4, 8, 2]),
        num_computed_tokens_cpu=np.array([0, done, 0]),
        token_ids_cpu=ids,
    )
    scheduled, sampling = np.array([2, count, 1]), np.array([1, sampled, 1])

    def inner(batch, scheduled, sampling):
        whose = batch.request_lora_mapping
        return tuple(whose.repeat(sampling)), tuple(whose.repeat(scheduled)), [JUDGE, PIRATE]

    found = _activated._rows(inner, batch, scheduled, sampling)
    assert found[1] == (2, 2, *tokens, 0)
    assert found[0] == (2, *samples, 0)


def test_blocks_before_the_start_have_no_adapter_in_their_key():
    def inner(request, first, end, multimodal):
        named = request.lora_request
        keys = (("lora", named.lora_name, named.lora_path), ("cache_salt", "s"))
        return (keys if first == 0 else keys[:1]), multimodal + 1

    request = SimpleNamespace(lora_request=JUDGE, prompt_token_ids=[1, 2, 3, 4, 5, 7, 8, 9])

    def keys(first, end):
        return _activated._keys(inner, request, first, end, 3)

    assert keys(0, 4) == ((("cache_salt", "s"),), 4)
    assert keys(2, 5) == (None, 4), "expected an end of the prefix at position 4"
    assert keys(4, 8) == ((("lora", "judge from 5", "/judge"),), 4)
    request = SimpleNamespace(lora_request=PIRATE, prompt_token_ids=[7, 8])
    assert keys(4, 8) == ((("lora", "pirate", "/pirate"),), 4)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prompt_token_ids": [1, 2]}, r"'judge'.* its invocation \[7, 8\], found none"),
        ({"prompt_token_ids": None}, "expected a whole prompt of tokens"),
        ({"resumable": True}, "expected a whole prompt of tokens"),
        ({"sampling_params": SimpleNamespace(prompt_logprobs=0)}, "prompt_logprobs None"),
    ],
)
def test_unsupported_requests_are_refused(changes, match):
    fine = {"prompt_token_ids": [7, 8], "sampling_params": None, "lora_request": JUDGE}
    _activated.check(SimpleNamespace(**fine), INVOCATION)
    _activated.check(SimpleNamespace(**{**fine, **changes, "lora_request": PIRATE}), ())
    with pytest.raises(ValueError, match=match):
        _activated.check(SimpleNamespace(**{**fine, **changes}), INVOCATION)
