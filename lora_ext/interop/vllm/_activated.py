"""Activated adapters (aLoRA) in vLLM.

An activated adapter (:mod:`lora_ext.rows._activation`) starts at the last occurrence of its
*invocation*, a sequence of tokens, in the prompt. The tokens before it use the base model.

vLLM applies one adapter to a whole request, and rejects activated adapters. vLLM uses a request's
adapter in two places, and this module changes both:

* The adapter of each token of a step: tokens before the start have none.
* The keys of blocks in the prefix cache. The key of a block that ends before the start does not
  contain the adapter, so the block is shared with the base model and other activated adapters. The
  key of a later block contains the adapter and the start, because another prompt with the same
  tokens up to the end of the block may have another start.

The invocation is stored in the field ``base_model_name`` of the engine's copy of the LoRA request,
which vLLM's engine and workers do not read. Worker processes therefore receive the invocation, and
it does not change if the adapter's files change.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from ._interface import MARK, missing, wrap

_TRAVELS = "lora_ext:invocation:"
_KEYS, _BATCH = "vllm.v1.core.kv_cache_utils", "vllm.v1.worker.gpu_input_batch"
_HELPER = "vllm.lora.peft_helper"
_KEY = "generate_block_hash_extra_keys"
_START = "_lora_ext_start"  # attribute of a request: cached position of the invocation

#: Reason why activated adapters are not supported; None once :func:`follow_starts` has run.
_lacking: str | None = "vLLM's engine was not prepared"


def invocation_of(lora_request: Any) -> tuple[int, ...]:
    """Return the invocation that :func:`send` has stored, or () for an ordinary adapter."""
    name = getattr(lora_request, "base_model_name", None) or ""
    if not name.startswith(_TRAVELS):
        return ()
    return tuple(json.loads(name.removeprefix(_TRAVELS)))


def check_single(lora_request: Any) -> None:
    """Raise ValueError for a mixture of adapters, or an adapter with a weight."""
    if not isinstance(getattr(lora_request, "lora_name", None), str):
        raise ValueError(
            f"lora_request: expected a LoRARequest or None, found {lora_request!r:.200}; vLLM "
            "applies one adapter with a weight of 1: save a mixture as one adapter with "
            "lora_ext.adapter.merge_adapters(..., mode='delta')"
        )


def read(lora_request: Any) -> tuple[int, ...]:
    """Return the invocation from the configuration in the adapter's folder.

    The result is () for an ordinary adapter, and also for a configuration that cannot be read,
    because vLLM reports that error.

    Raises:
        ValueError: If the request is for a mixture; if the invocation is not a list of tokens; or
            if this vLLM cannot serve activated adapters.
    """
    check_single(lora_request)
    path = os.path.join(os.path.expanduser(lora_request.lora_path), "adapter_config.json")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return ()
    found = config.get("alora_invocation_tokens") if isinstance(config, dict) else None
    if not found:
        return ()
    where = f"lora_request: {lora_request.lora_name!r}: alora_invocation_tokens: expected"
    if not isinstance(found, list) or not all(type(token) is int for token in found):
        raise ValueError(f"{where} a list of tokens, found {found!r:.200}")
    lacking = _lacking
    if lacking is None and not importlib.import_module("vllm.platforms").current_platform.is_cpu():
        lacking = "vLLM serves them only on the CPU"
    elif lacking is None and importlib.import_module("vllm.envs").VLLM_USE_V2_MODEL_RUNNER:
        lacking = "VLLM_USE_V2_MODEL_RUNNER is set"
    if lacking is not None:
        more = f"({lacking}), found {found!r:.200}; lora_ext.attach supports them"
        raise ValueError(f"{where} none, as activated adapters are not supported here {more}")
    return tuple(found)


def send(lora_request: Any, invocation: tuple[int, ...]) -> None:
    """Store an invocation in the engine's copy of a LoRA request."""
    lora_request.base_model_name = f"{_TRAVELS}{json.dumps(invocation)}"


def in_front(settings: Any) -> Callable[[Any], None]:
    """Return a check for requests that have not reached the engine's core yet.

    The invocation is not stored in such a request, so the check reads it from the adapter's folder.
    """

    def look(request: Any) -> None:
        if request.lora_request is not None:
            check(request, read(request.lora_request))

    return look


