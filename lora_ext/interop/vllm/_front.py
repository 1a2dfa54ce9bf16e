"""Requests are looked at in front of vLLM's engine, too.

vLLM's ``LLMEngine`` notes a request first and hands it to the engine's core then. What the core
refuses it would wait for, for ever. So what our parts refuse at the core's door they refuse here
before it waits. A server's engine has the core's word for it, and an event loop that must not wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._interface import wrap

_MARK = "_lora_ext_checks"
_checkers: dict[type, list[Callable[[Any], Callable[[Any], object]]]] = {}  # by the class in front


def register_check(front: Any, checker: Callable[[Any], Callable[[Any], object]]) -> None:
    """Look at each request of vLLM's ``LLMEngine``, for the process; a checker is added once.

    Args:
        front: the class.
        checker: makes of an engine's settings what is called with each of its requests, and raises.
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
