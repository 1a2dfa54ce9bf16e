"""What transformers' pipelines do to names: some drop those of a call, some make several rows of an
input, some compute where their result is read. A model's forward sees nothing of it.

So the class says it: ``Pipeline.__call__`` and ``Pipeline.forward``, which every pipeline runs, are
wrapped, and note in a ContextVar whose call and whose step runs. Nothing else changes, and nothing
at all for models that are not attached.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from lora_ext.rows import Block, current, innermost

_warned: set[int] = set()  # pools


@dataclass(frozen=True)
class _Call:
    """A call of a pipeline, for as long as it computes."""

    names: bool  # it was given adapter_names
    blocks: frozenset[int]  # handles of the pools that had a block around it, but of the base
    lazy: bool = False  # what it returned is read, perhaps elsewhere


_call: ContextVar[_Call | None] = ContextVar("lora_ext.pipeline_call", default=None)
#: The pipeline whose step runs, and what the step was given.
_step: ContextVar[tuple[Any, Any] | None] = ContextVar("lora_ext.pipeline_step", default=None)


def watch_pipelines() -> None:
    """Let pipelines note what they do, where a model of transformers may be in one."""
    if "transformers.modeling_utils" not in sys.modules:
        return
    from transformers.pipelines.base import Pipeline  # 30 ms beside a model of theirs

    if not hasattr(Pipeline.forward, "of_lora_ext"):
        Pipeline.__call__ = _noting_calls(Pipeline.__call__)
        Pipeline.forward = _noting_steps(Pipeline.forward)


def _noting_calls(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def __call__(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        call = _Call(kwargs.get("adapter_names") is not None, _blocks_around())
        result = _noting(_call, call, original)(self, inputs, *args, **kwargs)
        # Of a generator or a dataset: an iterator over results, around one that runs the steps.
        steps = getattr(result, "loader", None)
        if callable(getattr(steps, "infer", None)):
            read = _Call(call.names, call.blocks, lazy=True)
            steps.infer = _noting(_call, read, steps.infer)  # pyright: ignore[reportOptionalMemberAccess]
        return result

    return __call__


def _noting(note: ContextVar[Any], value: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        token = note.set(value)
        try:
            return run(*args, **kwargs)
        finally:
            note.reset(token)

    return noting


def _noting_steps(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def forward(self: Any, model_inputs: Any, **params: Any) -> Any:
        run = _noting(_step, (self, model_inputs), original)
        return run(self, model_inputs, **params)

    forward.of_lora_ext = True  # pyright: ignore[reportAttributeAccessIssue]
    return forward


def _blocks_around() -> frozenset[int]:
    innermost_of: dict[int, Block] = {}
    block = innermost()
    while block is not None:
        innermost_of.setdefault(block.handle, block)
        block = block.outer
    return frozenset(h for h, b in innermost_of.items() if b.assignment.names)


def check_pipeline(handle: int) -> None:
    """Refuse what would be served by another adapter, or by the base, and warn of what may be.

    Args:
        handle: of the pool.

    Raises:
        ValueError: no block, though the pipeline was given ``adapter_names``; or a block with
            several names around a pipeline that makes several rows of an input.
    """
    call, step = _call.get(), _step.get()
    if call is None and step is None:
        return
    block = current(handle)
    if block is not None:
        if step is not None and len(set(block.assignment.each())) > 1:
            _check_rows(*step, block)
        return
    if call is not None and call.names:
        kind = "a pipeline" if step is None else f"a {type(step[0]).__name__}"
        raise ValueError(
            "adapter_names: expected a block around the pipeline, found an argument of its call: "
            f"{kind} does not give it to the model; enter lora_ext.adapters(...)"
        )
    if call is not None and call.lazy and handle in call.blocks and handle not in _warned:
        _warned.add(handle)
        warnings.warn(
            "adapters: an iterator that a pipeline returned inside a block is read outside every "
            "block, and the base model or attach's default serves it: read it inside the block",
            stacklevel=2,
        )


def _check_rows(pipeline: Any, inputs: Any, block: Block) -> None:
    cuts = any(base.__name__ == "ChunkPipeline" for base in type(pipeline).__mro__)
    if cuts and not _whole(inputs):
        raise ValueError(
            f"adapters: names: expected one name for all rows of a {type(pipeline).__name__}, "
            f"which makes several rows of an input, found {block}"
        )


def _whole(inputs: Any) -> bool:
    """Whether each row is an input: a pipeline notes which rows are the last of theirs."""
    note = inputs.get("is_last", False) if isinstance(inputs, Mapping) else False
    return all(note) if isinstance(note, list) else bool(note)