def check(request: Any, invocation: tuple[int, ...]) -> None:
    """Raise ValueError if an activated adapter cannot serve a request.

    The prompt must be given as tokens that contain the invocation.
    """
    adapter = request.lora_request
    if not invocation:
        return
    where = f"lora_request: activated adapter {adapter.lora_name!r}:"
    if request.prompt_token_ids is None or getattr(request, "resumable", False):
        raise ValueError(f"{where} expected a whole prompt of tokens, found embeddings or a part")
    if (found := getattr(request.sampling_params, "prompt_logprobs", None)) is not None:
        raise ValueError(f"{where} expected prompt_logprobs None, found {found}")
    if _last(torch.tensor(request.prompt_token_ids), invocation) is None:
        raise ValueError(
            f"{where} expected a prompt with its invocation {list(invocation)!r:.200}, found none "
            f"in {len(request.prompt_token_ids)} tokens; lora_request=None uses the base model"
        )


def _last(ids: torch.Tensor, invocation: tuple[int, ...]) -> int | None:
    from lora_ext.rows import last_start  # This import loads the kernels.

    return last_start(ids[None], invocation)[0]


def follow_starts(lacking: str | None = None) -> None:
    """Wrap the functions of vLLM that choose block keys and each token's adapter.

    The functions are wrapped in the whole process. Further calls do not wrap them again.

    Args:
        lacking: reason why this vLLM cannot serve activated adapters, or None. If there is a
            reason, nothing is wrapped, and errors for activated adapters contain the reason.
    """
    global _lacking
    _lacking = lacking
    if lacking is not None:
        return
    try:
        keys, batch = importlib.import_module(_KEYS), importlib.import_module(_BATCH).InputBatch
        helper = importlib.import_module(_HELPER).PEFTHelper
        _lacking = missing("keys", keys) or missing("batch", batch) or missing("helper", helper)
    except (ImportError, AttributeError) as error:
        _lacking = str(error)
        return
    if _lacking is None and not hasattr(batch.make_lora_inputs, MARK):
        wrap(batch, "make_lora_inputs", _rows)
        wrap(helper, "_validate_features", _features)
        inner = getattr(keys, _KEY)
        # block_pool imports the function by name, so its copy has to be replaced as well.
        importlib.import_module("vllm.v1.core.block_pool")
        for name, module in list(sys.modules.items()):
            if name.startswith("vllm.") and vars(module).get(_KEY) is inner:
                wrap(module, _KEY, _keys)


def _features(inner: Any, helper: Any) -> Any:
    """Remove the invocation, which vLLM would reject, and run vLLM's check of the configuration.

    :func:`read` has read the invocation before.
    """
    helper.alora_invocation_tokens = None
    return inner(helper)


def _keys(
    inner: Any, request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
) -> Any:
    """Return the additional prefix-cache keys of a request's block, given its adapter's start."""
    keys, place = inner(request, start_token_idx, end_token_idx, start_mm_idx)
    # The start is cached: this is called for each block, and the prompt may be long.
    if not hasattr(request, _START):
        invocation, prompt = invocation_of(request.lora_request), request.prompt_token_ids
        begins = invocation and prompt is not None
        setattr(request, _START, _last(torch.tensor(prompt), invocation) if begins else None)
    start = getattr(request, _START)
    if start is None:
        return keys, place
    kind, name, path = next(key for key in keys if key[0] == "lora")
    others = tuple(key for key in keys if key[0] != "lora")
    if end_token_idx <= start:
        return others or None, place
    return ((kind, f"{name} from {start}", path), *others), place


def _rows(inner: Any, batch: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any) -> Any:
    """Return the adapters of a step's sampled positions and tokens, and the LoRA requests."""
    samples, tokens, requests = inner(batch, num_scheduled_tokens, num_sampled_tokens)
    invocations = {each.lora_int_id: invocation_of(each) for each in requests}
    if not any(invocations.values()):
        return samples, tokens, requests
    of_samples, of_tokens = list(samples), list(tokens)
    token = sample = 0
    for row in range(batch.num_reqs):
        count, sampled = int(num_scheduled_tokens[row]), int(num_sampled_tokens[row])
        prompt, done = int(batch.num_prompt_tokens[row]), int(batch.num_computed_tokens_cpu[row])
        invocation = invocations.get(int(batch.request_lora_mapping[row]), ())
        # With done >= prompt, all tokens of this step follow the prompt and use the adapter.
        if invocation and done < prompt:
            start = _last(torch.from_numpy(batch.token_ids_cpu[row, :prompt]), invocation)
            base = min(count, max(0, (prompt if start is None else start) - done))
            of_tokens[token : token + base] = [0] * base
            if base == count:  # The sampled positions are last, so they use the base model, too.
                of_samples[sample : sample + sampled] = [0] * sampled
        token, sample = token + count, sample + sampled
    return tuple(of_samples), tuple(of_tokens), requests
