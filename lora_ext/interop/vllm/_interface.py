"""Checks of vLLM's internal functions that lora_ext uses, and functions that wrap them."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

_CHECKED = "_lora_ext_checks"  # mark of functions that check requests
MARK = "_lora_ext_follows"  # attribute of a function that was wrapped
# Parameters of the functions of vLLM that lora_ext calls or wraps, in vLLM's order and without
# ``self``, by part of the interface. In this order, the parts are: the punica wrapper, the manager
# of adapters, the engine's core, the core's method that receives requests, ``LLMEngine``, the keys
# of prefix cache blocks, the batch of a step, and the reader of PEFT's files.
_CALLED: dict[str, dict[str, str]] = {
    "wrapper": {
        "update_metadata": "mapping lora_index_to_id",
        "add_lora_linear": "y x lora_a_stacked lora_b_stacked scale output_slices",
        "add_lora_logits": "y x lora_a_stacked lora_b_stacked scale",
        "add_shrink": "y x lora_a_stacked scale",
        "add_expand": "y x lora_b_stacked output_slices offset_start add_inputs",
        "add_lora_embedding": "y x lora_b_stacked add_inputs",
    },
    "manager": {"activate_adapter": "lora_id"},
    "engine": {
        "preprocess_add_request": "request",
        "add_lora": "lora_request",
        "remove_lora": "lora_id",
        "pin_lora": "lora_id",
        "list_loras": "",
    },
    "requests": {"preprocess_add_request": "request"},
    "front": {"add_request": ""},
    "keys": {
        "generate_block_hash_extra_keys": "request start_token_idx end_token_idx start_mm_idx"
    },
    "batch": {"make_lora_inputs": "num_scheduled_tokens num_sampled_tokens"},
    "helper": {"_validate_features": ""},
}
# Names of the attributes that lora_ext uses, by part. The methods of the part must mention them.
_READ = {
    "wrapper": "_token_lora_indices _sampler_indices",
    "manager": "lora_index_to_id punica_wrapper_mapping",
    "requests": "vllm_config",
    "front": "vllm_config input_processor",
    "batch": "request_lora_mapping num_prompt_tokens num_computed_tokens_cpu token_ids_cpu",
    "helper": "alora_invocation_tokens",
}


def found(name: str) -> Any:
    """Import and return a member of a module by its dotted name."""
    module, _, member = name.rpartition(".")
    return getattr(importlib.import_module(module), member)


def lacking(part: str, name: str) -> str | None:
    """Return the first required member that an object of vLLM lacks; None if it has all.

    If the object cannot be imported, returns the error.

    Args:
        part: part of the interface that requires the members, a key of ``_CALLED``.
        name: dotted import path of the object.
    """
    try:
        return missing(part, found(name))
    except (ImportError, AttributeError) as error:
        return f"{name} ({error})"


def missing(part: str, owner: Any) -> str | None:
    """Return the first member of the interface that ``owner`` lacks; None if it has all.

    Args:
        part: part of the interface, a key of ``_CALLED``.
        owner: class or module of vLLM that should have the members of the part.
    """
    first = int(isinstance(owner, type))  # a method has ``self``
    for name, wanted in _CALLED[part].items():
        function = getattr(owner, name, None)
        if not callable(function):
            return f"{owner.__name__}.{name}"
        parameters = list(inspect.signature(function).parameters.values())
        # A function with *args is probably another plug-in's wrapper, so names are not compared.
        wrapped = any(each.kind is each.VAR_POSITIONAL for each in parameters)
        expected = wanted.split()
        named = [each.name for each in parameters[first : first + len(expected)]]
        if not wrapped and named != expected:
            return f"{owner.__name__}.{name}({', '.join(expected)})"
    read = _READ.get(part, "").split()
    # The code of the methods is searched, since instance attributes are not declared elsewhere.
    bases = owner.__mro__ if read else ()
    members = filter(callable, (member for base in bases for member in vars(base).values()))
    codes = [getattr(inspect.unwrap(member), "__code__", None) for member in members]
    mentioned = {name for code in codes for name in getattr(code, "co_names", ())}
    return next((f"{owner.__name__}.{each}" for each in read if each not in mentioned), None)


def wrap(owner: Any, name: str, ours: Callable[..., Any], mark: str = MARK) -> None:
    """Replace a function of vLLM by one that calls ``ours(function, *arguments)``.

    This affects the whole process. Further calls with the same ``mark`` do nothing, even if another
    plug-in has wrapped the replacement.
    """
    inner = getattr(owner, name)
    if hasattr(inner, mark):  # functools.wraps copies the mark to a wrapper around the replacement.
        return

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(inner, *args, **kwargs)

    setattr(call, mark, True)
    setattr(owner, name, call)


_checkers: dict[type, list[Callable[[Any], Callable[[Any], object]]]] = {}  # by engine class


def register_check(front: Any, checker: Callable[[Any], Callable[[Any], object]]) -> None:
    """Check the requests of every ``LLMEngine`` that this process creates from now on.

    ``LLMEngine`` registers a request and then passes it to the engine's core. If the core rejected
    the request, ``LLMEngine`` would wait for the request forever. The checks that the plug-in adds
    to the core therefore also run here, before the request is registered. vLLM's asynchronous
    engine, which a server uses, is not changed: it receives the core's errors, and a check would
    block its event loop.

    Registering the same ``checker`` again does nothing.

    Args:
        front: the class ``LLMEngine``.
        checker: function that receives the settings of an engine (``VllmConfig``) and returns a
            check. The check receives each request of the engine and raises for an invalid one.
    """
    checkers = _checkers.setdefault(front, [])
    if checker not in checkers:
        checkers.append(checker)

    def begin(inner: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        inner(self, *args, **kwargs)
        checks = [each(self.vllm_config) for each in checkers]

        def process(inner: Any, *args: Any, **kwargs: Any) -> Any:
            request = inner(*args, **kwargs)
            for check in checks:
                check(request)
            return request

        wrap(self.input_processor, "process_inputs", process, _CHECKED)

    wrap(front, "__init__", begin, _CHECKED)
