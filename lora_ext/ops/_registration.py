"""What the dispatcher cannot learn from C++: the fake kernel of every op, and backwards in Python.

Each stands beside its op's typed function, marked by the decorators below. :func:`register` gives
them to a library: once to the shipped one, and in tests once more to each emulated one.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

_fakes: dict[str, Callable[..., Any]] = {}
_backwards: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {}


def fake(op: str) -> Callable[[F], F]:
    """Mark a function as the fake kernel of ``op``: it returns empty tensors, computing nothing.

    It takes the op's arguments by position, defaults included, and sees them on one device only:
    torch runs it too where meta tensors are mixed with others, and these are refused here.
    """

    def mark(function: F) -> F:
        _fakes[op] = function
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


_registered: set[str] = set()


@contextmanager
def routed(library: str) -> Generator[None]:
    """Let every function of ``lora_ext.ops`` call ``torch.ops.<library>`` in a ``with`` block, in
    all threads."""
    register(library)
    package = importlib.import_module(__package__ or "lora_ext.ops")
    found: list[Any] = [
        importlib.import_module(m.name)
        for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    ]
    before = [(module, module._c) for module in found if hasattr(module, "_c")]
    try:
        for module, _ in before:
            vars(module)["_c"] = getattr(torch.ops, library)
        yield
    finally:
        for module, own in before:
            vars(module)["_c"] = own


def register(library: str) -> None:
    """Give every fake kernel and backward to the ops of ``torch.ops.<library>``, once."""
    if library in _registered:
        return
    _registered.add(library)
    ops = getattr(torch.ops, library)
    # torch annotates neither of the two in full.
    for op, function in _fakes.items():
        torch.library.register_fake(  # pyright: ignore[reportUnknownMemberType]
            f"{library}::{op}", _checked(op, getattr(ops, op).default._schema, function)
        )
    for op, (function, save) in _backwards.items():
        torch.library.register_autograd(  # pyright: ignore[reportUnknownMemberType]
            f"{library}::{op}", functools.partial(function, ops), setup_context=save
        )


def _checked(op: str, schema: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a fake kernel of tensors on one device, with every argument of the schema in its
    place."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        rest = schema.arguments[len(args) :]
        values = [*args, *(kwargs.get(each.name, each.default_value) for each in rest)]
        named = zip((each.name for each in schema.arguments), values, strict=True)
        devices = [(name, t.device) for name, t in named if isinstance(t, Tensor)]
        for name, device in devices:
            first, expected = devices[0]
            if device != expected:
                raise ValueError(
                    f"{op.removesuffix('_forward')}: expected all tensors on one device, found "
                    f"{first} on {expected} and {name} on {device}"
                )
        return function(*values)

    return checked
