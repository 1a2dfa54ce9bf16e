"""What transformers' pipelines do to names: some drop those of a call, some make several rows of an
input. A model's forward sees nothing of it, so its callers are looked at."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from types import FrameType
from typing import Any

from lora_ext.nn.context import Block, current, ever_entered

_FOLDER = "/transformers/pipelines/"
_DEPTH = 24  # frames between a model's forward and the call of a pipeline

_warned: set[int] = set()  # pools


def check_pipeline(handle: int) -> None:
    """Refuse what would be served by another adapter, or by the base, and warn of what may be.

    A pipeline that is given a generator or a dataset returns an iterator, which computes where it
    is read; whether the call was inside a block is not to be seen there.

    Args:
        handle: of the pool.

    Raises:
        ValueError: no block, though the pipeline was given ``adapter_names``; or a block with
            several names around a pipeline that makes several rows of an input.
    """
    block = current(handle)
    read: Any = None  # the iterator, unless a pipeline's call reads it
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None:
            break
        if _FOLDER in frame.f_code.co_filename.replace("\\", "/"):
            function, found = frame.f_code.co_name, frame.f_locals
            _check(function, found, block)
            if function in ("__call__", "__next__"):
                read = found.get("self") if function == "__next__" else None
        frame = frame.f_back
    if read is not None and block is None:
        _check_iterator(read, handle)


def _check_iterator(read: Any, handle: int) -> None:
    while read is not None:
        if (getattr(read, "params", None) or {}).get("adapter_names") is not None:
            raise _names_are_lost("a pipeline")
        loader = getattr(read, "loader", None)
        read = getattr(loader, "dataset", loader)
    if ever_entered() and handle not in _warned:
        _warned.add(handle)
        warnings.warn(
            "adapters: an iterator that a pipeline returned is read outside every block, and the "
            "base model or attach's default serves it, wherever the pipeline was called: read it "
            "inside the block; adapters(None) says that the base model is meant",
            stacklevel=2,
        )


def _names_are_lost(pipeline: str) -> ValueError:
    return ValueError(
        "adapter_names: expected a block around the pipeline, found an argument of its call: "
        f"{pipeline} does not give it to the model; enter lora_ext.adapters(...)"
    )


def _check(function: str, found: Mapping[str, Any], block: Block | None) -> None:
    kind = type(found.get("self"))
    if block is None:
        if function == "__call__" and (found.get("kwargs") or {}).get("adapter_names") is not None:
            raise _names_are_lost(f"a {kind.__name__}")
    elif function == "_forward" and len(set(block.assignment.each())) > 1:
        cuts = any(base.__name__ == "ChunkPipeline" for base in kind.__mro__)
        if cuts and not _whole(found):
            raise ValueError(
                f"adapters: names: expected one name for all rows of a {kind.__name__}, which "
                f"makes several rows of an input, found {block}"
            )


def _whole(found: Mapping[str, Any]) -> bool:
    """Whether each row is an input: a pipeline notes which rows are the last of theirs."""
    notes = [found.get("is_last")]
    notes += [value.get("is_last") for value in found.values() if isinstance(value, dict)]
    note = next((note for note in notes if note is not None), False)
    return all(note) if isinstance(note, list) else bool(note)
