"""Checks of requests in vLLM's ``LLMEngine``, before they reach the engine's core.

``LLMEngine`` registers a request and then passes it to the core. If the core rejected the request,
``LLMEngine`` would wait for it forever. The checks that the plug-in adds to the core therefore also
run here, before the request is registered. vLLM's asynchronous engine, which a server uses, needs
no checks here: it receives the core's errors, and a check would block its event loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._interface import wrap

_MARK = "_lora_ext_checks"
_checkers: dict[type, list[Callable[[Any], Callable[[Any], object]]]] = {}  # by engine class


def register_check(front: Any, checker: Callable[[Any], Callable[[Any], object]]) -> None:
    """Check the requests of every ``LLMEngine`` that this process creates from now on.

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

        wrap(self.input_processor, "process_inputs", process, _MARK)

    wrap(front, "__init__", begin, _MARK)
