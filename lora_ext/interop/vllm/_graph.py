"""Methods that a compiled graph calls as ops.

A traced graph would keep the rows of the step in which it was traced. A method that reads them is
therefore an op, which looks up its wrapper, and the rows in it, when the graph runs.
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
    """Return the number by which ops find this wrapper; holds only a weak reference."""
    handle = next(_handles)
    _wrappers[handle] = wrapper
    return handle


def in_graph(arguments: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a method of an object with a ``handle``; a trace calls ``lora_ext::vllm_<name>``.

    Args:
        arguments: schema of the arguments after ``self``.
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
