"""A request that the engine's door refuses is forgotten at the front, too.

With the engine in the caller's process vLLM's front notes a request first and hands it to the
engine then. Where that raises, the note stays, and the next ``generate`` waits for an answer that
never comes. An engine in a process of its own answers with an error instead.
"""

from __future__ import annotations

import functools
from typing import Any

_MARK = "_lora_ext_forgets"


def forget_refused(front: Any) -> None:
    """Let vLLM's ``LLMEngine`` forget what its engine refused, for the process; works once."""
    inner = front.add_request
    if hasattr(inner, _MARK):
        return

    @functools.wraps(inner)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = set(self.output_processor.request_states)
        try:
            return inner(self, *args, **kwargs)
        except Exception:
            noted = set(self.output_processor.request_states) - known
            self.abort_request(sorted(noted), internal=True)
            raise

    setattr(add_request, _MARK, True)
    front.add_request = add_request
