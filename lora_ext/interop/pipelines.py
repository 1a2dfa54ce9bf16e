"""What transformers' pipelines do to names: some drop those of a call, some make several rows of an
input. A model's forward sees nothing of it, so its callers are looked at."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from lora_ext.nn.context import Block

_FOLDER = "/transformers/pipelines/"
_DEPTH = 16  # frames between a model's forward and the call of a pipeline


def check_pipeline(block: Block | None) -> None:
    """Refuse what would be served by another adapter, or by the base.

    Raises:
        ValueError: no block, though the pipeline was given ``adapter_names``; or a block with
            several names around a pipeline that makes several rows of an input.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None:
            return
        if _FOLDER in frame.f_code.co_filename.replace("\\", "/"):
            _check(frame.f_code.co_name, frame.f_locals, block)
        frame = frame.f_back


def _check(function: str, found: Mapping[str, Any], block: Block | None) -> None:
    kind = type(found.get("self"))
    if block is None:
        if function == "__call__" and (found.get("kwargs") or {}).get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: expected a block around the pipeline, found an argument of its "
                f"call: a {kind.__name__} does not give it to the model; enter "
                "lora_ext.adapters(...)"
            )
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
