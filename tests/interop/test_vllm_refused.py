"""A front of vLLM's engine, without vLLM: what its engine refuses is not waited for."""

from __future__ import annotations

import pytest

from lora_ext.interop.vllm.refused import forget_refused


def test_what_the_engine_refuses_is_forgotten_and_nothing_else():
    class Front:
        def __init__(self):
            self.output_processor, self.request_states = self, {}

        def add_request(self, request_id, refuses=False):
            for child in range(2):  # n = 2
                self.request_states[f"{request_id}-{child}-{len(self.request_states)}"] = 1
            if refuses:
                raise ValueError("no")
            return request_id

        def abort_request(self, request_ids, internal=False):
            assert internal
            for each in request_ids:
                del self.request_states[each]

    forget_refused(Front)
    forget_refused(Front)
    front = Front()
    assert front.add_request("a") == "a"
    with pytest.raises(ValueError, match="no"):
        front.add_request("a", refuses=True)
    assert list(front.request_states) == ["a-0-0", "a-1-1"]
