"""Detection of transformers pipelines that do not pass the adapter names to the model.

Some pipelines ignore the names of a call, some split an input into several rows, and some compute
only when their result is read. The model's forward cannot detect such a pipeline. This file
therefore wraps the methods ``__call__`` and ``forward`` of the class ``Pipeline``, which every
pipeline runs. The wrappers store the running call and step in ContextVars. They do not affect
unattached models.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from lora_ext.rows import Block, _context, context_value, current, innermost

_warned: set[int] = set()  # handles of the pools for which a warning was shown


@dataclass(frozen=True)
class _Call:
    """Running call of a pipeline.

    Attributes:
        names: whether the call received ``adapter_names``.
        blocks: handles of the pools whose innermost surrounding block has adapters.
        lazy: whether the call has returned an iterator, which may be read outside the block.
    """

    names: bool
    blocks: frozenset[int]
    lazy: bool = False


_call: ContextVar[_Call | None] = ContextVar("lora_ext.pipeline_call", default=None)
#: The pipeline that runs the current step, and the inputs of this step.
_step: ContextVar[tuple[Any, Any] | None] = ContextVar("lora_ext.pipeline_step", default=None)


def watch_pipelines() -> None:
    """Wrap the methods of transformers' pipelines once, if transformers' models are imported."""
    if "transformers.modeling_utils" not in sys.modules:
        return
    from transformers.pipelines.base import Pipeline  # takes only 30 ms after models are imported

    call, step = Pipeline.__call__, Pipeline.forward
    if hasattr(step, "of_lora_ext"):
        return

    @functools.wraps(call)
    def __call__(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        innermost_of: dict[int, Block] = {}
        for block in _context.outwards(innermost()):
            innermost_of.setdefault(block.handle, block)
        blocks = frozenset(h for h, b in innermost_of.items() if b.assignment.names)
        names = kwargs.get("adapter_names") is not None
        result = _inside(_call, _Call(names, blocks), call)(self, inputs, *args, **kwargs)
        # For a generator or a dataset, the result is an iterator whose `loader` runs the steps.
        steps: Any = getattr(result, "loader", None)
        if callable(getattr(steps, "infer", None)):
            steps.infer = _inside(_call, _Call(names, blocks, lazy=True), steps.infer)
        return result

    @functools.wraps(step)
    def forward(self: Any, model_inputs: Any, **params: Any) -> Any:
        return _inside(_step, (self, model_inputs), step)(self, model_inputs, **params)

    forward.of_lora_ext = True  # pyright: ignore[reportAttributeAccessIssue]
    Pipeline.__call__, Pipeline.forward = __call__, forward


def _inside(variable: ContextVar[Any], value: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``run`` with ``variable`` set to ``value``."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with context_value(variable, value):
            return run(*args, **kwargs)

    return inside


def report_lost_names(handle: int) -> None:
    """Raise an error if the forward of a pipeline would use wrong adapters; warn if it might.

    Args:
        handle: number of the pool.

    Raises:
        ValueError: If the pipeline received ``adapter_names`` and there is no block, or if a block
            has several names and the pipeline splits an input into several rows.
    """
    call, step = _call.get(), _step.get()
    if call is None and step is None:
        return
    block = current(handle)
    if block is not None:
        if step is not None and len(set(block.assignment.each())) > 1:
            pipeline, inputs = step
            cuts = any(kind.__name__ == "ChunkPipeline" for kind in type(pipeline).__mro__)
            # The pipeline marks the last row of each input.
            last = inputs.get("is_last", False) if isinstance(inputs, Mapping) else False
            whole = all(last) if isinstance(last, list) else last
            if cuts and not whole:
                kind = type(pipeline).__name__
                raise ValueError(
                    f"adapters: names: expected one name for all rows of a {kind}, "
                    f"which splits an input into several rows, found {block}"
                )
        return
    if call is not None and call.names:
        kind = "a pipeline" if step is None else f"a {type(step[0]).__name__}"
        raise ValueError(
            "adapter_names: expected `with lora_ext.adapters(...)` around the pipeline, found an "
            f"argument that {kind} does not pass to the model"
        )
    if call is not None and call.lazy and handle in call.blocks and handle not in _warned:
        _warned.add(handle)
        warnings.warn(
            "adapters: an iterator that a pipeline returned inside a block is read outside every "
            "block, so it uses the base model or the default of attach; read it inside the block",
            stacklevel=2,
        )
