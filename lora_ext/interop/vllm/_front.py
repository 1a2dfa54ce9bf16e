"""Checks of requests in vLLM's ``LLMEngine``, before they reach the engine's core.

``LLMEngine`` registers a request and then passes it to the core. It would wait forever for a
request that the core rejects. The checks of the core therefore run here as well, before the request
is registered. The engine of a server needs no check: it receives the core's errors, and its event
loop must not block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._interface import wrap

_MARK = "_lora_ext_checks"
_checkers: dict[type, list[Callable[[Any], Callable[[Any], object]]]] = {}  # by class of engine


def register_check(front: Any, checker: Callable[[Any], Callable[[Any], object]]) -> None:
    """Check each request of vLLM's ``LLMEngine`` in the process; add a checker only once.

    Args:
        front: the class ``LLMEngine``.
        checker: function of an engine's settings that returns the check. The check is called with
            each request of the engine, and raises.
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
