"""Requests are looked at in front of vLLM's engine, too.

vLLM's ``LLMEngine`` notes a request first and hands it to the engine's core then. What the core
refuses it would wait for, for ever. So what our parts refuse at the core's door they refuse here
before it waits. A server's engine has the core's word for it, and an event loop that must not wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_CHECKS = "_lora_ext_checks"


def check_in_front(front: Any, checker: Callable[[Any], Callable[[Any], object]]) -> None:
    """Look at each request of vLLM's ``LLMEngine``, for the process; a checker is added once.

    Args:
        front: the class.
        checker: makes of an engine's settings what is called with each of its requests, and raises.
    """
    inner = front.__init__
    if hasattr(inner, _CHECKS):
        checkers = getattr(inner, _CHECKS)
        if checker not in checkers:
            checkers.append(checker)
        return

    @functools.wraps(inner)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        inner(self, *args, **kwargs)
        process = self.input_processor.process_inputs
        checks = [each(self.vllm_config) for each in getattr(__init__, _CHECKS)]

        @functools.wraps(process)
        def process_inputs(*args: Any, **kwargs: Any) -> Any:
            request = process(*args, **kwargs)
            for check in checks:
                check(request)
            return request

        self.input_processor.process_inputs = process_inputs

    setattr(__init__, _CHECKS, [checker])
    front.__init__ = __init__
