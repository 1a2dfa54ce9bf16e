"""Adapter names of a PEFT model's forward, which gradient checkpoints store for the recomputation.

PEFT passes ``adapter_names`` to its layers with hooks. When a gradient checkpoint recomputes a
block of layers in the backward, PEFT has already removed the hooks, so the checkpoint passes the
names.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lora_ext._torch import compiles
from lora_ext.rows import Assignment, NamedRows, context_value

# The last assignment is cached, because PEFT's hooks pass the same list of names to every layer.
_last: ContextVar[tuple[tuple[Any, ...], Assignment] | None]
_last = ContextVar("lora_ext.peft_names", default=None)


class Given(NamedTuple):
    """Arguments of a PEFT model's forward that select the adapters."""

    names: Assignment | None
    #: Number of tokens at the end of each row to which its activated adapter applies; None for a
    #: row without one.
    offsets: Sequence[int | None] | None = None


# Arguments of the running forward, which checkpoints store for their recomputation.
_current: ContextVar[Given | None] = ContextVar("lora_ext.peft_current", default=None)
# Arguments with which a checkpointed block ran, while the backward recomputes the block.
_recomputed: ContextVar[Given | None] = ContextVar("lora_ext.peft_recomputed", default=None)

# Layers that had names in their last training forward. If such a layer runs again inside a backward
# without names, another library's checkpoint recomputes it, and it would train other adapters.
_named: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def assignment_of(names: Sequence[str]) -> Assignment:
    """Return ``adapter_names`` as an assignment, which is made once for all layers of a forward."""
    if isinstance(names, NamedRows):
        return names.assignment
    given, last = tuple[Any, ...](names), _last.get()
    if last is None or last[0] != given:
        # Copies, because the caller may change a mixture, which would then still be equal.
        kept = tuple(dict(n) if isinstance(n, Mapping) else n for n in given)
        last = kept, Assignment.of_entries(given, (len(given),))
        _last.set(last)
    return last[1]


def names_of_layer(layer: nn.Module, given: Sequence[str] | None) -> Assignment | None:
    """Return the adapter names of a layer's forward.

    Args:
        layer: the layer.
        given: names that PEFT's hooks have passed. If it is None, the names that a checkpoint
            passes to its recomputation are used, if any.

    Raises:
        RuntimeError: If another library's checkpoint recomputes the layer without its names.
    """
    if compiles():  # Dynamo cannot trace contextvars. The list is a constant of the graph.
        return None if given is None else Assignment.of_entries(given, (len(given),))
    again = _recomputed.get()
    recomputed = None if again is None else again.names
    if given is not None:
        if layer.training and again is None:
            _named.add(layer)
        return assignment_of(given)
    if recomputed is None and layer in _named:
        if torch._C._current_graph_task_id() != -1:  # True inside a backward.
            raise RuntimeError(
                "from_peft: adapter_names: expected transformers' own gradient checkpointing, "
                f"found a different one, which recomputes a {type(layer).__name__} without the "
                "adapter_names of its forward; pass no names, or do not checkpoint these layers"
            )
        _named.discard(layer)
    return recomputed


def offsets_of_layer(given: Sequence[int | None] | None) -> Sequence[int | None] | None:
    """Return the ``alora_offsets`` of a layer's forward.

    ``given`` is the value from PEFT's hooks. If it is None, a checkpoint's value is used, if any.
    """
    again = None if given is not None or compiles() else _recomputed.get()
    return given if again is None else again.offsets


@contextlib.contextmanager
def kept_by_checkpoints(model: nn.Module, given: Given) -> Iterator[None]:
    """Make gradient checkpoints pass ``given`` to their recomputation.

    This applies to the checkpoints of all forwards inside the ``with`` block.
    """
    block: Any
    for block in model.modules():
        checkpoint = getattr(block, "_gradient_checkpointing_func", None)
        if checkpoint is None or not getattr(block, "gradient_checkpointing", False):
            continue
        if not isinstance(checkpoint, _KeepsNames):
            block._gradient_checkpointing_func = _KeepsNames(checkpoint)
        for layer in block.modules():
            if hasattr(type(layer), "of_peft") or _remind in layer._forward_pre_hooks.values():
                continue  # Fused layers read the names themselves.
            if isinstance(layer, LoraLayer | AuxiliaryTrainingWrapper):  # PEFT runs this layer.
                nn.Module.register_forward_pre_hook(layer, _remind, with_kwargs=True)  # pyright: ignore[reportArgumentType]
    with context_value(_current, given):
        yield


@contextlib.contextmanager
def entries_given(model: nn.Module, names: Assignment) -> Iterator[None]:
    """Pass entries with weights to the fused layers, after PEFT's hooks have passed plain names."""
    entries = names.spelled()

    @functools.cache
    def repeated(count: int) -> NamedRows:
        each = [entry for entry in entries for _ in range(count)]
        return NamedRows(Assignment.of_entries(each, (len(each),)))

    def give(_layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        count = len(kwargs["adapter_names"]) // len(entries)  # number of beams
        return args, {**kwargs, "adapter_names": repeated(count)}

    with contextlib.ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and hasattr(type(layer), "of_peft"):
                hooks.enter_context(layer.register_forward_pre_hook(give, with_kwargs=True))  # pyright: ignore
        yield


class _KeepsNames:
    """Checkpoint function that passes the adapter arguments of its forward to the recomputation.

    It wraps the checkpoint function of a module. Without adapter arguments, it only calls the
    wrapped function. It is not removed after the forward, since another thread may be running it.
    """

    def __init__(self, checkpoint: Callable[..., Any]):
        self.checkpoint = checkpoint

    def __call__(self, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        rows = _current.get()
        if rows is None:
            return self.checkpoint(run, *args, **options)

        def run_with_names(*inner: Any, **kwargs: Any) -> Any:
            with context_value(_recomputed, rows):
                return run(*inner, **kwargs)

        return self.checkpoint(run_with_names, *args, **options)


def _remind(_layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pass the names and offsets to a layer that PEFT runs, if a checkpoint recomputes it.

    This is a forward pre-hook.
    """
    again = None if compiles() else _recomputed.get()
    if again is None:
        return args, kwargs
    more: dict[str, Any] = {}
    if again.names is not None:
        more["adapter_names"] = again.names.plain()
    if again.offsets is not None:
        more["alora_offsets"] = again.offsets
    return args, {**kwargs, **more}


def forget_checkpoints(module: Any) -> None:
    """Undo :func:`kept_by_checkpoints` for one module."""
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if isinstance(checkpoint, _KeepsNames):
        module._gradient_checkpointing_func = checkpoint.checkpoint
    for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _remind]:
        del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
