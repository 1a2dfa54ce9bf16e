"""Methods that a compiled graph calls as ops.

A traced graph would keep the rows of the step that it was traced in. What reads them is therefore
an op of its own, which finds its wrapper, and with it the rows, when the graph runs.
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
    """The number by which ops find this wrapper, as long as it lives."""
    handle = next(_handles)
    _wrappers[handle] = wrapper
    return handle


def in_graph(arguments: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A method of an object with a ``handle``; traced, it becomes the op ``lora_ext::vllm_<name>``.

    Args:
        arguments: those after ``self``, as a schema.
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
