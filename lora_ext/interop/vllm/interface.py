"""What of vLLM's inside lora_ext stands on, probed: a version says less than the thing itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Parameters, in vLLM's order, of what its layers call and what it calls on a wrapper.
WRAPPER: Mapping[str, Sequence[str]] = {
    "update_metadata": ("mapping", "lora_index_to_id"),
    "add_lora_linear": ("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"),
    "add_lora_logits": ("y", "x", "lora_a_stacked", "lora_b_stacked", "scale"),
    "add_shrink": ("y", "x", "lora_a_stacked", "scale"),
    "add_expand": ("y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs"),
    "add_lora_embedding": ("y", "x", "lora_b_stacked", "add_inputs"),
}
_BUFFERS = ("_token_lora_indices", "_sampler_indices")
MANAGER: Mapping[str, Sequence[str]] = {"activate_adapter": ("lora_id",)}
_SLOTS = ("lora_index_to_id", "punica_wrapper_mapping")
ENGINE: Mapping[str, Sequence[str]] = {
    "preprocess_add_request": ("request",),
    "add_lora": ("lora_request",),
    "remove_lora": ("lora_id",),
    "pin_lora": ("lora_id",),
    "list_loras": (),
}
KEYS = ("request", "start_token_idx", "end_token_idx", "start_mm_idx")
BATCH: Mapping[str, Sequence[str]] = {
    "make_lora_inputs": ("num_scheduled_tokens", "num_sampled_tokens")
}
_ROWS = ("request_lora_mapping", "num_prompt_tokens", "num_computed_tokens_cpu", "token_ids_cpu")


def missing_of_wrapper(wrapper: type) -> str | None:
    """What a wrapper class of vLLM lacks, or None."""
    return _missing(wrapper, WRAPPER, _BUFFERS)


def missing_of_manager(manager: type) -> str | None:
    """What the manager of adapters lacks, or None."""
    return _missing(manager, MANAGER, _SLOTS)


def missing_of_keys(module: Any) -> str | None:
    """What the module that makes the keys of blocks lacks, or None."""
    return _differs(module, "generate_block_hash_extra_keys", KEYS, 0)


def missing_of_batch(batch: type) -> str | None:
    """What the batch of a step lacks, or None."""
    return _missing(batch, BATCH, _ROWS)


def missing_of_helper(helper: type) -> str | None:
    """What the reader of PEFT's configurations lacks, or None."""
    return _missing(helper, {"_validate_features": ()}, ("alora_invocation_tokens",))


def missing_of_engine(engine: type) -> str | None:
    """What the engine lacks, or None."""
    return _missing(engine, ENGINE, ())


def missing_of_door(engine: type) -> str | None:
    """What the engine's core lacks for constraints of requests, or None."""
    return _missing(engine, {"preprocess_add_request": ("request",)}, ("vllm_config",))


def missing_of_front(engine: type) -> str | None:
    """What the engine in front of the core lacks for looking at requests, or None."""
    return _missing(engine, {"add_request": ()}, ("vllm_config", "input_processor"))


def _missing(
    kind: type, methods: Mapping[str, Sequence[str]], attributes: Sequence[str]
) -> str | None:
    for name, wanted in methods.items():
        found = _differs(kind, name, wanted, 1)
        if found is not None:
            return found
    mentioned = set(_names(kind))
    return next((f"{kind.__name__}.{each}" for each in attributes if each not in mentioned), None)


def _differs(owner: Any, name: str, wanted: Sequence[str], first: int) -> str | None:
    """A function that an owner lacks, or that takes others than these from ``first`` on."""
    function = getattr(owner, name, None)
    if not callable(function):
        return f"{owner.__name__}.{name}"
    parameters = list(inspect.signature(function).parameters.values())
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):  # another plug-in's
        return None
    if [each.name for each in parameters[first : len(wanted) + first]] != list(wanted):
        return f"{owner.__name__}.{name}({', '.join(wanted)})"
    return None


def _names(kind: type) -> Iterator[str]:
    """Attributes that the methods of a class speak of: those of an object are nowhere declared."""
    for base in kind.__mro__:
        for member in vars(base).values():
            code: Any = (
                getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            )
            yield from getattr(code, "co_names", ())
