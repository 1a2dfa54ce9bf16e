"""``exact``: a row's bits are its own, whatever is in the batch, in training as in serving."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lora_ext._checks import flag, instance, require
from lora_ext.layers.base.packed_linear import PackedLinear, linears_of, pack_linears, unpack

from .attention import ask_first

Model = TypeVar("Model", bound=nn.Module)

_MARK = "_lora_ext_exact"  # on every module of an exact model; its copies are exact too
_OWN = "_lora_ext_exact_packed"  # the layers that exact has packed


def exact(model: Model, enabled: bool = True) -> Model:
    """Let every token have the same bits alone, in any batch, decoding and in a training forward.

    Two things in a decoder depend on the batch: a library's product with a weight, whose order of
    sums follows from the number of rows, and attention, whose blocks follow from the number of
    queries. An exact model multiplies with packed weights, however many rows there are
    (:func:`lora_ext.ops.packed_linear`), and attends with one query row at a time over that row's
    own keys. What adapters add has this law by itself. So a sampled token's log-probability is the
    trainer's, bit for bit, where the adapter has the dtype of the weights and no dropout. Gradients
    are not exact. ``docs/exact.md`` has costs and limits.

    Args:
        model: of transformers, on the CPU, float32 or bfloat16, in evaluation mode, with the
            attention "sdpa"; it may be wrapped, or attached to a pool. In place.
        enabled: False brings back what was there.

    Returns:
        ``model``.

    Raises:
        TypeError: no module, or a flag that is none. ValueError: another attention, or a layer that
            cannot be packed, naming it. RuntimeError: it is not exact where that is to end.
    """
    instance("exact", "model", model, nn.Module)
    if not flag("exact", "enabled", enabled):
        return _undone(model)
    if _MARK in model.__dict__:
        return model
    config: Any = getattr(model, "config", None)
    found = getattr(config, "_attn_implementation", None)
    require(found == "sdpa", "exact", "model", "a model of transformers with sdpa", repr(found))
    plain = {name: module for name, module in linears_of(model) if type(module) is nn.Linear}
    if plain:
        pack_linears(model, plain)
    for _, module in linears_of(model):
        module.__dict__["exact"] = True
    for module in model.modules():
        module.__dict__[_MARK] = True
    model.__dict__[_OWN] = list({id(m): m for m in plain.values()}.values())
    ask_first(_attention)
    return model


def _undone(model: Model) -> Model:
    known = _OWN in model.__dict__
    require(known, "exact", "model", "a model that is exact", "one that is not", RuntimeError)
    for _, module in linears_of(model):
        module.__dict__.pop("exact", None)
    unpack(module for module in model.__dict__.pop(_OWN) if isinstance(module, PackedLinear))
    for module in model.modules():
        module.__dict__.pop(_MARK, None)
    return model


def _attention(
    inner: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if _MARK not in module.__dict__:
        how: Any = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return inner(module, query, key, value, attention_mask, **how)
    require(dropout == 0, "exact", "attention_dropout", "0", dropout)
    for name in ("softcap", "position_bias"):
        require(kwargs.get(name) is None, "exact", "model", f"attention without {name}", "it")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        key, value = (t[:, :, : query.shape[2]] for t in (key, value))
    else:
        causal = False
    rows: Any = _Rows.apply
    y = rows(query, key, value, attention_mask, causal, scaling)
    return y.transpose(1, 2).contiguous(), None


_turns = threading.Lock()


@contextmanager
def _one_thread() -> Generator[None]:
    """A block whose products one thread makes: several cut them by the number of sequences.

    The number of threads is the process's, so that exact attention waits for its turn.
    """
    with _turns:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class _Rows(torch.autograd.Function):
    """Attention with one query row at a time; the gradient is that of all at once."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.causal, ctx.scale = causal, scale
        with _one_thread():
            if mask is None:
                length = k.shape[2]
                ends = [t + 1 if causal else length for t in range(q.shape[2])]
                return _each(q, k, v, [(0, end) for end in ends], scale)  # all sequences together
            allowed = _allowed(mask, k.shape[2])
            if allowed.shape[0] == 1:
                return _each(q, k, v, _spans(allowed[0]), scale)
            each = zip(q.split(1), k.split(1), v.split(1), allowed, strict=True)
            return torch.cat([_each(q, k, v, _spans(rows), scale) for q, k, v, rows in each])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *qkv, mask = ctx.saved_tensors
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in qkv)
            how: Any = {"is_causal": ctx.causal, "scale": ctx.scale}
            groups = q.shape[1] // k.shape[1]
            wide = [t.repeat_interleave(groups, 1) for t in (k, v)]
            if mask is not None:
                mask = mask[..., : k.shape[2]]
            y = scaled_dot_product_attention(q, *wide, attn_mask=mask, **how)
            return (*torch.autograd.grad(y, (q, k, v), grads[0]), None, None, None)


def _each(
    q: Tensor, k: Tensor, v: Tensor, spans: list[tuple[int, int] | Tensor], scale: float | None
) -> Tensor:
    """``(B, H, T, D)``: row t over the keys of its span alone."""
    rows = []
    for t, span in enumerate(spans):
        if isinstance(span, Tensor):
            keys, values = k[:, :, span], v[:, :, span]
        else:
            keys, values = (x[:, :, span[0] : span[1]] for x in (k, v))
        row = q[:, :, t : t + 1]
        if keys.shape[2] == 0:  # padding
            rows.append(torch.zeros_like(row))
            continue
        rows.append(scaled_dot_product_attention(row, keys, values, scale=scale, enable_gqa=True))
    return torch.cat(rows, 2)


def _allowed(mask: Tensor, keys: int) -> Tensor:
    """``(B, T, L)`` bool, B may be 1."""
    require(mask.shape[1] == 1, "exact", "attention_mask", "one for all heads", list(mask.shape))
    mask = mask[:, 0, :, :keys]
    if mask.dtype == torch.bool:
        return mask
    least = torch.finfo(mask.dtype).min
    allowed = mask == 0
    known = bool((allowed | (mask <= least / 2)).all())
    require(known, "exact", "attention_mask", "0 and the least number", "a bias of attention")
    return allowed


def _spans(allowed: Tensor) -> list[tuple[int, int] | Tensor]:
    """Of each row the keys that it sees: from, to; or which, where they are not neighbours."""
    length = allowed.shape[1]
    counts = allowed.sum(1).tolist()
    first = allowed.int().argmax(1).tolist()
    last = (length - 1 - allowed.flip(1).int().argmax(1)).tolist()
    found: list[tuple[int, int] | Tensor] = []
    for row, count, begin, end in zip(allowed, counts, first, last, strict=True):
        if count == 0:
            found.append((0, 0))
        elif end - begin + 1 == count:
            found.append((begin, end + 1))
        else:
            found.append(row.nonzero()[:, 0])
    return found
