"""``exact``: a row's bits are its own, whatever is in the batch, in training as in serving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._checks import flag, instance, require

from ..base.packed_linear import PackedLinear, linears_of, pack_linears, unpack
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
    own keys (:func:`lora_ext.ops.row_attention`). What adapters add has this law by itself. So a
    sampled token's log-probability is the trainer's, bit for bit, where the adapter has the dtype
    of the weights and no dropout. Gradients are not exact. ``docs/exact.md`` has costs and limits.

    Args:
        model: of transformers, on the CPU, float32 or bfloat16, in evaluation mode, with the
            attention "sdpa"; it may be wrapped, or attached to a pool. It is changed in place, and
            comes back.
        enabled: False brings back what was there.

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
    _check_weights(model)
    if plain:
        pack_linears(model, plain)
    for _, module in linears_of(model):
        module.__dict__["exact"] = True
    for module in model.modules():
        module.__dict__[_MARK] = True
    model.__dict__[_OWN] = list({id(m): m for m in plain.values()}.values())
    ask_first(_attention)
    return model


def _check_weights(model: nn.Module) -> None:
    """Refuse what multiplies in ways of its own, which nobody packs: experts, convolutions, GPT-2's
    ``Conv1D``, subclasses of ``nn.Linear``."""
    known = (nn.Embedding, nn.ParameterDict, nn.ParameterList)  # the last two hold factors
    for name, module in model.named_modules():
        kind = type(module)
        fits = kind in (nn.Linear, PackedLinear) or isinstance(module, known)
        if fits or "norm" in kind.__name__.lower():  # of which some have a weight for each head
            continue
        for own, weight in module.named_parameters(recurse=False):
            expected = "a model whose weights are those of nn.Linear and nn.Embedding"
            found = f"a {kind.__name__} with {own} {list(weight.shape)}"
            one_row = weight.numel() == max(weight.shape, default=1)
            require(one_row, "exact: model", repr(name), expected, found)


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
    causal, mask = False, None
    if attention_mask is not None:
        mask = _allowed(attention_mask, key.shape[2]).expand(-1, query.shape[2], -1)
    elif query.shape[2] > 1:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal:
        key, value = (t[:, :, : query.shape[2]] for t in (key, value))
    y = ops.row_attention(query, key, value, scaling, causal=causal, mask=mask)
    return y.transpose(1, 2), None


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
