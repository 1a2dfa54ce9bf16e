"""Methods that a compiled graph calls as ops.

The methods of a punica wrapper (vLLM's object that adds the updates of LoRA layers) read the
adapters of the current step's rows. If torch.compile traced into such a method, the graph would
contain the rows of the step that was traced. A graph therefore calls the method as an op. The op
looks up the wrapper by a number and reads the rows when the graph runs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from lora_ext._torch import compiles, traced

_wrappers: WeakValueDictionary[int, Any] = WeakValueDictionary()
_handles = itertools.count()


def known(wrapper: Any) -> int:
    """Register a wrapper and return the number with which ops find it.

    Only a weak reference to the wrapper is stored.
    """
    handle = next(_handles)
    _wrappers[handle] = wrapper
    return handle


def in_graph(arguments: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator for a method. A compiled graph calls the method as an op.

    The op of a method ``_name`` is ``lora_ext::vllm_name``. The method's object must have an
    attribute ``handle``, the result of :func:`known`.

    Args:
        arguments: schema of the op's arguments after ``handle``, which are the method's arguments
            after ``self``.
    """

    def decorate(method: Callable[..., None]) -> Callable[..., None]:
        name = "vllm" + method.__name__

        def run(handle: int, *args: Any) -> None:
            method(_wrappers[handle], *args)

        op = traced(f"{name}(int handle, {arguments}) -> ()", fake=lambda *args: None)(run)

        @functools.wraps(method)
        def call(self: Any, *args: Any) -> None:
            if compiles():
                op(self.handle, *args)
            else:
                method(self, *args)

        return call

    return decorate
