"""What the dispatcher cannot learn from C++: the fake kernel of every op, and backwards in Python.

Each stands beside its op's typed function, marked by the decorators below. :func:`register` gives
them to a library: once to the shipped one, and in tests once more to each emulated one.
"""

import functools
import inspect
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

_fakes: dict[str, Callable[..., Any]] = {}
_backwards: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {}


def fake(op: str) -> Callable[[F], F]:
    """Mark a function as the fake kernel of ``op``: it returns empty tensors, computing nothing.

    It takes the op's arguments, and sees them on one device only: torch runs it too where meta
    tensors are mixed with others, and these are refused here.
    """
    name = op.removesuffix("_forward")

    def mark(function: F) -> F:
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            named = zip(chain(names, repeat("another")), args, strict=False)
            _same_device(name, *named, *kwargs.items())
            return function(*args, **kwargs)

        _fakes[op] = checked
        return function

    return mark


def backward(op: str, save: Callable[..., None]) -> Callable[[F], F]:
    """Mark a function as the backward of ``op``.

    Args:
        op: its name.
        save: called as ``save(ctx, inputs, output)`` after a forward.

    The function is called as ``function(library, ctx, *gradients)``; ``library`` has the ops.
    """

    def mark(function: F) -> F:
        _backwards[op] = function, save
        return function

    return mark


def register(library: str) -> None:
    """Give every fake kernel and backward to the ops of ``torch.ops.<library>``."""
    # torch annotates neither of the two in full.
    for op, function in _fakes.items():
        torch.library.register_fake(f"{library}::{op}", function)  # pyright: ignore[reportUnknownMemberType]
    for op, (function, save) in _backwards.items():
        torch.library.register_autograd(  # pyright: ignore[reportUnknownMemberType]
            f"{library}::{op}",
            functools.partial(function, getattr(torch.ops, library)),
            setup_context=save,
        )


def _same_device(op: str, *args: tuple[str, object]) -> None:
    devices = [(name, t.device) for name, t in args if isinstance(t, Tensor)]
    for name, device in devices:
        first, expected = devices[0]
        if device != expected:
            raise ValueError(
                f"{op}: expected all tensors on one device, found {first} on {expected} and "
                f"{name} on {device}"
            )
