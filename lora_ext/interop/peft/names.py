"""The names that a forward of a PEFT model was given, and how checkpoints keep them.

PEFT hands ``adapter_names`` to its layers by hooks that are gone when a checkpoint computes a block
again, in the backward; by then the names are what the checkpoint has kept of the forward.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lora_ext._torch import compiles
from lora_ext.rows import Assignment, NamedRows

# A batch's names come as a list through PEFT's hooks, to every layer anew; the last one is kept.
_last: ContextVar[tuple[tuple[str, ...], Assignment] | None]
_last = ContextVar("lora_ext.peft_names", default=None)
# What the forward was given: for checkpoints, which hand it on to their recomputation.
_current: ContextVar[Assignment | None] = ContextVar("lora_ext.peft_current", default=None)
# What a checkpointed block was given in the forward, while it is recomputed in the backward.
_recomputed: ContextVar[Assignment | None] = ContextVar("lora_ext.peft_recomputed", default=None)

# Layers whose last forward had names that no checkpoint of ours keeps: recomputed without any, they
# would train other adapters.
_named: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def assignment_of(names: Sequence[str]) -> Assignment:
    """What ``adapter_names`` say, made once for all layers of a forward."""
    if isinstance(names, NamedRows):
        return names.assignment
    given, last = tuple(names), _last.get()
    if last is None or last[0] != given:
        last = given, Assignment.of_entries(given, (len(given),))
        _last.set(last)
    return last[1]


def names_of_layer(layer: nn.Module, given: Sequence[str] | None) -> Assignment | None:
    """The names of a layer's forward: those that PEFT's hooks give it, or, where a checkpoint
    computes it again, those of the forward that it repeats. A foreign checkpoint that has lost them
    is a RuntimeError."""
    if compiles():  # dynamo traces no contextvars; the list is a constant of the graph
        return None if given is None else Assignment.of_entries(given, (len(given),))
    recomputed = _recomputed.get()
    if given is not None:
        if layer.training and recomputed is None:
            _named.add(layer)
        return assignment_of(given)
    if recomputed is None and layer in _named:
        if torch._C._current_graph_task_id() != -1:  # inside a backward
            raise RuntimeError(
                "from_peft: adapter_names: expected transformers' own gradient checkpointing, "
                "found another, which recomputes a layer whose forward had adapter_names and "
                "has lost them; pass no names, or do not checkpoint these layers"
            )
        _named.discard(layer)
    return recomputed


@contextlib.contextmanager
def kept_by_checkpoints(model: nn.Module, names: Assignment) -> Iterator[None]:
    """Around a forward that trains: its checkpoints give their recomputation these names."""
    _let_checkpoints_keep_names(model)
    token = _current.set(names)
    try:
        yield
    finally:
        _current.reset(token)


class _KeepsNames:
    """A checkpoint function that also keeps the names of its forward for the recomputation.

    By then the forward is over and its hooks are gone. It stays where it was put, as another
    thread may be inside it; without names it is the function it wraps.
    """

    def __init__(self, checkpoint: Callable[..., Any]):
        self.checkpoint = checkpoint

    def __call__(self, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        rows = _current.get()
        if rows is None:
            return self.checkpoint(run, *args, **options)

        def run_with_names(*inner: Any, **kwargs: Any) -> Any:
            token = _recomputed.set(rows)
            try:
                return run(*inner, **kwargs)
            finally:
                _recomputed.reset(token)

        return self.checkpoint(run_with_names, *args, **options)


def _let_checkpoints_keep_names(model: nn.Module) -> None:
    block: Any
    for block in model.modules():
        checkpoint = getattr(block, "_gradient_checkpointing_func", None)
        if checkpoint is None or not getattr(block, "gradient_checkpointing", False):
            continue
        if not isinstance(checkpoint, _KeepsNames):
            block._gradient_checkpointing_func = _KeepsNames(checkpoint)
        for layer in block.modules():
            if hasattr(type(layer), "of_peft") or _remind in layer._forward_pre_hooks.values():
                continue  # a layer of ours asks by itself
            if isinstance(layer, LoraLayer | AuxiliaryTrainingWrapper):  # PEFT's own
                nn.Module.register_forward_pre_hook(layer, _remind, with_kwargs=True)  # pyright: ignore[reportArgumentType]


def _remind(_layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a layer of PEFT's own the names that a recomputation has no hook for."""
    names = None if compiles() else _recomputed.get()
    return args, kwargs if names is None else {**kwargs, "adapter_names": names.spelled()}


def forget_checkpoints(module: Any) -> None:
    """Give a module back what :func:`kept_by_checkpoints` has put into it."""
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if isinstance(checkpoint, _KeepsNames):
        module._gradient_checkpointing_func = checkpoint.checkpoint
    for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _remind]:
        del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
