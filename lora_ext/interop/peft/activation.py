"""Activated adapters of a PEFT model: PEFT says of each row how many tokens at the end of what a
forward sees are the adapter's, ``alora_offsets``. With a cache that holds for every forward of
``generate``; where a forward sees another part of the row it does not, and is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import nn

from lora_ext.rows import Activated, Assignment

Offsets = Sequence[int | None]
_CHUNK = "prefill_chunk_size"

# All layers of a forward are given the same; the last one is kept.
_last: ContextVar[tuple[tuple[Any, ...], Activated] | None]
_last = ContextVar("lora_ext.peft_activated", default=None)


def activated(layer: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Those of a layer's adapters that begin in mid-sequence."""
    return tuple(n for n in names if type(layer.lora_variant.get(n)) is ALoraLinearVariant)


def rows_of_offsets(
    names: Assignment, begin: Sequence[str], offsets: Offsets | None, leading: torch.Size
) -> Activated | None:
    """Which tokens have which adapter, as PEFT's own layer gives it to them.

    Args:
        names: of the rows, or one for all of them. begin: those of them that are activated.
        offsets: of each row; None: they serve nobody. leading: ``(B, T)`` or ``(B,)``.

    Returns:
        None where the offsets are of another number than rows.
    """
    count, length = leading[0], leading[1] if len(leading) > 1 else 1
    each = tuple(offsets) if offsets is not None else (None,) * count
    if len(each) != count or len(leading) > 2:
        return None
    key = names.names, names.places, tuple(begin), each, length
    last = _last.get()
    if last is None or last[0] != key:
        places = names.places
        assert isinstance(places, tuple)
        places = places if names.shape else places * count
        table = [name in begin for name in names.names]
        starts = tuple(
            (None if offset is None else length - min(offset, length))
            if place >= 0 and table[place]
            else 0
            for place, offset in zip(places, each, strict=True)
        )
        invocations = [(0,) if it else () for it in table]  # which tokens, PEFT has looked
        found = Activated(names.names, places, (count,), 1, invocations, starts, True, length)
        last = key, found
        _last.set(last)
    return last[1]


@contextmanager
def offsets_given(model: nn.Module, offsets: Offsets | None) -> Iterator[None]:
    """Around a call: its layers are given the offsets, as by PEFT's hooks, which checkpoints allow
    one forward for each backward."""

    def give(_layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "alora_offsets": offsets}

    handles = []
    try:
        for layer in model.modules() if offsets is not None else ():
            if isinstance(layer, LoraLayer):
                handles.append(layer.register_forward_pre_hook(give, with_kwargs=True))  # pyright: ignore
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse_other_forwards(model: Any, settings: dict[str, Any]) -> None:
    """Raise NotImplementedError for settings of ``generate`` whose forwards see another part of a
    row than PEFT's offsets mean: no cache, or a prompt in chunks."""
    config = settings.get("generation_config") or model.generation_config
    chosen = {k: settings.get(k, getattr(config, k, None)) for k in ("use_cache", _CHUNK)}
    if chosen["use_cache"] is False or chosen[_CHUNK] is not None:
        found = "use_cache=False" if chosen["use_cache"] is False else f"{_CHUNK}={chosen[_CHUNK]}"
        raise NotImplementedError(
            "from_peft: generate: expected a cache and a prompt in one piece beside an activated "
            f"adapter, found {found}: PEFT counts from the end of what a forward sees, and would "
            "adapt other tokens; lora_ext.attach serves it"
        )
