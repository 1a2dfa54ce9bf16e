"""Activated adapters (aLoRA) of a PEFT model, which apply only to the tokens after an invocation.

PEFT's ``alora_offsets`` contain a number for each row: the adapter applies to this many tokens at
the end of the input of a forward. With a cache, ``generate`` passes the whole prompt first and then
one new token per row, so the numbers of the prompt stay valid. Settings with other forwards
(``use_cache=False``, ``prefill_chunk_size``) are rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import nn

from lora_ext._checks import require
from lora_ext.rows import Activated, Assignment

Offsets = Sequence[int | None]
_CHUNK = "prefill_chunk_size"
_COPIES = ("num_beams", "num_return_sequences")

# The last result is cached, because all layers of a forward receive the same arguments.
_last: ContextVar[tuple[tuple[Any, ...], Activated] | None]
_last = ContextVar("lora_ext.peft_activated", default=None)


def activated(layer: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of ``names`` that are activated adapters of the layer."""
    return tuple(n for n in names if type(layer.lora_variant.get(n)) is ALoraLinearVariant)


def rows_of_offsets(
    names: Assignment, begin: Sequence[str], offsets: Offsets | None, leading: torch.Size
) -> Activated | None:
    """Return the adapter of each token, as PEFT's layers choose it.

    Args:
        names: adapter of each row, or one adapter for all rows.
        begin: names of the activated adapters.
        offsets: number of adapted tokens at the end of each row. If it is None, or None for a row,
            activated adapters apply to no token.
        leading: leading dimensions of the input: ``(B, T)`` for ``B`` rows of ``T`` tokens, or
            ``(B,)``.

    Returns:
        The adapter of each token, or None if ``leading`` has more than two dimensions.

    Raises:
        ValueError: If the number of offsets is not the number of rows.
    """
    if len(leading) > 2:
        return None
    count, length = leading[0], leading[1] if len(leading) > 1 else 1
    each = tuple(offsets) if offsets is not None else (None,) * count
    expected = f"one per row, for {count} rows"
    require(len(each) == count, "from_peft", "alora_offsets", expected, len(each))
    key = names.names, names.places, names.weights, tuple(begin), each, length
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
        # PEFT has found the starts already, so any token can represent an invocation.
        invocations = [(0,) if it else () for it in table]
        weights = names.weights if names.shape or names.weights is None else names.weights * count
        entries = Assignment(names.names, places, (count,), weights=weights)
        found = Activated(entries, invocations, starts, True, length)
        last = key, found
        _last.set(last)
    return last[1]


@contextmanager
def offsets_given(model: nn.Module, offsets: Offsets | None) -> Iterator[None]:
    """Pass the offsets to all LoRA layers, with hooks that stay until the ``with`` block ends.

    PEFT's own hooks do not support a checkpoint that runs several forwards per backward.
    """

    def give(_layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "alora_offsets": offsets}

    with ExitStack() as hooks:
        for layer in model.modules() if offsets is not None else ():
            if isinstance(layer, LoraLayer):
                hooks.enter_context(layer.register_forward_pre_hook(give, with_kwargs=True))  # pyright: ignore
        yield


def copies_of_prompt(settings: dict[str, Any], *defaults: Any) -> int:
    """Return the number of rows that ``generate`` makes from one prompt.

    A setting that is missing in ``settings``, the keyword arguments of ``generate``, is read from
    their ``generation_config``, and then from the configurations ``defaults``.
    """
    configs = (settings.get("generation_config"), *defaults)
    found = [next((n for c in configs if (n := getattr(c, k, None))), 1) for k in _COPIES]
    return max(settings.get(k) or n for k, n in zip(_COPIES, found, strict=True))


def refuse_other_forwards(model: Any, settings: dict[str, Any]) -> None:
    """Raise NotImplementedError for settings of ``generate`` that PEFT's offsets do not support.

    PEFT counts the adapted tokens from the end of a forward's input. Without a cache, or with a
    prompt in chunks, this is not the end of the prompt, and the wrong tokens would be adapted. The
    error is also raised if the number of beams or returned sequences is set only in the model's
    ``generation_config``.
    """
    given, used = copies_of_prompt(settings), copies_of_prompt(settings, model.generation_config)
    if given != used:
        raise NotImplementedError(
            "from_peft: generate: expected num_beams and num_return_sequences as arguments with "
            f"an activated adapter, found {used} rows per prompt in model.generation_config; pass "
            "both to generate"
        )
    config = settings.get("generation_config") or model.generation_config
    chosen = {k: settings.get(k, getattr(config, k, None)) for k in ("use_cache", _CHUNK)}
    if chosen["use_cache"] is False or chosen[_CHUNK] is not None:
        found = "use_cache=False" if chosen["use_cache"] is False else f"{_CHUNK}={chosen[_CHUNK]}"
        raise NotImplementedError(
            "from_peft: generate: expected use_cache=True and prefill_chunk_size=None with an "
            f"activated adapter, found {found}: PEFT counts the adapted tokens from the end of "
            "each forward's input, so it would adapt the wrong ones; use lora_ext.attach"
        )
