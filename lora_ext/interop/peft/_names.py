"""Arguments of a PEFT forward that select the adapters: ``adapter_names`` and ``alora_offsets``.

PEFT passes ``adapter_names`` to its layers with hooks, which it removes before the backward. If
gradient checkpointing recomputes a block of layers in the backward, functions of this module pass
the names to these layers.

``alora_offsets`` are for activated adapters (aLoRA), which apply only to the tokens after an
invocation. Each row has an offset: the number of tokens, at the end of a forward's input, to which
the adapter applies. With a cache, ``generate`` passes the whole prompt first and then one new token
per row, so the offsets of the prompt stay valid. Settings with other forwards
(``use_cache=False``, ``prefill_chunk_size``) are rejected.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lora_ext._checks import require
from lora_ext._torch import compiles
from lora_ext.rows import Activated, Assignment, NamedRows, context_value

Offsets = Sequence[int | None]
_CHUNK = "prefill_chunk_size"
_COPIES = ("num_beams", "num_return_sequences")

# The last results are cached, because all layers of a forward receive the same arguments.
_last_names: ContextVar[tuple[tuple[Any, ...], Assignment] | None]
_last_names = ContextVar("lora_ext.peft_names", default=None)
_last_starts: ContextVar[tuple[tuple[Any, ...], Activated] | None]
_last_starts = ContextVar("lora_ext.peft_activated", default=None)


class Given(NamedTuple):
    """Arguments of a PEFT model's forward that select the adapters."""

    names: Assignment | None
    #: Number of tokens at the end of each row to which the row's activated adapter applies; None
    #: for a row without an activated adapter.
    offsets: Offsets | None = None


# Arguments of the running forward, which checkpoints store for their recomputation.
_current: ContextVar[Given | None] = ContextVar("lora_ext.peft_current", default=None)
# Arguments with which a checkpointed block ran, while the backward recomputes the block.
_recomputed: ContextVar[Given | None] = ContextVar("lora_ext.peft_recomputed", default=None)

# Layers that had names in their last training forward. If such a layer runs inside a backward
# without names, the checkpointing of another library recomputes it, and would train other adapters.
_named: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def assignment_of(names: Sequence[str]) -> Assignment:
    """Convert ``adapter_names`` to an assignment, cached for all layers of a forward."""
    if isinstance(names, NamedRows):
        return names.assignment
    given, last = tuple[Any, ...](names), _last_names.get()
    if last is None or last[0] != given:
        # Copies are stored, because a mixture that the caller changed would still equal itself.
        kept = tuple(dict(n) if isinstance(n, Mapping) else n for n in given)
        last = kept, Assignment.of_entries(given, (len(given),))
        _last_names.set(last)
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


def offsets_of_layer(given: Offsets | None) -> Offsets | None:
    """Return the ``alora_offsets`` of a layer's forward.

    ``given`` is the value from PEFT's hooks. If it is None, the value that a checkpoint passes to
    its recomputation is used, if any.
    """
    again = None if given is not None or compiles() else _recomputed.get()
    return given if again is None else again.offsets


@contextlib.contextmanager
def kept_by_checkpoints(model: nn.Module, given: Given) -> Iterator[None]:
    """Return a context manager in which gradient checkpoints pass ``given`` to recomputations."""
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
def _hooked(layers: Iterable[Any], hook: Callable[..., Any]) -> Iterator[None]:
    """Return a context manager in which layers have a forward pre-hook that gets ``kwargs``."""
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield


@contextlib.contextmanager
def entries_given(model: nn.Module, names: Assignment) -> Iterator[None]:
    """Return a context manager that gives fused layers the entries with weights.

    The hooks run after PEFT's hooks, which pass plain names.
    """
    entries = names.spelled()

    @functools.cache
    def repeated(count: int) -> NamedRows:
        each = [entry for entry in entries for _ in range(count)]
        return NamedRows(Assignment.of_entries(each, (len(each),)))

    def give(_layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        count = len(kwargs["adapter_names"]) // len(entries)  # number of beams
        return args, {**kwargs, "adapter_names": repeated(count)}

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    with _hooked([layer for layer in layers if hasattr(type(layer), "of_peft")], give):
        yield


class _KeepsNames:
    """Checkpoint function that passes the adapter arguments of its forward to the recomputation.

    The object wraps the checkpoint function of a module. Without adapter arguments, it only calls
    that function. It stays after the forward, since another thread may be running it.
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
    """Pass names and offsets to a layer of PEFT that a checkpoint recomputes (pre-hook)."""
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


def activated(layer: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names among ``names`` of the layer's activated adapters (aLoRA)."""
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
    last = _last_starts.get()
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
        # PEFT has found the starts already, so the tokens of the invocations are not used.
        invocations = [(0,) if it else () for it in table]
        weights = names.weights if names.shape or names.weights is None else names.weights * count
        entries = Assignment(names.names, places, (count,), weights=weights)
        found = Activated(entries, invocations, starts, True, length)
        last = key, found
        _last_starts.set(last)
    return last[1]


@contextlib.contextmanager
def offsets_given(model: nn.Module, offsets: Offsets | None) -> Iterator[None]:
    """Return a context manager in which hooks pass the offsets to all LoRA layers.

    PEFT's own hooks do not support a checkpoint that runs several forwards per backward.
    """

    def give(_layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "alora_offsets": offsets}

    layers = model.modules() if offsets is not None else ()
    with _hooked([layer for layer in layers if isinstance(layer, LoraLayer)], give):
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

    PEFT counts the adapted tokens from the end of a forward's input. Without a cache, or if the
    prompt is processed in chunks, the input does not end with the prompt, and wrong tokens would be
    adapted. The error is also raised if the number of beams or returned sequences is set only in
    the model's ``generation_config``.
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
            "each forward's input and would adapt the wrong tokens; use lora_ext.attach"
        )
