"""Registration of fake kernels and of backward functions written in Python.

Decorators mark these functions next to the typed Python function of their op. :func:`register`
registers them for the ops of a library: the compiled library and, in tests, each emulator of it.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_ext import _loader

#: The compiled module, whose functions call the dispatcher like ``torch.ops``, in less time. Graphs
#: of ``torch.compile`` cannot contain these functions.
direct: Any = _loader.load()

F = TypeVar("F", bound=Callable[..., Any])

_fakes: dict[str, Callable[..., Any]] = {}
_backwards: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {}


def fake(op: str) -> Callable[[F], F]:
    """Return a decorator that marks a function as the fake kernel of ``op``.

    A fake kernel returns empty tensors. It is called with all arguments of the op by position,
    including defaults. All tensors are on one device: torch also runs fake kernels if only some
    tensors are on the meta device, but such calls raise ``ValueError`` before the function is
    called.
    """

    def mark(function: F) -> F:
        _fakes[op] = function
        return function

    return mark


def backward(op: str, save: Callable[..., None]) -> Callable[[F], F]:
    """Return a decorator that marks a function as the backward function of ``op``.

    The function is called as ``function(library, ctx, *gradients)``, where ``library`` is
    ``torch.ops.<library>``.

    Args:
        op: Name of the op.
        save: Function that is called as ``save(ctx, inputs, output)`` after a forward.
    """

    def mark(function: F) -> F:
        _backwards[op] = function, save
        return function

    return mark


@contextmanager
def routed(library: str) -> Generator[None]:
    """Make all functions of ``lora_ext.ops`` call ``torch.ops.<library>`` inside a ``with`` block.

    This affects all threads.
    """
    register(library)
    package = importlib.import_module(__package__ or "lora_ext.ops")
    found: list[Any] = [
        importlib.import_module(m.name)
        for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    ]
    module = _loader.load(library.removeprefix("lora_ext") or "_C")
    names = {"_c": getattr(torch.ops, library), "direct": module}
    modules: list[dict[str, Any]] = [vars(each) for each in found]
    before = [(m, name, m[name]) for m in modules for name in names if name in m]
    try:
        for variables, name, _ in before:
            variables[name] = names[name]
        yield
    finally:
        for variables, name, own in before:
            variables[name] = own


@functools.cache
def register(library: str) -> None:
    """Register all marked functions for ``torch.ops.<library>``, once per library."""
    ops = getattr(torch.ops, library)
    # torch's annotations of `register_fake` and `register_autograd` are incomplete.
    for op, function in _fakes.items():
        torch.library.register_fake(  # pyright: ignore[reportUnknownMemberType]
            f"{library}::{op}", _checked(op, getattr(ops, op).default._schema, function)
        )
    for op, (function, save) in _backwards.items():
        torch.library.register_autograd(  # pyright: ignore[reportUnknownMemberType]
            f"{library}::{op}", functools.partial(function, ops), setup_context=save
        )


def _checked(op: str, schema: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a fake kernel that checks devices and passes all arguments by position."""

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
