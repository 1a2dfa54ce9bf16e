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


def missing_of_wrapper(wrapper: type) -> str | None:
    """What a wrapper class of vLLM lacks, or None."""
    return _missing(wrapper, WRAPPER, _BUFFERS)


def missing_of_manager(manager: type) -> str | None:
    """What the manager of adapters lacks, or None."""
    return _missing(manager, MANAGER, _SLOTS)


def missing_of_engine(engine: type) -> str | None:
    """What the engine lacks, or None."""
    return _missing(engine, ENGINE, ())


def missing_of_door(engine: type) -> str | None:
    """What the engine's core lacks for constraints of requests, or None."""
    return _missing(engine, {"preprocess_add_request": ("request",)}, ("vllm_config",))


def missing_of_front(engine: type) -> str | None:
    """What the engine in front of the core lacks for them, or None."""
    return _missing(engine, {"add_request": ()}, ("vllm_config", "input_processor"))


def _missing(
    kind: type, methods: Mapping[str, Sequence[str]], attributes: Sequence[str]
) -> str | None:
    for name, wanted in methods.items():
        method = getattr(kind, name, None)
        if not callable(method):
            return f"{kind.__name__}.{name}"
        parameters = list(inspect.signature(method).parameters.values())
        if any(each.kind is each.VAR_POSITIONAL for each in parameters):  # another plug-in's
            continue
        if [each.name for each in parameters[1 : len(wanted) + 1]] != list(wanted):
            return f"{kind.__name__}.{name}({', '.join(wanted)})"
    mentioned = set(_names(kind))
    return next((f"{kind.__name__}.{each}" for each in attributes if each not in mentioned), None)


def _names(kind: type) -> Iterator[str]:
    """Attributes that the methods of a class speak of: those of an object are nowhere declared."""
    for base in kind.__mro__:
        for member in vars(base).values():
            code: Any = (
                getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            )
            yield from getattr(code, "co_names", ())
