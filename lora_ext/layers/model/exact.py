"""Exact models: the results of a row do not depend on the batch, in training and in serving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._checks import flag, instance, require
from lora_ext.rows import PoolLayer

from ..base._packed_linear import PackedLinear, linears_of, pack_linears, packed_form, unpack
from ..base._spacing import remove_hooks
from ._attention import replace_sdpa
from ._exact_functions import MARK, has_adapters, replace_functions, restore_functions

Model = TypeVar("Model", bound=nn.Module)

_OWN = "_lora_ext_exact_packed"  # attribute that marks layers that exact() has packed
_TREE = "_lora_ext_exact_tree"  # attribute of a model for its _Tree

_AGAIN = "call lora_ext.exact(model, enabled=False), then lora_ext.exact(model)"


def exact(model: Model, enabled: bool = True) -> Model:
    """Make a model compute bitwise equal results for a token in every batch, also in training.

    In a plain decoder, the results of three operations depend on the batch:

    * matrix products with a weight, because a library's order of summation depends on the number of
      rows. An exact model multiplies by packed weights instead, for any number of rows
      (:func:`lora_ext.ops.packed_linear`).
    * attention, because its block sizes depend on the number of queries. An exact model computes
      each query separately over the keys of its row (:func:`lora_ext.ops.row_attention`).
    * pointwise functions such as SiLU, because torch uses other instructions for the last elements
      of each thread. An exact model uses :func:`lora_ext.ops.pointwise`. ``exact`` runs one forward
      of two tokens to find the modules that call such functions.

    The updates of adapters do not depend on the batch in any model. A sampled token therefore has
    the same log-probability in training as in sampling, bit for bit, if the adapter has the dtype
    of the weights and no dropout. Gradients are as in the plain model. See ``docs/exact.md`` for
    costs and limits.

    A forward raises an error if its result would not be exact: under ``torch.compile`` or autocast,
    after ``double()``, with another attention implementation, with modules that were added later,
    or if the model was loaded from a file.

    Args:
        model: transformers model on the CPU, in float32 or bfloat16, in evaluation mode, with the
            attention "sdpa". It may be wrapped, or attached to a pool. Only ``nn.Linear`` and
            ``nn.Embedding`` may have weight matrices. The model is changed in place and returned.
        enabled: True to make the model exact, False to restore it.

    Raises:
        TypeError: If ``model`` is not a module, or ``enabled`` is not a bool.
        ValueError: If the model has another attention implementation, layers of PEFT, a layer that
            cannot be packed, or an operation whose result may change with the batch, or if the
            model is exact and has been changed. The message names the cause, and the model is
            unchanged.
        RuntimeError: If ``enabled`` is False and the model is not exact.
    """
    instance("exact", "model", model, nn.Module)
    if not flag("exact", "enabled", enabled):
        found = any(MARK in module.__dict__ for module in model.modules())
        require(found, "exact", "model", "an exact model", "one that is not exact", RuntimeError)
        return _restore(model)
    if MARK in model.__dict__:
        _check_modules(model)
        return model
    config: Any = getattr(model, "config", None)
    found = getattr(config, "_attn_implementation", None)
    require(found == "sdpa", "exact", "model", "transformers' attention 'sdpa'", repr(found))
    _check_weights(model)
    plain = {name: layer for name, layer in linears_of(model) if type(layer) is nn.Linear}
    if plain:
        pack_linears(model, plain)
    for _, layer in linears_of(model):
        layer.__dict__["exact"] = True
    for layer in plain.values():
        layer.__dict__[_OWN] = True
    for module in _with_bases(model):
        module.__dict__[MARK] = True
    replace_sdpa(_attention)
    try:
        replace_functions(model)
    except BaseException:
        _restore(model)
        raise
    for module in model.modules():
        if module is model or hasattr(module, "set_attn_implementation"):
            if _TREE not in module.__dict__:
                module.register_forward_pre_hook(_check_unchanged)
            module.__dict__[_TREE] = _Tree(module)
    return model


def _check_weights(model: nn.Module) -> None:
    """Raise ValueError for a layer that cannot be packed.

    Such layers are experts, convolutions, GPT-2's ``Conv1D``, subclasses of ``nn.Linear`` and
    layers of PEFT.
    """
    known = (nn.Embedding, nn.ParameterDict, nn.ParameterList)  # the last two contain adapters
    for name, module in model.named_modules():
        if isinstance(module, PoolLayer):
            module = module.base
        form, expected = packed_form(module), "a layer that is not packed to 8 or 4 bits"
        whole = form is None or form.bits is None
        require(whole, "exact: model", repr(name), expected, f"one packed {form}")
        kind = type(module)
        if kind.__module__.startswith("peft.") and hasattr(module, "base_layer"):
            found = f"PEFT's {kind.__name__}; call lora_ext.from_peft(model) first"
            require(False, "exact: model", repr(name), "layers of lora_ext", found)
        fits = kind in (nn.Linear, PackedLinear) or isinstance(module, known)
        if fits or "norm" in kind.__name__.lower():  # some norms have a weight for each head
            continue
        for own, weight in module.named_parameters(recurse=False):
            expected = "a model with weights only in nn.Linear and nn.Embedding"
            found = f"a {kind.__name__} with {own} {list(weight.shape)}"
            one_row = weight.numel() == max(weight.shape, default=1)
            require(one_row, "exact: model", repr(name), expected, found)


def _with_bases(model: nn.Module) -> Iterator[nn.Module]:
    """Yield all modules of a model, and the base layer of each layer of a pool."""
    for module in model.modules():
        yield module
        if isinstance(module, PoolLayer):
            yield module.base


class _Tree:
    """Submodules of an exact model at its last check.

    A copied or loaded model has not been checked yet, so copies and pickles contain an empty tree.
    """

    undone = 0  # number of calls that have restored a model or a part of one

    def __init__(self, model: nn.Module | None = None) -> None:
        modules = () if model is None else model.modules()
        self.children = [module._modules for module in modules if module._modules]
        self.checked = self.now()
        self.undone_before = -1 if model is None else _Tree.undone

    def __reduce__(self) -> tuple[type[_Tree], tuple[()]]:
        return _Tree, ()

    def now(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self.children)))

    def is_unchanged(self) -> bool:
        return self.undone_before == _Tree.undone and self.checked == self.now()


def _check_unchanged(module: nn.Module, _: Any) -> None:
    """Raise ValueError before a forward if the model was changed so that it is not exact."""
    if MARK not in module.__dict__:
        return
    config: Any = getattr(module, "config", None)
    found = getattr(config, "_attn_implementation", None)
    remedy = "call model.set_attn_implementation('sdpa')"
    require(found == "sdpa", "exact", "model", "the attention 'sdpa'", f"{found!r}; {remedy}")
    if not module.__dict__[_TREE].is_unchanged():
        _check_modules(module)
        module.__dict__[_TREE] = _Tree(module)


def _check_modules(model: nn.Module) -> None:
    """Raise ValueError if a module is not exact. Submodules of adapter layers need no MARK."""
    _check_weights(model)
    for name, layer in linears_of(model):
        packed = isinstance(layer, PackedLinear) and layer.exact
        found = f"one that was added, loaded or restored later; {_AGAIN}"
        require(packed, "exact: model", repr(name), "a layer that exact has packed", found)
    parts: set[nn.Module] = set()
    for name, module in model.named_modules():
        if has_adapters(module) or type(module).__module__.startswith("peft."):
            parts.update(module.modules())
        marked, expected = MARK in module.__dict__, "a module that exact has checked"
        found = f"a {type(module).__name__} that was added later; {_AGAIN}"
        require(marked or module in parts, "exact: model", repr(name), expected, found)


def _restore(model: Model) -> Model:
    _Tree.undone += 1
    restore_functions(model)
    for _, layer in linears_of(model):
        layer.__dict__.pop("exact", None)
        if layer.__dict__.pop(_OWN, False) and isinstance(layer, PackedLinear):
            unpack([layer])
    for module in _with_bases(model):
        for key in (MARK, _TREE):
            module.__dict__.pop(key, None)
        remove_hooks(module, _check_unchanged)
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
    **more: Any,
) -> tuple[Tensor, None]:
    if MARK not in module.__dict__:
        how: Any = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **more}
        return inner(module, query, key, value, attention_mask, **how)
    require(dropout == 0, "exact", "attention_dropout", "0", dropout)
    for name in ("softcap", "position_bias"):
        require(more.get(name) is None, "exact", name, None, more.get(name))
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
    """Convert an attention mask to bool ``(B, T, L)``: B rows or 1, T queries, L keys."""
    require(mask.shape[1] == 1, "exact", "attention_mask", "shape (B, 1, T, L)", list(mask.shape))
    mask = mask[:, 0, :, :keys]
    if mask.dtype == torch.bool:
        return mask
    least = torch.finfo(mask.dtype).min
    allowed = mask == 0
    known = bool((allowed | (mask <= least / 2)).all())
    require(known, "exact", "attention_mask", f"only 0 and {least} as values", "other values")
    return allowed
